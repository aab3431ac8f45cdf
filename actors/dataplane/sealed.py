"""Frames that nobody on the cable reads or changes: AES-256-GCM over what `Wire` sends, with keys of this connection alone.

Decisions: keys come from the pool's secret and both nonces of the handshake, one for each direction, and a counter is the
nonce of each piece, so that nothing can be replayed, reordered or sent back. A frame's header is a piece, its payload one or
several; a piece that is not what its sender sealed ends the connection. Without forward secrecy: who learns the pool's secret
later can read what he has recorded. Between hosts only: on one host the kernel keeps others out.

Cost, round trips over loopback's TCP on two quiet cores, medians of alternating calls, times those that are not sealed: 1.6 to
2.3 at every size from 1 KiB to 16 MiB each way (both ends' ciphers at 10 GiB/s).
"""

import hmac
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
from torch import Tensor

from actors.dataplane.connection import Wire, memory_of
from actors.dataplane.frames import FAILURE, BadFrame, Header
from trinity.errors import ConfigError

TAG_BYTES = 16
PIECE_BYTES = 256 << 10  # it stays in a core's cache, and the peer opens it while the next one is sealed
SINCE = 47  # the first cryptography that has encrypt_into


def check_package() -> None:
    """Raise ConfigError where the package that seals, in place since that version, is not there."""
    if find_spec("cryptography") is None or int(version("cryptography").partition(".")[0]) < SINCE:
        raise ConfigError(f"placement.data_tls needs the package cryptography: pip install 'cryptography>={SINCE}'")


class _Seal:
    """One direction's key, counter and memory for a piece."""

    def __init__(self, key: bytes):
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._aead, self._invalid, self._count, self._piece = AESGCM(key), InvalidTag, 0, bytearray()

    def nonce(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(12, "little")

    def piece(self, size: int) -> memoryview:
        """Memory for so many sealed bytes, until the next one."""
        if len(self._piece) < size:
            self._piece = bytearray(size)
        return memoryview(self._piece)[:size]

    def close(self, data: bytes | memoryview) -> memoryview:
        """Seal `data` in the piece."""
        sealed = self.piece(len(data) + TAG_BYTES)
        self._aead.encrypt_into(self.nonce(), data, None, sealed)
        return sealed

    def open(self, sealed: bytes | memoryview, data: bytearray | memoryview) -> None:
        """Write into `data` what was sealed. Raises BadFrame where it is something else."""
        try:
            self._aead.decrypt_into(self.nonce(), sealed, None, data)
        except self._invalid:
            raise BadFrame("a frame was changed on its way") from None


class SealedWire(Wire):
    """A Wire after its handshake, whose `transcript` both sides have proved. `is_shard` says which of them this is."""

    def __init__(self, wire: Wire, secret: bytes, transcript: bytes, is_shard: bool):
        super().__init__(wire.sock, wire.tick_s, wire.device)
        shard, caller = (
            _Seal(hmac.digest(secret, name + transcript, "sha256")) for name in (b"to caller", b"to shard")
        )
        self._mine, self._theirs = (shard, caller) if is_shard else (caller, shard)

    def send(
        self, header: bytes, tensors: Iterable[Tensor], deadline_s: float, on_readable: Callable[[], None] | None = None
    ) -> None:
        head = bytes(self._mine.close(header))
        for piece in _cut([_bytes_of(tensor) for tensor in tensors]):
            self.send_all([head, self._mine.close(piece)], deadline_s, on_readable)
            head = b""
        if head:
            self.send_all([head], deadline_s, on_readable)

    def header(self, deadline_s: float) -> Header:
        self._take(memoryview(self._head), deadline_s)
        return Header.unpack(self._head)

    def payload(self, header: Header, deadline_s: float) -> list[Tensor]:
        buffers = header.buffers(None, self._staged)
        memories = [_bytes_of(buffer) for buffer in buffers]
        if 0 < header.payload_bytes <= PIECE_BYTES:
            together = memoryview(bytearray(header.payload_bytes))
            self._take(together, deadline_s)
            for memory in memories:
                memory[:], together = together[: len(memory)], together[len(memory) :]
        else:
            for piece in _cut(memories):
                self._check(deadline_s)
                self._take(piece, deadline_s)
        if self._staged and header.kind < FAILURE:
            buffers[0] = buffers[0].to(self.device, non_blocking=True)
        return buffers

    def _take(self, data: memoryview, deadline_s: float) -> None:
        """Receive and open what becomes `data`."""
        sealed = self._theirs.piece(len(data) + TAG_BYTES)
        self.receive([sealed], deadline_s)
        self._theirs.open(sealed, data)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(memory_of(tensor).reshape(-1).view(np.uint8))


def _cut(memories: list[memoryview]) -> Iterator[memoryview]:
    """The pieces of a payload: all of it, or where that is more than one piece has, parts of each of its tensors."""
    if sum(map(len, memories)) <= PIECE_BYTES:
        together = b"".join(memories)
        if together:
            yield memoryview(together)
        return
    for memory in memories:
        for at in range(0, len(memory), PIECE_BYTES):
            yield memory[at : at + PIECE_BYTES]
