"""Frames in C++ (native/ring): a caller's way to a shard of another host, and a shard's thread that answers without Python.

Decisions: the frames are those of frames.py, so either end may be without C++, and the other need not know. A shard's
connection gives Python what is not plain inference, or cannot be computed there, and Python answers it as it always does. A
caller has a connection for it alone, made as every other one; what goes wrong on it is asked again on the other, by Python.
"""

from typing import Any

from torch import Tensor

from actors.dataplane.connection import Wire, memory_of
from actors.dataplane.frames import MAGIC, Header
from trinity import native


def stream(wire: Wire) -> Any:
    """A caller's way of native/ring over a connection that was just made, which it owns from here on."""
    return native.lib.ring_stream(wire.sock.detach(), MAGIC)


class ServedWire(Wire):
    """A shard's Wire whose plain inference is computed by `service`, in the thread that waits for the next frame."""

    def __init__(self, wire: Wire, service: Any):
        super().__init__(wire.sock, wire.tick_s, wire.device)
        self._served = native.lib.ring_serve(service, wire.sock.fileno(), MAGIC)
        self._payload: bytes | None = None

    def header(self, deadline_s: float) -> Header:
        """The head of the next frame that is Python's. Raises EOFError when the peer is gone, BadFrame."""
        found = native.lib.ring_next(self._served)
        if found is None:
            raise EOFError("the peer closed the connection, or broke off in a frame")
        head, self._payload = found
        return Header.unpack(head)

    def payload(self, header: Header, deadline_s: float) -> list[Tensor]:
        if self._payload is None:
            return super().payload(header, deadline_s)
        payload, self._payload = memoryview(self._payload), None
        buffers, at = header.buffers(), 0
        for buffer in buffers:
            memory = memoryview(memory_of(buffer).reshape(-1)).cast("B")
            memory[:] = payload[at : at + len(memory)]
            at += len(memory)
        return buffers
