"""Hosts on one machine: each has a network, processes, memory, files of its own below /tmp/ray, a name and a clock, on a switch
that can be told what to do to frames.

Decisions: a host is a set of namespaces whose process 1 is a shell that reaps; when it ends, the kernel ends all of them at
once, as a loss of power does. Its port is unplugged first: nobody hears of it. Disks survive, memory (/dev/shm) does not. The
checkout and the folders of a test are the same on all hosts, as with a network file system. A clock is shifted by a library
that is loaded first (clock.c), made here where there is a C compiler.
"""

import itertools
import os
import secrets
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos import switch as switches
from tests.chaos.switch import Switch, Way

NETWORK = "10.88.0"
MEMORY = "2g"  # of /dev/shm
MORTAL = ("setpriv", "--pdeathsig", "KILL")  # with whoever started it
SPACES = ("--net", "--pid", "--mount", "--ipc", "--uts")
REAPER = "trap : TERM; while :; do sleep 3600 & wait $!; done"


def why_not() -> str:
    """Why there can be none here, if so."""
    missing = [name for name in ("unshare", "nsenter", "setpriv", "bash") if not shutil.which(name)]
    return switches.why_not() or (f"hosts need {', '.join(missing)}" if missing else _why_no_spaces())


def _why_no_spaces() -> str:
    made = subprocess.run(["unshare", "--pid", "--fork", *SPACES[2:], "--mount-proc", "true"], capture_output=True)
    return "" if not made.returncode else "this user may not make namespaces of processes and mounts"


def clock_library(folder: Path) -> Path | None:
    """The library that shifts clocks, made into `folder`; None without a C compiler."""
    if not (compiler := shutil.which("cc")):
        return None
    library = folder / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library


class Host:
    """A machine, which `Hosts` makes. It is on after that."""

    def __init__(self, switch: Switch, name: str, address: str, folder: Path, clock: Path | None, mtu: int):
        self.name, self.address, self._switch, self._mtu = name, address, switch, mtu
        self._disk, self._clock, self._library = folder / name, folder / f"{name}.clock", clock
        (self._disk / "tmp").mkdir(parents=True)
        self.set_clock(0.0)
        self.power_on()

    @property
    def is_on(self) -> bool:
        return self._root is not None and self._root.poll() is None

    def power_on(self, address: str | None = None) -> None:
        """Start with nothing running; at another address, if given."""
        self.address = address or self.address
        _ip("netns", "add", self.name)
        _ip("-n", self.name, "link", "set", "lo", "up")
        self._switch.plug(self.name, self.name, f"{self.address}/24")
        _ip("-n", self.name, "link", "set", self.name, "mtu", str(self._mtu))
        mounts = (
            f"hostname {self.name}; mount -t tmpfs -o size={MEMORY} tmpfs /dev/shm; mount --bind {self._disk} /tmp/ray"
        )
        spaces = ["unshare", "--fork", "--kill-child", *SPACES[1:], "--mount-proc", "bash", "-c"]
        self._root = subprocess.Popen(
            [*MORTAL, "ip", "netns", "exec", self.name, *spaces, f"set -e; {mounts}; echo on; {REAPER}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it complains of being killed
        )
        assert self._root.stdout is not None
        assert self._root.stdout.readline() == b"on\n", f"host {self.name} does not start"
        [self._pid] = _children(self._root.pid)

    def power_off(self) -> None:
        """Lose power: nothing that runs there says goodbye. Harmless when it is off."""
        if self._root is None:
            return
        self._switch.unplug(self.name)
        if self._root.poll() is None:
            os.kill(self._pid, signal.SIGKILL)
        self._root.wait()
        self._root = None
        _ip("netns", "del", self.name)

    def logs(self) -> Iterator[Path]:
        """What Ray wrote there, also before a loss of power."""
        yield from self._disk.glob("**/session_*/logs")

    def set_clock(self, ahead_s: float) -> None:
        """Set its time of day so far before (below 0: behind) this machine's; processes that run see it at once."""
        with open(self._clock, "r+b" if self._clock.exists() else "wb") as file:
            file.write(struct.pack("d", ahead_s))

    def start(
        self, *command: str | Path | int, env: dict[str, str] | None = None, **options: object
    ) -> subprocess.Popen:
        """A process there, which ends with the one that is returned, and with the host's power."""
        return subprocess.Popen([*self.inside, *map(str, command)], env=self.env(env or {}), **options)

    @property
    def inside(self) -> list[str]:
        """Command that runs what follows it there."""
        return ["nsenter", "--target", str(self._pid), *SPACES, "--", *MORTAL]

    def run(self, *command: str | Path | int, timeout_s: float = 120, **options: object) -> str:
        """-> its output. Raises CalledProcessError, whose stderr says why."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with self.start(*command, **{**pipes, **options}) as process:
            out, err = process.communicate(timeout=timeout_s)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, out, err)
        return out

    def env(self, more: dict[str, str]) -> dict[str, str]:
        own = {"TMPDIR": "/tmp/ray/tmp", "HOST_CLOCK": str(self._clock)}
        preload = {"LD_PRELOAD": str(self._library)} if self._library else {}
        return {**os.environ, **own, **preload, **more}


class Hosts:
    """Named hosts on a switch."""

    def __init__(self, folder: Path, mtu: int):
        self.switch, self._folder, self._mtu, self._addresses = Switch(), folder, mtu, itertools.count(1)
        self._prefix, self._all = f"t{secrets.token_hex(2)}", dict[str, Host]()
        self._library = clock_library(folder)
        Path("/tmp/ray").mkdir(exist_ok=True)  # where each host's own is mounted

    @property
    def can_shift_clocks(self) -> bool:
        return self._library is not None

    def __getitem__(self, name: str) -> Host:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def add(self, name: str) -> Host:
        host = Host(self.switch, f"{self._prefix}-{name}", self.new_address(), self._folder, self._library, self._mtu)
        self._all[name] = host
        return host

    def new_address(self) -> str:
        return f"{NETWORK}.{next(self._addresses)}"

    def ways(self, name: str, other: str | None = None) -> list[Way]:
        """Both directions between a host and another one, or all others."""
        return [way for there in self._others(name, other) for way in self.switch.both(self[name].name, there)]

    def ways_from(self, name: str, other: str | None = None) -> list[Way]:
        """The one direction only: what it says."""
        return [self.switch.way(self[name].name, there) for there in self._others(name, other)]

    def _others(self, name: str, other: str | None) -> list[str]:
        return [self[other].name] if other else [host.name for key, host in self._all.items() if key != name]

    @contextmanager
    def cut(self, name: str, other: str | None = None) -> Iterator[None]:
        """Cut while the block runs, both ways; nobody is told."""
        with cut(self.ways(name, other)):
            yield

    def close(self) -> None:
        for host in self._all.values():
            host.power_off()
        self.switch.close()


@contextmanager
def cut(ways: list[Way]) -> Iterator[None]:
    for way in ways:
        way.is_cut = True
    try:
        yield
    finally:
        for way in ways:
            way.is_cut = False


@contextmanager
def hosts(*names: str, mtu: int = 1500) -> Iterator[Hosts]:
    """Hosts of these names. Nothing is left of them."""
    folder = Path(tempfile.mkdtemp(prefix="trinity-hosts-"))
    made = Hosts(folder, mtu)
    try:
        for name in names:
            made.add(name)
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)


def _children(pid: int) -> list[int]:
    """Children of a process. `ip netns exec` and `unshare` replace each other."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
