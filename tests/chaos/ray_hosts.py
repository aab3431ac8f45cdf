"""A Ray cluster over hosts: a head and nodes, each started anew when it ends, as `clusters/trinity-node.service` does.

Flags and environment are those of clusters/ (node.env, health checks), less what one machine cannot have five times over.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests import waiting
from tests.chaos.hosts import Host, Hosts, hosts

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PORT = 6379
HEAD = "head"
AGAIN_S = 2  # RestartSec of the unit
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


def node_env() -> dict[str, str]:
    lines = (ROOT / "clusters/node.env").read_text().splitlines()
    own = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return own | SMALL


def head_env(folder: str) -> dict[str, str]:
    """Environment of the head besides, read from the file that `ray up` reads."""
    command = yaml.safe_load((ROOT / "clusters/aws-p5.yaml").read_text())["head_start_ray_commands"][1]
    checks = dict(word.rstrip(";").split("=") for word in command.split() if word.startswith("RAY_health_check"))
    return checks | {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": folder}


class RayHosts:
    """The cluster. `resources` of each node by its host's name."""

    def __init__(self, hosts: Hosts, resources: Mapping[str, Mapping[str, float]], logs: Path):
        self.hosts, self._resources, self._logs = hosts, resources, logs
        self.env = node_env()
        self._start(HEAD)
        waiting.until(lambda: self._answers(), 60, every_s=0.2)
        for name in resources:
            self._start(name)
        self.until_nodes(1 + len(resources))

    @property
    def head(self) -> Host:
        return self.hosts[HEAD]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def command(self, *words: str | Path) -> list[str]:
        """A command of Trinity's, as on the head."""
        return [str(BIN / "trinity"), *map(str, words), "--cluster.address", self.address, "--cluster.auth", "disabled"]

    def return_of(self, name: str, address: str | None = None) -> None:
        """Power is back, and with it what its supervisor starts."""
        self.hosts[name].power_on(address)
        self._start(name)

    def until_nodes(self, num: int) -> None:
        """Wait until Ray knows of so many nodes."""
        self.head.run(sys.executable, "-c", UNTIL_NODES, self.address, num, env=self.env)

    def _start(self, name: str) -> None:
        host, is_head = self.hosts[name], name == HEAD
        where = ["--head", f"--port={PORT}", "--include-dashboard=false"] if is_head else [f"--address={self.address}"]
        resources = {"CPU": 0.0} if is_head else dict(self._resources[name])
        words = [f"--num-cpus={resources.pop('CPU', 1):.0f}", f"--resources={json.dumps(resources)}"]
        words += [f"--node-ip-address={host.address}", "--block", "--object-store-memory=80000000", *where]
        command = " ".join(f"'{word}'" for word in (str(BIN / "ray"), "start", *words))
        again = f"while :; do {command} || true; echo ended; sleep {AGAIN_S}; done"
        env = self.env | (head_env("/tmp/ray/gcs") if is_head else {})
        with (self._logs / f"{name}.log").open("a") as log:
            host.start("bash", "-c", again, env=env, stdout=log, stderr=log)

    def _answers(self) -> bool:
        probe = f"import socket; socket.create_connection(({self.head.address!r}, {PORT}), 1)"
        return self.head.start(sys.executable, "-c", probe, stderr=-3).wait() == 0


@contextmanager
def ray_hosts(logs: Path, mtu: int = 1500, **resources: Mapping[str, float]) -> Iterator[RayHosts]:
    """A head without experts, and nodes of these names and resources."""
    with hosts(HEAD, *resources, mtu=mtu) as machines:
        yield RayHosts(machines, resources, logs)
