"""The shard actor, as others see it. What it does is in shard_server.py.

Decision: whoever looks an actor up imports what it is made from, and those who only control need no torch: none is imported
here.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.dataplane.plane import DataPlane
from actors.names import name_of
from trinity.config import PlacementConfig
from trinity.experts.spec import ShardSpec
from trinity.utils.garbage import uncollected
from trinity.utils.hugepages import ONE_HEAP


class Shard:
    """A process that owns one shard."""

    def __init__(self, spec: ShardSpec, plane: DataPlane, settings: PlacementConfig, namespace: str):
        with uncollected():
            from actors.shard_server import ShardServer

        self.server = ShardServer(spec, plane, settings, namespace)

    def handle(self, verb: str, message: Any) -> Any:
        """Run a verb; -> its packed answer, or the TrinityError it raised."""
        return self.server.handle(verb, message)

    def address(self) -> Any:
        """-> the Address where rows are taken directly."""
        return self.server.address()

    def where(self) -> tuple[str, int]:
        """-> (node id, process id)."""
        return self.server.where()


ShardActor = ray.remote(max_restarts=-1, max_task_retries=0, max_concurrency=8)(Shard)


def start_shard(
    spec: ShardSpec, plane: DataPlane, settings: PlacementConfig, namespace: str, node: str | None = None
) -> Any:
    """-> its handle at once; it may wait for resources. On that node, if it is still there; else on another than the shard
    before it, if there is one. Another call for a shard that is there gives that one."""
    return ShardActor.options(
        name=name_of(settings.pool, spec.name),
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=settings.num_cpus_per_shard,
        num_gpus=settings.num_gpus_per_shard,
        resources=dict(settings.resources),
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True) if node else "SPREAD",
        **_environment(spec, settings),
    ).remote(spec, plane, settings, namespace)


def _environment(spec: ShardSpec, settings: PlacementConfig) -> dict[str, Any]:
    """Variables it must see at its start, if any: a process with an environment of its own starts half a second later, for Ray
    begins it with another one. One thread is what Ray's processes have anyway (clusters/node.env)."""
    threads, heap = settings.num_threads_per_shard, ONE_HEAP if spec.optim is not None else {}
    found = {"OMP_NUM_THREADS": str(threads), **heap} if threads > 1 else heap
    return {"runtime_env": {"env_vars": found}} if found else {}
