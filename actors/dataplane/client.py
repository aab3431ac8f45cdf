"""The direct transport, on the caller's side: rows over sockets that shards open, everything else through Ray.

One frame there, one frame back; on a Unix socket within a host, on TCP between hosts; large rows through memory that both
sides reach, where there is any (actors/dataplane/shm.py). Decisions: the caller's thread reads its own answers, with nobody in
between; a connection in doubt is dropped and the same op sent over a new one.
"""

import itertools
import logging
import math
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from actors.dataplane import native_frames, ring, unix_socket
from actors.dataplane.connection import CPU, Address, Wire, family_of, machine_id
from actors.dataplane.frames import BadFrame, Calls, request, value_of
from actors.dataplane.handshake import introduce, meant
from actors.dataplane.sealed import SealedWire, check_package
from actors.dataplane.shm import agree, possible
from trinity import native
from trinity.dispatch.transport import Done, Reply, Transport
from trinity.errors import DeadlineExceeded, TrinityError, Unavailable
from trinity.rpc.messages import Backward, Fetch, Forward
from trinity.utils.trying import tried

log = logging.getLogger(__name__)
BROKEN = (EOFError, OSError, TrinityError)  # what ends a connection
CONNECT_S, HANDSHAKE_S = 0.5, 5.0  # a host that does not answer is asked anew: the kernel would wait longer each time
NEARLY_S = 0.05  # before a deadline is at it: Ray counts in milliseconds
ARRIVED_S = 0.2  # for what has come in time, and was not read: others were waited for
LOCATE_S = 0.5  # for a new address where an old one is known, which may be reached before whoever knows the new one


class Connection:
    """One caller's connection to one shard. Requests may be sent ahead; answers are matched by number, in any order, and
    their rows arrive on `device`."""

    def __init__(self, address: Address, secret: bytes, deadline_s: float, device: torch.device = CPU):
        near = address.machine == machine_id()
        self._numbers = itertools.count(1)
        self._expected: set[int] = set()
        self._arrived: dict[int, Any] = {}
        self._num_away = 0  # answers that will come, whether or not somebody wants them
        self._connected = partial(_connected, address, near, secret, device)
        with ExitStack() as undo:
            self.wire = self._connected(deadline_s)
            undo.callback(self.wire.close)
            buffer = self.wire.buffer = agree(self.wire, possible(near, device, address.device), deadline_s)
            undo.pop_all()
        is_sealed = isinstance(self.wire, SealedWire)
        self._is_near = near
        self._may_ask = device.type == address.device == "cpu" and ring.is_possible() and not is_sealed
        self._min_bytes = math.inf if buffer is None else buffer.min_bytes
        log.info("rows %s to %s: small ones over %s, large ones over %s", device.type, address.device, *self.ways)

    @property
    def ways(self) -> tuple[str, str]:
        """Names of the ways rows travel: small ones, large ones."""
        small = "a Unix socket" if self.wire.sock.family == socket.AF_UNIX else "TCP"
        small += ", sealed" * isinstance(self.wire, SealedWire)
        return small, small if self.wire.buffer is None else self.wire.buffer.name

    @property
    def is_quiet(self) -> bool:
        """Say whether no answer is on its way."""
        return not self._num_away

    def ring(self, deadline_s: float) -> Any:
        """The way of native/ring to the shard, or None where one side has none; asked for on a quiet connection, once, and
        again where it has broken."""
        if self.wire.ring is not None and not native.lib.ring_is_open(self.wire.ring):
            self._may_ask = True
        if self._may_ask:
            self._may_ask, self.wire.ring = False, self._ring(deadline_s)
        return self.wire.ring

    def _ring(self, deadline_s: float) -> Any:
        found = (
            ring.agree(self.wire, deadline_s) if self._is_near else native_frames.stream(self._connected(deadline_s))
        )
        how = "a ring" if self._is_near else "frames in C++"
        log.info("inference to %s: %s", self.wire.sock.getpeername(), "no ring" if found is None else how)
        return found

    def close(self) -> None:
        if self.wire.ring is not None:
            native.lib.ring_close(self.wire.ring)
            self.wire.ring = None
        self.wire.close()

    def send(self, call: Calls) -> int:
        number = next(self._numbers)
        header, tensors = request(number, call)
        self._expected.add(number)
        self._num_away += 1
        if tensors and tensors[0].nbytes >= self._min_bytes:
            header, tensors = self._posted(number, header, tensors)
        self.wire.send(header, tensors, call.deadline_s, on_readable=lambda: self._read(call.deadline_s))
        return number

    def _posted(self, number: int, header: bytes, tensors: list[Tensor]) -> tuple[bytes, list[Tensor]]:
        """The frame with its rows in the shared buffer, if there is a box for them."""
        assert self.wire.buffer is not None
        box = self.wire.buffer.lend(number, tensors[0].nbytes)
        return (header, tensors) if box is None else self.wire.post(box, header, tensors)

    def take(self, number: int, deadline_s: float) -> Any:
        """The answer to request `number`: a value, or a TrinityError as a value."""
        while number not in self._arrived:
            self._read(deadline_s)
        self._expected.discard(number)
        return self._arrived.pop(number)

    def forget(self, number: int) -> None:
        """Drop this answer: nobody will take it."""
        self._expected.discard(number)
        self._arrived.pop(number, None)

    @property
    def is_dead(self) -> bool:
        """The shard has closed it, and nobody waits for an answer who would notice."""
        if self._expected:
            return False
        try:
            return self.wire.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except OSError as error:
            return not isinstance(error, BlockingIOError)

    def _read(self, deadline_s: float) -> None:
        header = self.wire.header(deadline_s)
        self._num_away -= 1
        value = value_of(header, self.wire.payload(header, deadline_s))
        if (buffer := self.wire.buffer) is not None and buffer.lent:
            buffer.release_slot(header.request)
        if header.request == 0:  # the shard refuses the connection
            raise value if isinstance(value, TrinityError) else BadFrame("an answer without a request")
        if header.request in self._expected:
            self._arrived[header.request] = value


