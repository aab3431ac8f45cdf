"""The ring: a connection's second way, for inference between a caller and a shard of one host, which native/ring goes in C++.

Decisions: a caller offers it before its first inference, as it does a shared buffer, in sealed memory of its own; a shard
declines that has no extension, or that Python alone can compute. The socket stays: it says when the peer is gone, and takes
all that the ring does not. Nothing is asked over the ring that could not be asked again.
"""

import fcntl
import logging
import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from actors.dataplane.frames import BadFrame, Header, offer
from actors.dataplane.shm import can_shrink, received_descriptor
from trinity import native

if TYPE_CHECKING:
    from actors.dataplane.connection import Wire

log = logging.getLogger(__name__)
KIND = 3  # beside those of shared buffers


def is_possible() -> bool:
    """Say whether this process can be at an end of a ring."""
    return hasattr(native.lib, "ring_open")


def agree(wire: "Wire", deadline_s: float) -> Any:
    """The caller's side: -> a ring that the shard serves, or None."""
    with ExitStack() as undo:
        fd = os.memfd_create("trinity-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        undo.callback(os.close, fd)
        os.ftruncate(fd, native.lib.ring_bytes())
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        ring = native.lib.ring_open(fd, wire.sock.fileno())
        wire.send(offer(KIND), [], deadline_s)
        socket.send_fds(wire.sock, [b"\0"], [fd])
        is_taken = wire.header(deadline_s) == Header.unpack(offer(KIND))
    return ring if is_taken else None


def consider(wire: "Wire", service: Any, deadline_s: float) -> None:
    """The shard's side: have `service` serve the ring that is offered, or decline it. Raises BadFrame for what is none."""
    if wire.ring is not None:
        raise BadFrame("a connection has one ring")
    fd, taken = received_descriptor(wire.sock), 0
    try:
        if service is not None and is_possible():
            wire.ring, taken = _attached(service, fd), KIND
    finally:
        os.close(fd)
    wire.send(offer(taken), [], deadline_s)


def _attached(service: Any, fd: int) -> Any:
    if can_shrink(fd):
        raise BadFrame("a ring is sealed memory; this could shrink")
    ring = native.lib.ring_attach(service, fd)
    if ring is None:
        raise BadFrame(f"a ring is {native.lib.ring_bytes()} bytes laid out as this extension has them")
    return ring
