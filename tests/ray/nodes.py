"""A further node of the Ray that a test has joined: processes of its own on this machine."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests.waiting import until


@contextmanager
def another_node(ray, env: Mapping[str, str], **resources: float) -> Iterator[str]:
    """-> its id, in the cluster as long as the block lasts. Its processes have these variables besides."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    params = RayParams(
        gcs_address=ray.get_runtime_context().gcs_address, num_cpus=1, num_gpus=0, resources=resources, env_vars={**env},
        object_store_memory=80 << 20, min_worker_port=0, max_worker_port=0, node_manager_port=0, include_log_monitor=False,
    )  # fmt: skip
    node = Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)
    try:
        until(lambda: is_alive(ray, node.node_id))
        yield node.node_id
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
        until(lambda: not is_alive(ray, node.node_id))


def is_alive(ray, node_id):
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())
