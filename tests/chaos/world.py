"""Hosts that are hurt as `trinity chaos --hosts` asks, and that command over them.

    python -m tests.chaos.world [--victims shard0,shard1] [--at-once 2] [--mtu 1400] [--keep LOGS] serve|train ...

Decisions: the command runs on the head, which is never hurt; the others are, one at a time. A host that lost power is back
after the fault's time, at the same address or, by chance, at a new one; Ray's node on it starts by itself. A clock that
was shifted stays so until the next time.
"""

import argparse
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.chaos.plan import Fault
from tests.chaos.hosts import Hosts, cut, why_not
from tests.chaos.ray_hosts import HEAD, RayHosts, ray_hosts

SLOW = {"delay_s": 0.010, "jitter_s": 0.005, "loss": 0.01}
CLOCK_S = 60.0  # at most, either way
NODES = {
    "engine": {"CPU": 1, "engine": 1, "train_slot": 1},
    **{f"shard{n}": {"CPU": 1, "expert_shard": 2} for n in range(3)},
}


class World:
    """The hosts of a cluster and a socket at which faults are asked for."""

    def __init__(
        self, cluster: RayHosts, path: Path, victims: list[str], at_once: int = 1, log: Callable[[str], None] = print
    ):
        self._cluster, self._victims, self._at_once, self._log = cluster, victims, at_once, log
        self._rng = random.Random()
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(str(path))
        self._sock.listen()
        threading.Thread(target=self._listen, name="world", daemon=True).start()

    def close(self) -> None:
        self._sock.close()

    def _listen(self) -> None:
        while self._sock.fileno() >= 0:
            try:
                sock, _ = self._sock.accept()
            except OSError:  # closed
                return
            with sock, sock.makefile("rwb") as file:
                told = self._done(json.loads(file.readline()))
                self._log(f"{time.strftime('%X')} {told}")
                file.write(json.dumps(told).encode() + b"\n")

    def _done(self, order: dict[str, Any]) -> dict[str, str]:
        self._rng.seed(order["draw"])  # all that is drawn for a fault follows from the plan
        try:
            name = self._victims[int(order["draw"] * len(self._victims))]
            return {"target": self.strike(Fault(order["fault"]), name, float(order["for_s"]))}
        except (OSError, ValueError, AssertionError, subprocess.SubprocessError) as error:  # who asked is told
            return {"error": repr(error)}

    def strike(self, fault: Fault, name: str, for_s: float) -> str:
        hosts = self._cluster.hosts
        match fault:
            case Fault.CUT_HOST:
                with cut(hosts.ways(name)):
                    time.sleep(for_s)
            case Fault.CUT_ONE_WAY:
                with cut(hosts.ways_from(name)):
                    time.sleep(for_s)
            case Fault.CUT_BETWEEN:
                other = self._rng.choice([each for each in (HEAD, *NODES) if each != name])
                with cut(hosts.ways_from(name, other)):
                    time.sleep(for_s)
                return f"{name} to {other} for {for_s:.1f} s"
            case Fault.SLOW_HOST:
                self._slow(name, for_s)
            case Fault.LOSE_POWER:
                return self._lose_power(name, for_s)
            case Fault.SHIFT_CLOCK:
                ahead_s = self._rng.uniform(-CLOCK_S, CLOCK_S)
                hosts[name].set_clock(ahead_s)
                return f"{name} by {ahead_s:+.0f} s"
        return f"{name} for {for_s:.1f} s"

    def _slow(self, name: str, for_s: float) -> None:
        ways = self._cluster.hosts.ways(name)
        before = {key: getattr(ways[0], key) for key in SLOW}
        _set(ways, SLOW)
        time.sleep(for_s)
        _set(ways, before)

    def _lose_power(self, name: str, for_s: float) -> str:
        """Of up to `at_once` hosts, as spot machines are taken back."""
        hosts, others = self._cluster.hosts, [each for each in self._victims if each != name]
        names = [name, *self._rng.sample(others, min(len(others), self._rng.randrange(self._at_once)))]
        for each in names:
            hosts[each].power_off()
        time.sleep(for_s)
        back = {each: self._rng.choice([None, hosts.new_address()]) for each in names}
        for each, address in back.items():
            self._cluster.return_of(each, address)
        told = (f"{each} back at {address or 'the same address'}" for each, address in back.items())
        return f"{', '.join(told)} after {for_s:.1f} s"


def _set(ways: list[Any], values: dict[str, float]) -> None:
    for way in ways:
        for key, value in values.items():
            setattr(way, key, value)


def parsed(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """-> own flags, and the rest."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.world")
    parser.add_argument("--victims", default=",".join(NODES), help="hosts that are hurt (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=1, help="hosts that lose power at once, at most (default: 1)")
    parser.add_argument("--mtu", type=int, default=1500, help="of all hosts (default: %(default)s)")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="of each frame (default: %(default)s)")
    parser.add_argument("--loss", type=float, default=0.0, help="share of the frames (default: %(default)s)")
    parser.add_argument(
        "--keep", type=Path, help="a new folder for what the hosts and Ray on them wrote (default: nowhere)"
    )
    return parser.parse_known_args(argv)


def keep(hosts: Hosts, logs: Path, folder: Path) -> None:
    """Copy what was written, by host."""
    for log in logs.glob("*.log"):
        shutil.copy(log, folder)
    for name in hosts:
        for session in hosts[name].logs():
            shutil.copytree(session, folder / name / session.parent.name, symlinks=True, dirs_exist_ok=True)


def main(argv: list[str]) -> int:
    if reason := why_not():
        raise SystemExit(reason)
    own, command = parsed(argv)
    if own.keep:
        own.keep.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="trinity-world-") as folder:
        logs = Path(folder)
        with ray_hosts(logs, own.mtu, **NODES) as cluster:
            for name in cluster.hosts:
                _set(cluster.hosts.ways(name), {"delay_s": own.delay_ms / 1000, "loss": own.loss})
            world = World(cluster, logs / "hosts", own.victims.split(","), own.at_once)
            words = cluster.trinity("chaos", *command, "--hosts", logs / "hosts")
            code = cluster.head.start(*words, env=cluster.env).wait()
            world.close()
            if own.keep:
                keep(cluster.hosts, logs, own.keep)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