def _connected(address: Address, near: bool, secret: bytes, device: torch.device, deadline_s: float) -> Wire:
    """A new connection, after its handshake."""
    with ExitStack() as undo:
        sock = undo.enter_context(socket.socket(socket.AF_UNIX if near else family_of(address.host)))
        now_s = time.monotonic()
        sock.settimeout(max(0.001, min(CONNECT_S, deadline_s - now_s)))
        with unix_socket.reachable(address.path) if near else nullcontext((address.host, address.port)) as target:
            sock.connect(target)
        wire = Wire(sock, device=device)
        transcript = introduce(wire, secret, meant(address, near), min(deadline_s, now_s + HANDSHAKE_S))
        if address.is_sealed and not near:
            check_package()
            wire = SealedWire(wire, secret, transcript, is_shard=False)
        undo.pop_all()
        return wire


class DirectReply:
    def __init__(
        self, transport: "DirectTransport", shard: str, connection: Connection, number: int, deadline_s: float
    ):
        self.transport, self.shard, self.connection = transport, shard, connection
        self.number, self.deadline_s = number, deadline_s

    def __del__(self) -> None:
        self.connection.forget(self.number)

    def result(self) -> Any:
        """Raises DeadlineExceeded when the time is up, Unavailable when the shard's process is away."""
        try:
            value = self.connection.take(self.number, max(self.deadline_s, time.monotonic() + ARRIVED_S))
        except BROKEN as error:
            raise self.transport.given_up(self.shard, self.connection, error, self.deadline_s) from None
        if isinstance(value, TrinityError):
            raise value
        return value


