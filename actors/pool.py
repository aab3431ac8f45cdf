"""Making, finding and ending a pool of shard actors.

Names: `trinity/<pool>/placement` and `trinity/<pool>/<shard>`, detached, in one namespace: trainers and servers of any
driver find the same actors. Shards sit in a placement group, spread over nodes.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.placement import PlacementActor
from actors.shard import ShardActor
from actors.transport import RayTransport
from trinity.config import ModelConfig, OptimConfig, PlacementConfig
from trinity.errors import Unavailable
from trinity.experts.shard import ShardSpec
from trinity.messages import Load
from trinity.placement.table import PlacementTable
from trinity.pool import ExpertPool, shard_names, shard_specs

log = logging.getLogger(__name__)
T = TypeVar("T")


class RayPool(ExpertPool):
    """An ExpertPool over shard actors; remembers with the placement service what a restarted shard loads."""

    def __init__(self, name: str, namespace: str, table: PlacementTable, timeout_s: float):
        self.name, self.namespace = name, namespace
        self.shards = {shard: _actor(name, shard, namespace) for shard in table.shards}
        super().__init__(table, RayTransport(self.shards, timeout_s), timeout_s)

    def load(self, message: Load) -> int:
        self.set_source(message)
        return super().load(message)

    def set_source(self, message: Load) -> None:
        ray.get(_actor(self.name, "placement", self.namespace).set_source.remote(message))


def create(
    settings: PlacementConfig, namespace: str, model: ModelConfig, optim: OptimConfig | None, state_dir: str
) -> RayPool:
    """Start the placement service and the shards (or find those of the same name), wait until all answer, publish epoch.

    The shards hold no weights until `load`. Raises Unavailable saying which resources are missing.
    """
    service = PlacementActor.options(
        name=_name(settings.pool, "placement"), namespace=namespace, lifetime="detached", get_if_exists=True
    ).remote(state_dir)
    epoch = ray.get(service.epoch.remote())
    table = PlacementTable.spread(model.moe_layers, model.num_experts, shard_names(settings.num_shards), epoch + 1)
    device = _device(settings)
    group = _reserve(settings)
    specs = shard_specs(table, model, optim, settings, device)
    actors = [_start(spec, at, group, settings, namespace) for at, spec in enumerate(specs)]
    _wait(lambda t: ray.get([a.where.remote() for a in actors], timeout=t), settings, f"{len(actors)} shards")
    ray.get(service.publish.remote(table))
    log.info("pool %s: %d shards ready on %s, epoch %d", settings.pool, len(actors), device, table.epoch)
    return RayPool(settings.pool, namespace, table, settings.call_timeout_s)


def connect(pool: str, namespace: str, timeout_s: float = 120.0) -> RayPool:
    """The pool of that name in the cluster this process has joined. Raises Unavailable when there is none."""
    table = ray.get(_actor(pool, "placement", namespace).current.remote())
    if table is None:
        raise Unavailable(f"pool {pool!r} has no placement yet; is it still starting?")
    return RayPool(pool, namespace, table, timeout_s)


def exists(pool: str, namespace: str) -> bool:
    return {"name": _name(pool, "placement"), "namespace": namespace} in ray.util.list_named_actors(all_namespaces=True)


def destroy(pool: str, namespace: str) -> None:
    """End every actor of the pool and give its resources back."""
    prefix = _name(pool, "")
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == namespace and entry["name"].startswith(prefix):
            ray.kill(ray.get_actor(entry["name"], namespace=namespace))
    try:
        remove_placement_group(get_placement_group(prefix))
    except ValueError:
        log.info("pool %s had no placement group in this namespace", pool)


def _name(pool: str, what: str) -> str:
    return f"trinity/{pool}/{what}"


def _actor(pool: str, what: str, namespace: str) -> Any:
    try:
        return ray.get_actor(_name(pool, what), namespace=namespace)
    except ValueError:
        raise Unavailable(
            f"there is no {_name(pool, what)!r} in namespace {namespace!r}; start the pool first"
        ) from None


def _device(settings: PlacementConfig) -> str:
    if settings.device != "auto":
        return settings.device
    return "cuda" if settings.num_gpus_per_shard else "cpu"


def _reserve(settings: PlacementConfig) -> Any:
    """A bundle for each shard, on as many nodes as there are."""
    bundle = {"CPU": max(settings.num_cpus_per_shard, 0.01)}  # Ray refuses an empty bundle
    if settings.num_gpus_per_shard:
        bundle["GPU"] = settings.num_gpus_per_shard
    group = placement_group(
        [bundle] * settings.num_shards, strategy="SPREAD", lifetime="detached", name=_name(settings.pool, "")
    )
    _wait(lambda t: ray.get(group.ready(), timeout=t), settings, f"{settings.num_shards} x {bundle}")
    return group


def _start(spec: ShardSpec, at: int, group: Any, settings: PlacementConfig, namespace: str) -> Any:
    placement = _name(settings.pool, "placement")
    return ShardActor.options(
        name=_name(settings.pool, spec.name),
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=settings.num_cpus_per_shard,
        num_gpus=settings.num_gpus_per_shard,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=at),
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(settings.num_threads_per_shard)}},
    ).remote(spec, settings.num_threads_per_shard, placement, namespace)


def _wait(get: Callable[[float], T], settings: PlacementConfig, what: str) -> T:
    started = time.monotonic()
    try:
        return get(settings.ready_timeout_s)
    except GetTimeoutError:
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU", "memory")}
        raise Unavailable(
            f"{what} not ready after {time.monotonic() - started:.0f} s; free in the cluster: {free}. "
            "Use fewer shards, a larger cluster or a longer placement.ready_timeout_s"
        ) from None
