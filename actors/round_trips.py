"""Round trips between the nodes of a cluster, as a token pays them, and how far their clocks are apart.

Decision: a round trip is what it takes to open a TCP connection to a node's own Ray process, the least of several: the kernels'
and the network's time alone, and nothing has to listen for it.
"""

import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from actors.names import ask, on_node
from trinity.errors import TrinityError, Unavailable
from trinity.utils.trying import tried

TRIES, CONNECT_S, NODE_S = 5, 1.0, 60.0


@dataclass(frozen=True)
class Measured:
    """A node's own measurements. `to_s`: by the other's address; None where it cannot be reached. `ahead_s` of the clock here:
    beyond what the time that the question took would explain."""

    to_s: Mapping[str, float | None]
    ahead_s: float


def measured() -> dict[str, Measured | TrinityError]:
    """Measurements of each node of the cluster that this process has joined, by its address."""
    nodes = {node["NodeManagerAddress"]: node for node in ray.nodes() if node["Alive"]}
    ports = {address: node["NodeManagerPort"] for address, node in nodes.items()}
    with ThreadPoolExecutor(len(nodes)) as threads:
        asked = {
            host: threads.submit(tried, partial(_asked, node["NodeID"], ports), TrinityError, RayError)
            for host, node in nodes.items()
        }
        found = {host: answer.result() for host, answer in asked.items()}
    return {
        host: Unavailable(f"{host}: {each}") if isinstance(each, RayError) else each for host, each in found.items()
    }


def _asked(node: str, ports: Mapping[str, int]) -> Measured:
    asked_s = time.time()
    to_s, begun_s, ended_s = ask(on_node(_measure, node).remote(ports), NODE_S, f"node {node[:8]}")
    told_s = time.time()
    return Measured(to_s, min(0.0, begun_s - asked_s) or max(0.0, ended_s - told_s))


@ray.remote(num_cpus=0, max_retries=0)
def _measure(ports: Mapping[str, int]) -> Any:
    begun_s = time.time()
    own = ray.util.get_node_ip_address()
    return {host: _round_trip_s(host, port) for host, port in ports.items() if host != own}, begun_s, time.time()


def _round_trip_s(host: str, port: int) -> float | None:
    """None as soon as it cannot be reached."""
    least_s = None
    for _ in range(TRIES):
        found = tried(partial(_connected_s, host, port), OSError)
        if isinstance(found, OSError):
            return None
        least_s = min(found, least_s or found)
    return least_s


def _connected_s(host: str, port: int) -> float:
    started_s = time.perf_counter()
    socket.create_connection((host, port), CONNECT_S).close()
    return time.perf_counter() - started_s
