"""Numbers of gateways and engines, those that there are to be and those that are: what Ray and Ray Serve know of them.

Decisions: engines are scaled by the requests that they say they have: Ray Serve sees one line of each gateway and not what it
carries. With `serve.gateways: every_node` the number follows the nodes by itself, as an autoscaling policy that Ray Serve
asks in its controller, so that nothing of ours has to live for it. Nobody tells gateways of each other: each asks Ray Serve how
many there are.
"""

import math
import time
from typing import Any

import ray
from ray import serve

REQUESTS = "requests"  # of an engine, running and waiting
LOOK_S = 1.0  # the controller asks ten times a second
MOST = 10_000


def num_nodes(resources: dict[str, float], address: str | None = None) -> int:
    """Nodes that offer so much, are not being drained, and are at that address; at least 1."""
    from ray._private.state import state

    draining = {node.hex() if isinstance(node, bytes) else str(node) for node in state.get_draining_nodes()}
    return max(1, sum(_offers(node, resources, address) for node in ray.nodes() if node["NodeID"] not in draining))


def _offers(node: dict[str, Any], resources: dict[str, float], address: str | None) -> bool:
    there = node["Alive"] and address in (None, node["NodeManagerAddress"])
    return there and all(node["Resources"].get(name, 0) >= amount for name, amount in resources.items())


class OnePerNode:
    """Ray Serve's autoscaling policy: as many replicas as there are nodes. It travels to the controller by value."""

    def __init__(self, resources: dict[str, float]):
        self._resources, self._asked_s, self._num = resources, -math.inf, 1

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        if time.monotonic() - self._asked_s >= LOOK_S:
            self._asked_s, self._num = time.monotonic(), num_nodes(self._resources)
        return self._num, {}


def as_loaded(context: Any) -> tuple[float, dict[str, Any]]:
    """Ray Serve's autoscaling policy for engines: as many as their requests need, at so many of each. It travels by value."""
    said = context.aggregated_metrics.get(REQUESTS, {})
    if not said:  # by none, yet: as it is
        return context.target_num_replicas, {}
    return sum(said.values()) / context.config.get_target_ongoing_requests(), {}


def scaled(gateways: int | str, resources: dict[str, float]) -> dict[str, Any]:
    """Options of Ray Serve for so many gateways: on each node no more than there must be."""
    nodes = num_nodes(resources)
    if isinstance(gateways, int):
        return {"num_replicas": gateways, "max_replicas_per_node": math.ceil(gateways / nodes)}
    policy = {"policy_function": "serving.nodes:OnePerNode", "policy_kwargs": {"resources": resources}}
    limits = {"min_replicas": 1, "initial_replicas": nodes, "max_replicas": MOST}
    delays = {"upscale_delay_s": 0, "downscale_delay_s": 1}
    return {"max_replicas_per_node": 1, "autoscaling_config": {**limits, **delays, "policy": policy}}


def num_replicas(app: str, deployment: str) -> int:
    """Replicas that run, as Ray Serve sees it. Blocks."""
    found = serve.status().applications.get(app)
    return found.deployments[deployment].replica_states.get("RUNNING", 0) if found else 0  # type: ignore[call-overload]
