"""Round trips between the nodes of a cluster, as a token pays them; how far their clocks are apart; what each computes with.

Decision: a round trip is what it takes to open a TCP connection to a node's own Ray process, the least of several: the kernels'
and the network's time alone, and nothing has to listen for it.
"""

import importlib
import socket
import time
from collections.abc import Mapping, Sequence
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
    beyond what the time that the question took would explain. `computes`: its kernels and formats, in words."""

    to_s: Mapping[str, float | None]
    ahead_s: float
    computes: str = ""


def measured() -> dict[str, Measured | TrinityError]:
    """Measurements of each node of the cluster that this process has joined, by its address; of several at one address by that
    and the beginning of the node's id."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    ports = {node["NodeManagerAddress"]: node["NodeManagerPort"] for node in nodes}
    with ThreadPoolExecutor(len(nodes)) as threads:
        asked = {
            _name(node, nodes): threads.submit(tried, partial(_asked, node["NodeID"], ports), TrinityError, RayError)
            for node in nodes
        }
        found = {name: answer.result() for name, answer in asked.items()}
    return {
        name: Unavailable(f"{name}: {each}") if isinstance(each, RayError) else each for name, each in found.items()
    }


def _name(node: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> str:
    host = str(node["NodeManagerAddress"])
    is_alone = sum(other["NodeManagerAddress"] == host for other in nodes) == 1
    return host if is_alone else f"{host} {node['NodeID'][:12]}"


def _asked(node: str, ports: Mapping[str, int]) -> Measured:
    asked_s = time.time()
    to_s, begun_s, ended_s, computes = ask(on_node(_measure, node).remote(ports), NODE_S, f"node {node[:12]}")
    told_s = time.time()
    return Measured(to_s, min(0.0, begun_s - asked_s) or max(0.0, ended_s - told_s), computes)


@ray.remote(num_cpus=0, max_retries=0)
def _measure(ports: Mapping[str, int]) -> Any:
    begun_s = time.time()
    own = ray.util.get_node_ip_address()
    to_s = {host: _round_trip_s(host, port) for host, port in ports.items() if host != own}
    return to_s, begun_s, time.time(), _computes()


def _computes() -> str:
    """Kernels and formats of this node's processes, and why they are Python's where they are."""
    native: Any = tried(partial(importlib.import_module, "trinity.native"), TrinityError)
    if isinstance(native, TrinityError):  # an extension of other sources
        return native.message
    said = native.described()
    return said["computes"] if native.lib else f"{said['computes']}; the extension is {said['extension']}"


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
