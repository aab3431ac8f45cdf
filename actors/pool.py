"""Making, finding and ending a pool of shard actors.

Names: `trinity/<pool>/placement` and `trinity/<pool>/<shard>`, detached, in one namespace: trainers and servers of any
driver find the same actors. Shards sit in a placement group, spread over nodes.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.control.service import PlacementActor
from actors.control.state import PoolSpec
from actors.dataplane.client import DirectTransport
from actors.dataplane.connection import Address
from actors.dataplane.ray_transport import RayTransport
from actors.names import PLACEMENT, Handles, ask, find, name_of
from actors.shard import DataPlane, start_shard
from actors.sync import shm_state
from actors.sync.placement_watcher import PlacementWatcher
from trinity.config import ModelConfig, OptimConfig, PlacementConfig
from trinity.dispatch.transport import Transport
from trinity.errors import ConfigError, DeadlineExceeded, Unavailable, VersionGone
from trinity.placement.table import PlacementTable
from trinity.pool.local import shard_names, shard_specs
from trinity.pool.pool import Decision, ExpertPool, StepTicket
from trinity.rpc.messages import Load
from trinity.state.versioned_store import Version

log = logging.getLogger(__name__)
T = TypeVar("T")
PAUSE_S = 0.2
HEAD = "node:__internal_head__"


class RayPool(ExpertPool):
    """An ExpertPool over shard actors; remembers with the placement service what a restarted shard loads."""

    def __init__(self, settings: PlacementConfig, namespace: str, table: PlacementTable):
        self.name, self.namespace, self.is_direct = settings.pool, namespace, settings.transport == "direct"
        self.shards = Handles(self.name, namespace)
        self.backbone_at: list[tuple[str, str]] = []  # (node, folder) where a training job keeps its backbone
        self._service: Any = None
        view = PlacementWatcher(self.name, namespace, table, self.shards)
        timeouts = (settings.call_timeout_s, settings.checkpoint_timeout_s)
        super().__init__(view, RayTransport(self.shards, *timeouts), *timeouts, settings.attempt_timeout_s)

    def rows_transport(self) -> Transport:
        """Sockets of its own for each caller, unless rows are to travel through Ray."""
        return DirectTransport(self.transport, self._locate, self._ask("secret")) if self.is_direct else self.transport

    def _locate(self, shard: str, deadline_s: float) -> Address:
        """Asks the shard itself: while it starts again, this waits."""
        return ask(self.shards[shard].address.remote(), max(0.0, deadline_s - time.time()), f"shard {shard}")

    def load(self, message: Load) -> int:
        self.set_source(message)
        return super().load(message)

    def set_source(self, message: Load) -> None:
        self._ask("set_source", message)

    def begin_attempt(self, version: int, num_updates: int) -> StepTicket:
        return self._ask("begin_attempt", version, num_updates, timeout_s=self.checkpoint_timeout_s)

    def begin(self, version: int, notes: Mapping[str, Any]) -> None:
        self._ask("begin", version, {**notes, "backbone": self.backbone_at})

    def decide(self, step: int, attempt: int, notes: Mapping[str, Any]) -> None:
        """Asks until it has an answer: an error does not mean that it is not decided."""
        until_s = time.monotonic() + self.checkpoint_timeout_s
        while True:
            try:
                return self._ask("decide", step, attempt, {**notes, "backbone": self.backbone_at})
            except (Unavailable, DeadlineExceeded):
                if time.monotonic() > until_s:
                    raise
            time.sleep(PAUSE_S)

    def decided(self) -> Decision | None:
        return self._ask("decided")

    def backbone(self, version: int, suffix: str = "") -> Version:
        decision = self.decided()
        places = decision.notes["backbone"] if decision is not None else []
        for node, folder in places:
            try:
                return shm_state.fetched(node, folder, version, suffix, self.timeout_s)
            except (VersionGone, Unavailable, DeadlineExceeded) as error:
                log.warning("the backbone of version %d is not on node %s: %s", version, node[:8], error)
        raise VersionGone(f"the backbone of version {version} is on none of {len(places)} nodes")

    def pin(self, version: int | None, holder: str, lease_s: float) -> int:
        """Keep a version (None: the one that is served) for `holder` until the lease ends; -> the version."""
        return self._ask("pin", version, holder, lease_s)

    def unpin(self, holder: str) -> None:
        self._ask("unpin", holder)

    def source(self) -> Load | None:
        return self._ask("source")

    def spec(self) -> PoolSpec:
        return self._ask("spec")

    def _ask(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """Through a handle that is kept: steps go on while Ray's head, which knows the names, is away."""
        self._service = self._service or find(self.name, PLACEMENT, self.namespace)
        try:
            asked = getattr(self._service, method).remote(*arguments)
            return ask(asked, timeout_s or self.timeout_s, "the placement service")
        except Unavailable:
            self._service = None  # another pool may have the name now
            raise


