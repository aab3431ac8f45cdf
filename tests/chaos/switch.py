"""A switch in user space between network namespaces: what it does to frames can be told, and nobody on either side is.

A port is a TAP device whose other end is this process. `Switch.way(a, b)` is what happens to frames from port a to port b:
none arrives (silently: no carrier is lost), some are lost, or late, or in another order, or at a rate; frames are counted.
"""

import fcntl
import heapq
import os
import random
import secrets
import select
import shutil
import struct
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAME_BYTES, MOST_QUEUED = 65536, 10_000
MAC = slice(0, 6)  # of a frame's target; its source follows


@dataclass
class Way:
    """One direction between two ports."""

    is_cut: bool = False
    loss: float = 0.0  # share of frames
    delay_s: float = 0.0
    jitter_s: float = 0.0  # more of it, drawn for each frame: frames overtake each other
    bytes_per_s: float = float("inf")
    queue_s: float = float("inf")  # at that rate; what would wait longer is dropped
    num_passed: int = 0
    num_dropped: int = 0
    free_s: float = field(default=0.0, repr=False)  # when the frames before have left


class Switch:
    """Owns its TAP devices and a thread. Rules may be changed at any time, from any thread."""

    def __init__(self, seed: int = 0):
        self._rng, self._ports = random.Random(seed), dict[int, str]()
        self._ways, self._port_of = dict[tuple[str, str], Way](), dict[bytes, int]()
        self._late: list[tuple[float, int, int, bytes]] = []
        self._number, self._poll = 0, select.poll()
        self._lock = threading.Lock()  # of the ports: hosts come and go while frames are on their way
        self._woken, self._waker = os.pipe()
        self._poll.register(self._woken, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="switch", daemon=True)
        self._thread.start()

    def plug(self, namespace: str, name: str, address: str) -> None:
        """A network device `name` in that namespace, with `address` (10.0.0.1/24), on a port of the same name."""
        port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(port, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
        for words in (
            ("link", "set", name, "netns", namespace),
            ("-n", namespace, "addr", "add", address, "dev", name),
            ("-n", namespace, "link", "set", name, "up"),
        ):
            subprocess.run(["ip", *words], check=True, capture_output=True)
        with self._lock:
            self._ports[port] = name
        self._poll.register(port, select.POLLIN)
        os.write(self._waker, b"x")

    def unplug(self, name: str) -> None:
        """The device vanishes, as where a host loses power."""
        with self._lock:
            [port] = [port for port, known in self._ports.items() if known == name]
            self._poll.unregister(port)
            del self._ports[port]
            os.close(port)

    def way(self, source: str, target: str) -> Way:
        return self._ways.setdefault((source, target), Way())

    def both(self, one: str, other: str) -> tuple[Way, Way]:
        return self.way(one, other), self.way(other, one)

    def cut(self, one: str, other: str, is_cut: bool = True) -> None:
        """Both ways; mend with False."""
        for way in self.both(one, other):
            way.is_cut = is_cut

    def close(self) -> None:
        os.close(self._waker)
        self._thread.join()
        for name in list(self._ports.values()):
            self.unplug(name)
        os.close(self._woken)

    def _run(self) -> None:
        while True:
            now_s = time.monotonic()
            with self._lock:
                while self._late and self._late[0][0] <= now_s:
                    self._write(*heapq.heappop(self._late)[2:])
            wait_ms = 1000 * (self._late[0][0] - now_s) if self._late else None
            for port, event in self._poll.poll(wait_ms):
                if port == self._woken and event & select.POLLIN:
                    os.read(port, 1)
                elif port == self._woken:  # the other end is closed
                    return
                else:
                    with self._lock:
                        self._take(port)

    def _take(self, port: int) -> None:
        if port not in self._ports:  # it was unplugged since
            return
        try:
            frame = os.read(port, FRAME_BYTES)
        except OSError:  # nothing, or the namespace is gone
            return
        self._port_of[frame[6:12]] = port
        known = self._port_of.get(frame[MAC]) if not frame[0] & 1 else None
        for target in [known] if known in self._ports else [other for other in self._ports if other != port]:
            self._pass(port, target, frame)

    def _pass(self, port: int, target: int, frame: bytes) -> None:
        way, now_s = self.way(self._ports[port], self._ports[target]), time.monotonic()
        if way.is_cut or self._rng.random() < way.loss or len(self._late) > MOST_QUEUED:
            way.num_dropped += 1
            return
        if way.free_s - now_s > way.queue_s:
            way.num_dropped += 1
            return
        way.num_passed += 1
        way.free_s = max(now_s, way.free_s) + len(frame) / way.bytes_per_s
        at_s = way.free_s + way.delay_s + way.jitter_s * self._rng.random()
        if at_s <= now_s:
            return self._write(target, frame)
        self._number += 1
        heapq.heappush(self._late, (at_s, self._number, target, frame))

    def _write(self, target: int, frame: bytes) -> None:
        if target in self._ports:
            with suppress(OSError):  # its host does not take it
                os.write(target, frame)


def why_not() -> str:
    """Why there can be none here, if so."""
    if os.geteuid() or not shutil.which("ip"):
        return "network namespaces need root and `ip`"
    return "" if os.path.exists("/dev/net/tun") else "no TAP devices here: /dev/net/tun is missing"


@contextmanager
def switched(*addresses: str):
    """-> a switch, and for each address the name of a namespace that has it, which is its port's too. Nothing is left."""
    name, switch = f"trn{secrets.token_hex(3)}", Switch()
    hosts = [f"{name}-{i}" for i in range(len(addresses))]
    try:
        for host, address in zip(hosts, addresses, strict=True):
            subprocess.run(["ip", "netns", "add", host], check=True)
            subprocess.run(["ip", "-n", host, "link", "set", "lo", "up"], check=True)
            switch.plug(host, host, address)
        yield switch, hosts
    finally:
        switch.close()
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)