class DirectTransport:
    """Rows over connections of its own, everything else through `control`. For one caller thread.

    `locate(shard, deadline_s)` asks where the shard listens now; it may wait for a shard that is starting again, and raises
    Unavailable. Where a call is of a newer epoch than any before, a shard may have started again elsewhere, while its old
    process, cut off from who knows of it, is still there and answers: each is located anew.
    """

    def __init__(self, control: Transport, locate: Callable[[str, float], Address], secret: bytes):
        self.control, self.locate, self.secret = control, locate, secret
        self._connections: dict[str, Connection] = {}
        self._known: dict[str, Address] = {}
        self._epoch = 0
        # Whose connection may lead to an old process; seconds to wait for who knows.
        self._doubted = dict[str, float]()
        self.num_changes = 0

    def send(self, shard: str, verb: str, message: Any) -> Reply:
        if verb not in ("infer", "backward", "fetch"):
            return self.control.send(shard, verb, message)
        try:
            connection = self._connection(shard, message)
            return DirectReply(self, shard, connection, connection.send(message), message.deadline_s)
        except BROKEN as error:
            return Done(error=self.given_up(shard, self._connections.get(shard), error, message.deadline_s))

    def renew(self) -> None:
        self.num_changes += 1

    def ring(self, shard: str, epoch: int, deadline_s: float) -> Any:
        """The way of native/ring to a shard, for a call of that epoch; None without one, or where the shard may be elsewhere by
        now: a call by `send` finds out. The same, until `num_changes` is another."""
        connection = None if epoch > self._epoch or shard in self._doubted else self._connections.get(shard)
        if connection is None:
            return None
        if not connection.is_quiet:
            self.num_changes += 1  # ask again
            return connection.wire.ring
        made = tried(partial(connection.ring, min(deadline_s, time.monotonic() + HANDSHAKE_S)), *BROKEN)
        if isinstance(made, Exception):
            self.drop(shard, connection)
            return None
        return made

    def given_up(self, shard: str, connection: Connection | None, error: Exception, deadline_s: float) -> TrinityError:
        """Drop a connection that failed, maybe in the middle of a frame; -> what to tell the caller: to try again, where it is
        not the caller's deadline that has passed."""
        self.drop(shard, connection)
        if isinstance(error, DeadlineExceeded) and time.monotonic() + NEARLY_S < deadline_s:
            return Unavailable(f"shard {shard} did not take the connection in time")
        if isinstance(error, DeadlineExceeded):
            return DeadlineExceeded(f"shard {shard} did not answer in time; is it overloaded or stopped?")
        return error if isinstance(error, TrinityError) else Unavailable(f"shard {shard} cannot be reached: {error}")

    def drop(self, shard: str, connection: Connection | None) -> None:
        """Forget a connection that is of no more use; the next call makes another."""
        if connection is not None:
            connection.close()
            self.num_changes += 1
            if self._connections.get(shard) is connection:
                del self._connections[shard]

    def close(self) -> None:
        for shard, connection in list(self._connections.items()):
            self.drop(shard, connection)

    def _connection(self, shard: str, call: Calls) -> Connection:
        epoch = 0 if isinstance(call, Fetch) else call.epoch
        if epoch > self._epoch:
            self._epoch, self._doubted = epoch, dict.fromkeys(self._connections, LOCATE_S)
            self.num_changes += 1
        if shard in self._doubted:
            self._confirm(shard, call.deadline_s)
        if shard not in self._connections:
            for other, connection in list(self._connections.items()):
                if connection.is_dead:  # shards leave for good; their sockets would stay
                    self.drop(other, connection)
            address = self._address(shard, call.deadline_s)
            self._connections[shard] = Connection(address, self.secret, call.deadline_s, _device(call))
            self._known[shard] = address
            self.num_changes += 1
        return self._connections[shard]

    def _confirm(self, shard: str, deadline_s: float) -> None:
        """Leave a connection whose shard is elsewhere now. As long as nobody says, rows go where they went, and each call looks
        whether there is an answer."""
        found = self._located(shard, min(deadline_s, time.monotonic() + self._doubted[shard]))
        if found is not None and found != self._known.get(shard):
            self.drop(shard, self._connections.get(shard))

    def _address(self, shard: str, deadline_s: float) -> Address:
        """The address where it listens now, or did, as long as nobody says."""
        known = self._known.get(shard)
        if known is None:
            return self.locate(shard, deadline_s)
        return self._located(shard, min(deadline_s, time.monotonic() + LOCATE_S)) or known

    def _located(self, shard: str, until_s: float) -> Address | None:
        """The address where it listens now; None if nobody says, which leaves its connection in doubt."""
        found = tried(partial(self.locate, shard, until_s), TrinityError)
        if isinstance(found, TrinityError):
            self._doubted[shard] = 0.0
            return None
        self._doubted.pop(shard, None)
        self.num_changes += 1
        return found


def _device(call: Calls) -> torch.device:
    """The device of the caller's rows."""
    if isinstance(call, Forward):
        return call.rows.x_RD.device
    return call.dy_RD.device if isinstance(call, Backward) else CPU
