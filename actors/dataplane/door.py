"""The door of a shard: one thread accepts all connections, and lets in who proves that it knows the pool's secret.

Decisions: whoever has not proved it costs a descriptor and a hundred bytes for HANDSHAKE_S at most: no thread, no memory of its
choosing. MAX_GREETED stand at the door at a time; for one more, of the host that most come from, who has stood there longest is
sent away: a crowd from one host holds up nobody from another, nor those on the Unix socket. There other users' processes are
not greeted at all.
"""

import logging
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from actors.dataplane import handshake
from actors.dataplane.frames import BadFrame, refusal
from actors.dataplane.handshake import REPLY_BYTES
from trinity.utils.origins import origin_of

log = logging.getLogger(__name__)
Admit = Callable[[socket.socket, str, bytes], None]
HANDSHAKE_S = 5.0
MAX_GREETED = 64
ACCEPT_AGAIN_S = 0.1


@dataclass(eq=False)
class Guest:
    """A peer that was greeted and has not proved anything yet."""

    sock: socket.socket
    origin: str  # trinity/utils/origins.py; "" on the Unix socket
    meant: str
    greeting: bytes
    until_s: float
    reply: bytes = b""


class Door:
    """Owns the listeners, each under the address that its callers mean, until `close`. `admit` gets the sockets of those
    who are let in, with the address that they meant and the handshake's transcript."""

    def __init__(self, listeners: Mapping[str, socket.socket], secret: bytes, admit: Admit):
        self.secret, self.admit, self._is_open = secret, admit, True
        self._guests: dict[Guest, None] = {}  # in order: who has stood there longest is first
        self._selector, self._listeners = selectors.DefaultSelector(), list(listeners.values())
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, self._stop)
        for meant, listener in listeners.items():
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener, meant))
        self._thread = threading.Thread(target=self._run, name="trinity-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no new connections; those that were let in stay. Harmless when repeated."""
        self._waker.close()
        self._thread.join()

    def _run(self) -> None:
        while self._is_open:
            for key, _ in self._selector.select(self._wait_s()):
                key.data()
            now_s = time.monotonic()
            for guest in [guest for guest in self._guests if guest.until_s <= now_s]:
                self._send_away(guest, "it proved nothing in time")
        for guest in list(self._guests):
            self._send_away(guest, "the door closes")
        for listener in self._listeners:
            listener.close()
        self._woken.close()
        self._selector.close()

    def _wait_s(self) -> float | None:
        """The time until the first guest's is up."""
        first = next(iter(self._guests), None)
        return None if first is None else max(0.0, first.until_s - time.monotonic())

    def _stop(self) -> None:
        self._is_open = False

    def _accept(self, listener: socket.socket, meant: str) -> None:
        try:
            sock, peer = listener.accept()
        except BlockingIOError:  # it left again
            return
        except OSError as error:  # out of descriptors: others will leave
            log.error("cannot take a caller now: %s", error)
            time.sleep(ACCEPT_AGAIN_S)
            return
        sock.setblocking(False)
        origin = origin_of(peer[0] if isinstance(peer, tuple) else "")
        guest = Guest(sock, origin, meant, handshake.greeting(), time.monotonic() + HANDSHAKE_S)
        try:
            handshake.check_peer(sock)
            sock.sendall(guest.greeting)
        except (BadFrame, OSError) as error:
            log.debug("not greeted: %s", error)  # strangers fill no log
            sock.close()
            return
        if len(self._guests) >= MAX_GREETED:
            self._send_away(self._most_dispensable(), "others wait")
        self._guests[guest] = None
        self._selector.register(sock, selectors.EVENT_READ, partial(self._hear, guest))

    def _most_dispensable(self) -> Guest:
        [(crowd, _)] = Counter(guest.origin for guest in self._guests).most_common(1)
        return next(guest for guest in self._guests if guest.origin == crowd)

    def _hear(self, guest: Guest) -> None:
        if guest not in self._guests:  # sent away since it spoke
            return
        try:
            piece = guest.sock.recv(REPLY_BYTES - len(guest.reply))
            guest.reply += piece
            if not piece:
                self._send_away(guest, "it left")
            elif len(guest.reply) == REPLY_BYTES:
                words, transcript = handshake.welcome(self.secret, guest.meant, guest.greeting, guest.reply)
                guest.sock.sendall(words)
                self._let_in(guest, transcript)
        except BadFrame as error:
            self._send_away(guest, error.message, refusal(error))
        except OSError as error:
            self._send_away(guest, str(error))

    def _let_in(self, guest: Guest, transcript: bytes) -> None:
        self._forget(guest)
        try:
            self.admit(guest.sock, guest.meant, transcript)
        except (RuntimeError, OSError) as error:  # out of threads: others will leave; or it has left
            log.error("cannot take a caller now: %s", error)
            guest.sock.close()

    def _send_away(self, guest: Guest, why: str, words: bytes = b"") -> None:
        log.debug("sent away: %s", why)
        self._forget(guest)
        with guest.sock, suppress(OSError):
            guest.sock.sendall(words)

    def _forget(self, guest: Guest) -> None:
        del self._guests[guest]
        self._selector.unregister(guest.sock)
