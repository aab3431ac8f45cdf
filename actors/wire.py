"""Whole buffers over a socket until a deadline: what both sides of the direct transport stand on."""

import hmac
import math
import select
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from actors.frames import HEADER, MAGIC, Header
from trinity.errors import DeadlineExceeded

NONCE_BYTES, PROOF_BYTES = 32, 32
LONGEST_WAIT_S = 86400.0
SOCKET_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Address:
    """Where a shard listens. The Unix path counts only on the host of that `machine`."""

    machine: str
    path: str
    host: str
    port: int


def machine_id() -> str:
    """The same for all processes that can share a Unix socket, and for no others."""
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    known = (boot.read_text().strip(), str(network.readlink())) if boot.is_file() and network.is_symlink() else ()
    return "/".join((socket.gethostname(), *known))


class Wire:
    """A connected, non-blocking socket that sends and receives whole buffers until a deadline (time.time(), or inf)."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._poll = select.poll()

    def send(
        self, header: bytes, tensors: Iterable[Tensor], deadline_s: float, on_readable: Callable[[], None] | None = None
    ) -> None:
        """Send all. With `on_readable`, what arrives is taken in meanwhile, so that two peers that send never wait for each
        other's full buffers; one side of a connection must do so."""
        views = [memoryview(header), *(_bytes(t) for t in tensors if t.numel())]
        while views:
            try:
                sent = self.sock.sendmsg(views)
            except BlockingIOError:
                events = self._wait(select.POLLOUT | (select.POLLIN if on_readable else 0), deadline_s)
                if on_readable and events & select.POLLIN:
                    on_readable()
                continue
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def receive(self, view: memoryview, deadline_s: float) -> None:
        """Fill `view`. Raises EOFError when the peer is gone, DeadlineExceeded when the time is up."""
        while view:
            try:
                got = self.sock.recv_into(view)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline_s)
                continue
            if not got:
                raise EOFError("the peer closed the connection")
            view = view[got:]

    def header(self, deadline_s: float) -> Header:
        """The head of the next frame. Raises BadFrame."""
        head = bytearray(HEADER.size)
        self.receive(memoryview(head), deadline_s)
        return Header.unpack(head)

    def payload(self, header: Header, deadline_s: float) -> list[Tensor]:
        """The rest of that frame, received into its own memory."""
        buffers = header.buffers()
        for buffer in buffers:
            if buffer.numel():
                self.receive(_bytes(buffer), deadline_s)
        return buffers

    def close(self) -> None:
        self.sock.close()

    def _wait(self, events: int, deadline_s: float) -> int:
        self._poll.register(self.sock, events)
        left_ms = None if deadline_s == math.inf else 1000 * min(max(0.0, deadline_s - time.time()), LONGEST_WAIT_S)
        ready = self._poll.poll(left_ms)
        if not ready:
            raise DeadlineExceeded("the peer did not answer in time")
        return ready[0][1]


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    plain = tensor.detach().cpu().contiguous()
    return memoryview(plain.view(-1).view(torch.uint8).numpy().data)


def proof_of(secret: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret, MAGIC + nonce, "sha256")
