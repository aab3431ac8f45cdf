"""Questions between engines of different hosts, as bytes: the same door, proof and seal as between engines and shards.

Decisions: TCP alone, for who shares a host shares its memory; a thread for each connection that the door let in; what is no
question ends the connection, and is no harm to anybody.
"""

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

from actors.dataplane.client import CONNECT_S, HANDSHAKE_S
from actors.dataplane.connection import Wire, family_of
from actors.dataplane.door import Door
from actors.dataplane.frames import BYTES, FAILURE, BadFrame, Header, answer, piece, value_of
from actors.dataplane.handshake import introduce
from actors.dataplane.sealed import SealedWire, check_package
from trinity.errors import TrinityError

log = logging.getLogger(__name__)
BACKLOG, TICK_S = 32, 1.0
ANSWER_S = 60.0  # to send one
SEALED, PLAIN = "sealed", "tcp"
Answer = Callable[[bytes], Iterable[bytes | memoryview]]


class PeerServer:
    """Listens for other hosts' engines. `answer` gives the pieces of an answer, in any thread, or raises a TrinityError;
    questions have at most `most_bytes`. Owns its sockets and threads."""

    def __init__(self, answer: Answer, most_bytes: int, secret: bytes, host: str, is_sealed: bool = False):
        self._answer, self._most_bytes, self._secret = answer, most_bytes, secret
        if is_sealed:
            check_package()
        tcp = socket.create_server((host, 0), family=family_of(host), backlog=BACKLOG)
        self.address = f"{SEALED if is_sealed else PLAIN}:{host}:{tcp.getsockname()[1]}"
        self._door = Door({self.address: tcp}, secret, self._admit)

    def close(self) -> None:
        """Take no new connections. Harmless when repeated."""
        self._door.close()

    def _admit(self, sock: socket.socket, meant: str, transcript: bytes) -> None:
        wire = Wire(sock, TICK_S)
        if meant.startswith(SEALED):
            wire = SealedWire(wire, self._secret, transcript, is_shard=True)
        threading.Thread(target=self._serve, args=(wire,), name="trinity-peer", daemon=True).start()

    def _serve(self, wire: Wire) -> None:
        """One connection, until its peer leaves or breaks the protocol."""
        try:
            while True:
                self._answer_one(wire)
        except (EOFError, TrinityError, OSError) as error:
            log.debug("a peer's connection ended: %s", error)
        finally:
            wire.close()

    def _answer_one(self, wire: Wire) -> None:
        header = wire.header(math.inf)
        asked = _received(wire, header, self._most_bytes, time.monotonic() + HANDSHAKE_S)
        try:
            told = b"".join(self._answer(asked.tobytes()))
        except TrinityError as error:
            wire.send(*answer(header.request, error), time.monotonic() + HANDSHAKE_S)
            raise
        _send(wire, header.request, told, time.monotonic() + ANSWER_S)


class PeerConnection:
    """A connection to a PeerServer. Raises OSError, EOFError or TrinityError where there is none."""

    def __init__(self, address: str, secret: bytes, until_s: float):
        how, _, where = address.partition(":")
        host, _, port = where.rpartition(":")
        if how not in (SEALED, PLAIN) or not port.isdecimal():
            raise BadFrame(f"{address[:100]!r} is no address of a peer")
        left_s = max(0.001, min(CONNECT_S, until_s - time.monotonic()))
        sock = socket.create_connection((host, int(port)), left_s)
        self.wire = Wire(sock)
        try:
            transcript = introduce(self.wire, secret, address, min(until_s, time.monotonic() + HANDSHAKE_S))
            if how == SEALED:
                check_package()
                self.wire = SealedWire(self.wire, secret, transcript, is_shard=False)
        except BaseException:
            sock.close()
            raise

    def ask(self, request: bytes, most_bytes: int, until_s: float) -> np.ndarray:
        """-> its answer, uint8, of at most so many bytes. Raises OSError, EOFError or TrinityError."""
        _send(self.wire, 1, request, until_s)
        header = self.wire.header(until_s)
        if header.kind == FAILURE:
            raise value_of(header, self.wire.payload(header, until_s))
        return _received(self.wire, header, most_bytes, until_s)

    def close(self) -> None:
        self.wire.close()


def _send(wire: Wire, number: int, data: bytes, until_s: float) -> None:
    wire.send(piece(number, len(data)), [torch.frombuffer(bytearray(data), dtype=torch.uint8)], until_s)


def _received(wire: Wire, header: Header, most_bytes: int, until_s: float) -> np.ndarray:
    if header.kind != BYTES or header.num_rows > most_bytes:
        raise BadFrame(
            f"a frame of kind {header.kind} and {header.payload_bytes} bytes; a peer's has at most {most_bytes}"
        )
    [data] = wire.payload(header, until_s)
    return data.numpy()
