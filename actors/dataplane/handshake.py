"""Proof of both ends of a connection: shard and caller each show that they know the pool's secret, for this connection only.

    shard -> caller   HELLO, the shard's nonce
    caller -> shard   HELLO, the caller's nonce, what it computes with, the caller's proof
    shard -> caller   WELCOME, with the shard's time, what it computes with, its proof, or a failure that says why not

A proof is an HMAC-SHA256 over the role of who proves and its words (arithmetic.py), the address that the caller meant and both
nonces. Decisions: a proof
holds for one role, so none can be reflected; for one connection, because either side's nonce is fresh; and for one address, so
one that somebody relays from where a shard was to where it is now is wrong. Who sits on the cable between the two can still
read and change what follows, unless it is sealed (sealed.py).
"""

import hashlib
import hmac
import logging
import os
import secrets
import socket
import struct
import time
from typing import Literal

from actors.dataplane import frames
from actors.dataplane.arithmetic import WORDS_BYTES, check_words, own_words
from actors.dataplane.connection import Address, Wire
from actors.dataplane.frames import FAILURE, WELCOME, BadFrame, Header, value_of
from trinity.rpc.messages import PROTOCOL, other_release

log = logging.getLogger(__name__)
MOST_SKEW_S = 1.0
HELLO = b"TRH%c" % PROTOCOL
NONCE_BYTES = PROOF_BYTES = 32
GREETING_BYTES = len(HELLO) + NONCE_BYTES
REPLY_BYTES = GREETING_BYTES + WORDS_BYTES + PROOF_BYTES
UCRED = struct.Struct("3i")  # pid, uid, gid
Role = Literal["shard", "caller"]


def greeting() -> bytes:
    """The first words of a side, of GREETING_BYTES: HELLO and a fresh nonce."""
    return HELLO + secrets.token_bytes(NONCE_BYTES)


def transcript(meant: str, shard: bytes, caller: bytes) -> bytes:
    """Hash of what both sides know of a connection: the address that is meant, and the greetings of shard and caller."""
    parts = (meant.encode(), shard, caller)
    return hashlib.sha256(b"".join(struct.pack("<I", len(part)) + part for part in parts)).digest()


def proof(secret: bytes, role: Role, transcript: bytes, words: bytes = b"") -> bytes:
    """The proof of `role`, and of its `words`, on the connection of that transcript."""
    return hmac.digest(secret, role.encode() + transcript + words, "sha256")


def meant(address: Address, near: bool) -> str:
    """The address as a caller uses it: over the Unix socket when it is `near`."""
    if near:
        return f"unix:{address.path}"
    return f"{'sealed' if address.is_sealed else 'tcp'}:{address.host}:{address.port}"


def check_version(greeting: bytes | bytearray) -> None:
    """Raise BadFrame unless the peer speaks this handshake."""
    said = bytes(greeting[: len(HELLO)])
    if said[:-1] != HELLO[:-1]:
        raise BadFrame(f"the peer says {said!r}, this side {HELLO!r}: is it a shard?")
    if said != HELLO:
        raise BadFrame(other_release("the peer", said[-1]))


def welcome(secret: bytes, meant: str, mine: bytes, reply: bytes) -> tuple[bytes, bytes]:
    """-> a shard's answer to a caller's reply of REPLY_BYTES to its own greeting, and the transcript. Raises BadFrame for a
    wrong secret."""
    check_version(reply)
    known, words = transcript(meant, mine, reply[:GREETING_BYTES]), reply[GREETING_BYTES:-PROOF_BYTES]
    if not hmac.compare_digest(reply[-PROOF_BYTES:], proof(secret, "caller", known, words)):
        raise BadFrame("the secret is wrong: this is another pool's shard, or another address than the caller meant")
    check_words(words, f"a caller at {meant}")
    own = own_words()
    return frames.welcome(time.time()) + own + proof(secret, "shard", known, own), known


def introduce(wire: Wire, secret: bytes, meant: str, deadline_s: float) -> bytes:
    """The caller's side, on a connection that was just made; -> the transcript. Raises BadFrame for a peer that does not
    know the secret."""
    check_peer(wire.sock)
    theirs, mine = bytearray(GREETING_BYTES), greeting()
    wire.receive([theirs], deadline_s)
    check_version(theirs)
    known = transcript(meant, bytes(theirs), mine)
    asked_s, own = time.time(), own_words()
    wire.send(mine + own + proof(secret, "caller", known, own), [], deadline_s)
    header, told_s = wire.header(deadline_s), time.time()
    if header.kind == FAILURE:
        raise value_of(header, wire.payload(header, deadline_s))
    words, proven = bytearray(WORDS_BYTES), bytearray(PROOF_BYTES)
    wire.receive([words, proven], deadline_s)
    if header._replace(left_s=0.0) != Header.unpack(WELCOME) or not hmac.compare_digest(
        bytes(proven), proof(secret, "shard", known, bytes(words))
    ):
        raise BadFrame(f"who listens at {meant} does not know the pool's secret: it is no shard of this pool")
    check_words(bytes(words), f"the shard at {meant}")
    tell_skew(meant, header.left_s, asked_s, told_s)
    return known


def tell_skew(meant: str, theirs_s: float, asked_s: float, told_s: float) -> None:
    """Warn where a peer's time lies more than MOST_SKEW_S outside the moments between which it was asked for."""
    ahead_s = theirs_s - min(max(theirs_s, asked_s), told_s)
    if abs(ahead_s) > MOST_SKEW_S:
        log.warning(
            "the clock of %s is %.1f s %s this machine's: set both by NTP, or logs and times of files will not match; "
            "calls are not affected", meant, abs(ahead_s), "ahead of" if ahead_s > 0 else "behind",
        )  # fmt: skip


def check_peer(sock: socket.socket) -> None:
    """Raise BadFrame where a process of another user is at the other end of a Unix socket; root may be."""
    if sock.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return
    _, uid, _ = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    if uid not in (os.geteuid(), 0):
        raise BadFrame(f"the process at the other end belongs to user {uid}, this one to {os.geteuid()}")
