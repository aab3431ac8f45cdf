"""A Ray cluster over hosts: a head and nodes, started as the units of systemd in clusters/ start them, and again when they end.

Flags and environment are theirs, less what one machine cannot have five times over.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests import waiting
from tests.chaos.hosts import Host, Hosts, hosts
from tests.units import command, environment, node_env, settings

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PORT = 6379
HEAD, UNITS = "head", ("trinity-node.service", "trinity-head.service")
GCS = "/tmp/ray/gcs"
FEW = "--object-store-memory=80000000"
UNTIL_NODES = """
import sys, time
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
while sum(node.state == 0 for node in client.get_all_node_info().values()) < int(sys.argv[2]):
    time.sleep(0.2)
"""
SMALL = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_object_store_minimum_memory_bytes": "10000000",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPATH": str(ROOT),
}


class RayHosts:
    """The cluster. `resources` of each node by its host's name."""

    def __init__(self, hosts: Hosts, resources: Mapping[str, Mapping[str, float]], logs: Path):
        self.hosts, self._resources, self._logs = hosts, resources, logs
        self.env = node_env() | SMALL
        self._start(HEAD)
        self._begin()

    @property
    def head(self) -> Host:
        return self.hosts[HEAD]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def trinity(self, *words: str | Path) -> list[str]:
        """A command of Trinity's, as on the head."""
        return [str(BIN / "trinity"), *map(str, words), "--cluster.address", self.address, "--cluster.auth", "disabled"]

    def _begin(self) -> None:
        waiting.until(self._answers, 60, every_s=0.2)
        for name in self._resources:
            self._start(name)
        self.until_nodes(1 + len(self._resources))

    def begin_anew(self, address: str) -> None:
        """The head is back at another address, which an operator tells the nodes, and restarts them."""
        for name in self.hosts:
            self.hosts[name].power_off()
        self.return_of(HEAD, address)
        for name in self._resources:
            self.hosts[name].power_on()
        self._begin()

    def return_of(self, name: str, address: str | None = None) -> None:
        """Power is back, and with it what its supervisor starts."""
        self.hosts[name].power_on(address)
        self._start(name)

    def until_nodes(self, num: int) -> None:
        """Wait until Ray knows of so many nodes."""
        self.head.run(sys.executable, "-c", UNTIL_NODES, self.address, num, env=self.env)

    def _start(self, name: str) -> None:
        """As its unit would: again whenever it ends."""
        host, unit = self.hosts[name], UNITS[name == HEAD]
        resources = dict(self._resources.get(name, {}))
        own = {"HEAD": self.address, "RAY_gcs_storage_path": GCS}
        own["RESOURCES"] = json.dumps({key: amount for key, amount in resources.items() if key != "CPU"})
        words = [f"--num-cpus={resources.get('CPU', 0)}", f"--node-ip-address={host.address}", FEW]
        words += ["--include-dashboard=false"] if name == HEAD else []
        again = (
            f"while :; do {command(unit, BIN / 'ray')} {' '.join(words)}; sleep {settings(unit)['RestartSec'][0]}; done"
        )
        env = {**self.env, **environment(unit), **own}
        with (self._logs / f"{name}.log").open("a") as log:
            host.start("bash", "-c", f"mkdir -p {GCS}; {again}", env=env, stdout=log, stderr=log)

    def _answers(self) -> bool:
        probe = f"import socket; socket.create_connection(({self.head.address!r}, {PORT}), 1)"
        return self.head.start(sys.executable, "-c", probe, stderr=-3).wait() == 0


@contextmanager
def ray_hosts(logs: Path, mtu: int = 1500, **resources: Mapping[str, float]) -> Iterator[RayHosts]:
    """A head without experts, and nodes of these names and resources."""
    with hosts(HEAD, *resources, mtu=mtu) as machines:
        yield RayHosts(machines, resources, logs)
