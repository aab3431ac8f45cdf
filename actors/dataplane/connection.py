"""Whole buffers over a socket until a deadline: what both sides of the direct transport stand on."""

import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.dataplane.frames import FAILURE, HEADER, IN_SHARED_BUFFER, BadFrame, Header, in_shared_buffer
from actors.dataplane.shm import SharedBuffer
from trinity.errors import DeadlineExceeded

CPU = torch.device("cpu")
SOCKET_BUFFER_BYTES = 1 << 20
SILENCE_S = 3.0  # of a host that is asked every second whether it is there: it has vanished, or the way to it
KEEPALIVE_S = 1
# Linux, struct tcp_info: how often in vain it has sent data again, or asked; ms since it was told of anything.
UNANSWERED = struct.Struct("2xBB52xI")
TIMEVAL = struct.Struct("ll")


@dataclass(frozen=True)
class Address:
    """Address that a shard listens at. The Unix socket's path counts only on that `machine`."""

    machine: str
    path: str
    host: str
    port: int
    device: str = "cpu"  # what kind its experts are on
    is_sealed: bool = False  # over TCP


def machine_id() -> str:
    """The same for all processes that find one another's Unix sockets, and for no others: files, and the host's network."""
    boot, spaces = Path("/proc/sys/kernel/random/boot_id"), [Path("/proc/self/ns", name) for name in ("net", "mnt")]
    known = [str(space.readlink()) for space in spaces if space.is_symlink()]
    return "/".join((socket.gethostname(), *([boot.read_text().strip()] if boot.is_file() else []), *known))


def family_of(host: str) -> socket.AddressFamily:
    """IPv4 or IPv6, as its address is, or the first that its name has. Raises OSError for a name that has none."""
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]


class Wire:
    """A connected socket that sends and receives whole buffers until a deadline (time.monotonic(), or inf).

    Receiving blocks in the kernel, which returns every `tick_s` for a look at the clock: one system call for each piece,
    where a poll before each would make three. Deadlines are kept to within a tick, and so is silence noticed: a host that
    vanished says no goodbye, and a cable that was mended after a while is not tried by TCP for as long again. A peer that is
    slow is not silent: its host acknowledges. What is received goes to `device`.
    """

    buffer: SharedBuffer | None = None
    ring: Any = None  # of native/ring, a caller's or a shard's; who has made it ends it before the socket

    def __init__(self, sock: socket.socket, tick_s: float = 0.05, device: torch.device = CPU):
        sock.setblocking(True)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        seconds, part = divmod(tick_s, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEVAL.pack(int(seconds), int(1e6 * part)))
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), KEEPALIVE_S)
        self._is_far = sock.family != socket.AF_UNIX and sys.platform == "linux"
        self.sock, self.tick_s, self.device, self._staged = sock, tick_s, device, device.type == "cuda"
        self._head = bytearray(HEADER.size)

    def send(
        self, header: bytes, tensors: Iterable[Tensor], deadline_s: float, on_readable: Callable[[], None] | None = None
    ) -> None:
        """Send all. With `on_readable`, what arrives is taken in meanwhile, so that two peers that send never wait for each
        other's full buffers; one side of a connection must do so."""
        self.send_all([header, *map(memory_of, tensors)], deadline_s, on_readable)

    def send_all(self, views: list[Any], deadline_s: float, on_readable: Callable[[], None] | None = None) -> None:
        """Send what lies in `views`, in their order."""
        while views := _after(views, self._sent(views)):
            self._check(deadline_s)
            events = self._wait(select.POLLOUT | (select.POLLIN if on_readable else 0), deadline_s)
            if on_readable and events & select.POLLIN:
                on_readable()

    def _sent(self, views: list[Any]) -> int:
        try:
            return self.sock.sendmsg(views, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def receive(self, views: list[Any], deadline_s: float) -> None:
        """Fill all `views`. Raises EOFError when the peer is gone, DeadlineExceeded when the time is up."""
        while views:
            try:
                got = self.sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                self._check(deadline_s)
                continue
            if not got:
                raise EOFError("the peer closed the connection")
            views = _after(views, got)
            if views:  # a peer that drips is as late as one that is silent
                self._check(deadline_s)

    def header(self, deadline_s: float) -> Header:
        """The head of the next frame. Raises BadFrame."""
        self.receive([self._head], deadline_s)
        return Header.unpack(self._head)

    def payload(self, header: Header, deadline_s: float) -> list[Tensor]:
        """The rest of that frame, received into its own memory. Raises BadFrame for what is not in the shared buffer."""
        if header.flags & IN_SHARED_BUFFER:
            buffers = header.buffers(self._posted(header))
            arriving = buffers[1:]
        else:
            arriving = buffers = header.buffers(None, self._staged)
        if header.payload_bytes:
            self.receive([memory_of(buffer) for buffer in arriving], deadline_s)
        if self._staged and header.kind < FAILURE:
            buffers[0] = buffers[0].to(self.device, non_blocking=True)
        return buffers

    def post(self, box: int, header: bytes, tensors: list[Tensor]) -> tuple[bytes, list[Tensor]]:
        """Put a frame's first tensor into the shared buffer; -> the frame to send instead."""
        assert self.buffer is not None
        self.buffer.put(box, tensors[0])
        return in_shared_buffer(header, box), tensors[1:]

    def close(self) -> None:
        self.sock.close()
        if self.buffer is not None:
            self.buffer.close()
            self.buffer = None

    def _posted(self, header: Header) -> Tensor:
        if self.buffer is None or header.kind >= FAILURE:
            raise BadFrame(
                f"a frame of kind {header.kind} names box {header.box} of a shared buffer that it does not have"
            )
        return self.buffer.take(header)

    def _wait(self, events: int, deadline_s: float) -> int:
        poll = select.poll()
        poll.register(self.sock, events)
        while not (ready := poll.poll(1000 * self.tick_s)):
            self._check(deadline_s)
        return ready[0][1]

    def _check(self, deadline_s: float) -> None:
        if time.monotonic() >= deadline_s:
            raise DeadlineExceeded("the peer did not answer in time")
        if self._is_far:
            state = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, UNANSWERED.size)
            *in_vain, silent_ms = UNANSWERED.unpack(state)
            # A peer that is full is asked ever less often, and does answer.
            if max(in_vain) > 1 and silent_ms > 1000 * SILENCE_S:
                raise TimeoutError(f"its host has said nothing for {silent_ms / 1000:.1f} s")


def _after(views: list[Any], done: int) -> list[Any]:
    """The rest of the buffers when the first `done` bytes are dealt with."""
    for i, view in enumerate(views):
        size = len(view) if isinstance(view, bytes | bytearray) else view.nbytes
        if done < size:
            rest = memoryview(view).cast("B")[done:] if done else view
            return [rest, *views[i + 1 :]]
        done -= size
    return []


def memory_of(tensor: Tensor) -> Any:
    """The memory of a tensor as a contiguous array; a copy of it where it is on a GPU (pinned) or has gaps."""
    if tensor.requires_grad or not (tensor.is_cpu and tensor.is_contiguous()):
        source = tensor.detach()
        tensor = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda).copy_(source)
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