def provide(
    settings: PlacementConfig, namespace: str, model: ModelConfig, optim: OptimConfig | None, state_dir: str
) -> RayPool:
    """The pool of that name, made if there is none. Raises ConfigError where it is another than what is wanted."""
    if not exists(settings.pool, namespace):
        return create(settings, namespace, model, optim, state_dir)
    pool = connect(settings, namespace)
    wanted = PoolSpec(model, optim, settings.num_shards, device_of(settings))
    if (found := pool.spec()) != wanted:
        differs = [
            name for name in ("model", "optim", "num_shards", "device") if getattr(found, name) != getattr(wanted, name)
        ]
        raise ConfigError(
            f"pool {settings.pool!r} exists with another {' and '.join(differs)}; use another --placement.pool, "
            f"or end it with `trinity placement rm {settings.pool}`"
        )
    return pool


def create(
    settings: PlacementConfig, namespace: str, model: ModelConfig, optim: OptimConfig | None, state_dir: str
) -> RayPool:
    """Start the placement service and the shards, wait until all answer, publish the table's epoch.

    The shards hold no weights until `load`. Raises Unavailable saying which resources are missing; nothing is left then.
    """
    try:
        return _create(settings, namespace, PoolSpec(model, optim, settings.num_shards, device_of(settings)), state_dir)
    except Exception:
        destroy(settings.pool, namespace, settings.memory_dir)
        raise


def _create(settings: PlacementConfig, namespace: str, spec: PoolSpec, state_dir: str) -> RayPool:
    service = PlacementActor.options(
        name=name_of(settings.pool, PLACEMENT),
        namespace=namespace,
        lifetime="detached",
        resources={HEAD: 0.001},  # its files are there
    ).remote(state_dir, spec, settings, namespace)
    epoch = ask(service.epoch.remote(), settings.call_timeout_s, "the placement service")
    names = shard_names(settings.num_shards)
    table = PlacementTable.spread(spec.model.moe_layers, spec.model.num_experts, names, epoch + 1)
    group = _reserve(settings)
    plane = DataPlane(_data_host(settings), ray.get(service.secret.remote()), settings.num_threads_per_shard)
    shards = shard_specs(table, spec.model, spec.optim, settings, spec.device)
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=at) for at in range(len(shards))]
    actors = [start_shard(spec, plane, settings, namespace, at) for spec, at in zip(shards, places, strict=True)]
    _wait(lambda t: ray.get([a.where.remote() for a in actors], timeout=t), settings, f"{len(actors)} shards")
    ask(service.publish.remote(table), settings.call_timeout_s, "the placement service")
    ask(service.supervise.remote(plane.host), settings.call_timeout_s, "the placement service")
    log.info("pool %s: %d shards ready on %s, epoch %d", settings.pool, len(actors), spec.device, table.epoch)
    return RayPool(settings, namespace, table)


def connect(settings: PlacementConfig, namespace: str) -> RayPool:
    """The pool of that name in the cluster this process has joined. Raises Unavailable when there is none."""
    service = find(settings.pool, PLACEMENT, namespace)
    table = ask(service.current.remote(), settings.call_timeout_s, "the placement service")
    if table is None:
        raise Unavailable(f"pool {settings.pool!r} has no placement yet; is it still starting?")
    return RayPool(settings, namespace, table)


def names(namespace: str) -> list[str]:
    """The pools of this cluster."""
    parts = [entry["name"].split("/") for entry in _actors(namespace)]
    return sorted({part[1] for part in parts if len(part) == 3 and part[0] == "trinity"})


def exists(pool: str, namespace: str) -> bool:
    return pool in names(namespace)


def destroy(pool: str, namespace: str, memory_dir: str | None = None) -> None:
    """End every actor of the pool and give its resources back. Harmless when there is nothing."""
    prefix = name_of(pool, "")
    for entry in _actors(namespace):
        if entry["name"].startswith(prefix):
            ray.kill(ray.get_actor(entry["name"], namespace=namespace))
    shm_state.remove(pool, namespace, memory_dir)
    try:
        remove_placement_group(get_placement_group(prefix))
    except ValueError:
        log.info("pool %s had no placement group in this namespace", pool)


def device_of(settings: PlacementConfig) -> str:
    if settings.device != "auto":
        return settings.device
    return "cuda" if settings.num_gpus_per_shard else "cpu"


def _data_host(settings: PlacementConfig) -> str:
    """Loopback unless told otherwise; across nodes it must be told."""
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    if num_nodes > 1 and settings.transport == "direct" and settings.data_host == "127.0.0.1":
        raise ConfigError(f"{num_nodes} nodes reach shards over the network: set --placement.data_host node")
    return settings.data_host


def _actors(namespace: str) -> list[dict[str, str]]:
    return [entry for entry in ray.util.list_named_actors(all_namespaces=True) if entry["namespace"] == namespace]


def _reserve(settings: PlacementConfig) -> Any:
    """A bundle for each shard, on as many nodes as there are."""
    bundle = {"CPU": max(settings.num_cpus_per_shard, 0.01), **settings.resources}  # Ray refuses an empty bundle
    if settings.num_gpus_per_shard:
        bundle["GPU"] = settings.num_gpus_per_shard
    group = placement_group(
        [bundle] * settings.num_shards, strategy="SPREAD", lifetime="detached", name=name_of(settings.pool, "")
    )
    _wait(lambda t: ray.get(group.ready(), timeout=t), settings, f"{settings.num_shards} x {bundle}")
    return group


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
