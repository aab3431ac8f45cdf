"""Making, finding and ending a pool of shard actors.

Names: `trinity/<pool>/placement` and `trinity/<pool>/<shard>`, detached, in one namespace: trainers and servers of any
driver find the same actors. Shards are spread over nodes. No placement group holds their places: a shard that moved to another
node would leave its own reserved.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import ray

from actors.control.service import placement_actor
from actors.control.state import PoolSpec
from actors.dataplane.client import DirectTransport
from actors.dataplane.plane import DataPlane
from actors.dataplane.ray_transport import Locator, RayTransport
from actors.names import PLACEMENT, SERVICE, Handles, PlacementClient, ask, name_of
from actors.shard import start_shard
from actors.sync import shm_folders, shm_state
from actors.sync.placement_watcher import PlacementWatcher
from trinity.config import ModelConfig, OptimConfig, PlacementConfig
from trinity.dispatch.transport import Transport
from trinity.errors import ConfigError, DeadlineExceeded, TrinityError, Unavailable
from trinity.placement.table import PlacementTable
from trinity.pool.ledger import Decision, StepTicket
from trinity.pool.local import shard_names, shard_specs
from trinity.pool.memory import bytes_by_form
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Load
from trinity.state.versioned_store import Version
from trinity.utils.trying import retrying, tried

log = logging.getLogger(__name__)
HEAD = "node:__internal_head__"
ASK_S = 30.0
GONE_S = 10.0  # until actors that were ended have no names any more


class RayPool(ExpertPool):
    """An ExpertPool made of parts that reach over Ray: the placement service tells of tables and remembers steps; control goes
    through actor calls, rows through sockets of their own unless they are to travel through Ray."""

    ledger: "RayLedger"

    def __init__(self, settings: PlacementConfig, namespace: str, table: PlacementTable):
        self.name, self.namespace = settings.pool, namespace
        self.shards = Handles(self.name, namespace)
        self.service = PlacementClient(self.name, namespace, settings.call_timeout_s)
        timeouts = (settings.call_timeout_s, settings.checkpoint_timeout_s)
        super().__init__(
            PlacementWatcher(self.name, namespace, table, self.shards, wants_distances=settings.near_rows > 0),
            RayTransport(self.shards, *timeouts),
            *timeouts,
            settings.attempt_timeout_s,
            near_rows=settings.near_rows,
            ledger=RayLedger(self.service, settings.checkpoint_timeout_s),
            rows_over=self._direct if settings.transport == "direct" else lambda transport: transport,
        )

    @property
    def expert_dtypes(self) -> Sequence[str]:
        return self.service.spec().expert_dtype

    def _direct(self, transport: Transport) -> Transport:
        return DirectTransport(transport, Locator(self.shards), self.service.secret())


class RayLedger:
    """A StepLedger: the placement service remembers."""

    def __init__(self, service: PlacementClient, long_timeout_s: float):
        self.service, self.long_timeout_s = service, long_timeout_s
        self.backbone_at: list[tuple[str, str]] = []  # (node, folder) where a training job keeps its backbone

    def new_line(self) -> int:
        return self.service.ask("new_line")

    def set_source(self, message: Load) -> None:
        self.service.ask("set_source", message)

    def begin_attempt(self, version: int, num_updates: int) -> StepTicket:
        return self.service.ask("begin_attempt", version, num_updates, timeout_s=self.long_timeout_s)

    def begin(self, version: int, notes: Mapping[str, Any]) -> None:
        self.service.ask("begin", version, self._noted(notes))

    def decide(self, step: int, attempt: int, notes: Mapping[str, Any]) -> None:
        """Asks until it has an answer: an error does not mean that it is not decided."""
        decide = partial(self.service.ask, "decide", step, attempt, self._noted(notes))
        retrying(decide, time.monotonic() + self.long_timeout_s, (Unavailable, DeadlineExceeded))

    def _noted(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        return {**notes, "backbone": self.backbone_at}

    def approve(self, version: int) -> None:
        self.service.ask("approve", version)

    def decided(self) -> Decision | None:
        return self.service.ask("decided")

    def backbone(self, version: int, suffix: str = "") -> Version:
        decision = self.decided()
        places = decision.notes["backbone"] if decision is not None else []

        def fetched(node: str, folder: str) -> Version:
            return shm_state.fetched(node, folder, version, suffix, self.service.timeout_s)

        return shm_state.from_any(places, version, fetched)


def provide(
    settings: PlacementConfig, namespace: str, model: ModelConfig, optim: OptimConfig | None, state_dir: str
) -> RayPool:
    """The pool of that name, made if there is none. Raises ConfigError where it is another than what is wanted."""
    if not exists(settings.pool, namespace):
        return create(settings, namespace, model, optim, state_dir)
    pool = connect(settings.model_copy(update={"expert_dtype": ()}), namespace)  # all that differs is named together
    wanted = _spec(settings, model, optim)
    if (found := pool.service.spec()) != wanted:
        names = ("model", "optim", "num_shards", "device", "expert_dtype")
        differs = [name for name in names if getattr(found, name) != getattr(wanted, name)]
        raise ConfigError(
            f"pool {settings.pool!r} exists with another {' and '.join(differs)}; use another --placement.pool, "
            f"or end it with `trinity placement rm {settings.pool}`"
        )
    return pool


def create(
    settings: PlacementConfig,
    namespace: str,
    model: ModelConfig,
    optim: OptimConfig | None,
    state_dir: str | None,
    ends_with_server: bool = False,
) -> RayPool:
    """Start the placement service and the shards, wait until all answer, publish the table's epoch.

    The shards hold no weights until `load`. Raises Unavailable saying which resources are missing; nothing is left then.
    """
    with ExitStack() as undo:
        undo.callback(destroy, settings.pool, namespace, settings.memory_dir)
        spec = _spec(settings, model, optim, ends_with_server)
        made = _create(settings, namespace, spec, state_dir)
        undo.pop_all()
    return made


def _create(settings: PlacementConfig, namespace: str, spec: PoolSpec, state_dir: str | None) -> RayPool:
    actor = placement_actor(settings).options(
        name=name_of(settings.pool, PLACEMENT),
        namespace=namespace,
        lifetime="detached",
        resources={HEAD: 0.001},  # its files are there
    )
    service = actor.remote(state_dir, spec, settings, namespace)
    epoch = ask(service.epoch.remote(), settings.call_timeout_s, SERVICE)
    names = shard_names(settings.num_shards)
    table = PlacementTable.spread(spec.model.moe_layers, spec.model.num_experts, names, epoch + 1)
    plane = DataPlane.of(settings, _data_host(settings), ray.get(service.secret.remote()))
    shards = shard_specs(table, spec.model, spec.optim, settings, spec.device)
    actors = [start_shard(spec, plane, settings, namespace) for spec in shards]
    _wait([actor.where.remote() for actor in actors], settings)
    ask(service.publish.remote(table), settings.call_timeout_s, SERVICE)
    ask(service.supervise.remote(plane.host), settings.call_timeout_s, SERVICE)
    log.info("pool %s: %d shards ready on %s, epoch %d", settings.pool, len(actors), spec.device, table.epoch)
    return RayPool(settings, namespace, table)


def connect(settings: PlacementConfig, namespace: str) -> RayPool:
    """The pool of that name in the cluster this process has joined. Raises Unavailable when there is none, and ConfigError
    where its experts are of another form than is asked for."""
    table = PlacementClient(settings.pool, namespace, settings.call_timeout_s).ask("current")
    if table is None:
        raise Unavailable(f"pool {settings.pool!r} has no placement yet; is it still starting?")
    pool = RayPool(settings, namespace, table)
    if settings.expert_dtype and (found := pool.service.spec().expert_dtype) != settings.expert_dtype:
        raise ConfigError(
            f"pool {settings.pool!r} computes experts as {', '.join(found)}, placement.expert_dtype is "
            f"{', '.join(settings.expert_dtype)}; leave it out, or make the pool with it"
        )
    return pool


def names(namespace: str) -> list[str]:
    """The pools of this cluster."""
    parts = [entry["name"].split("/") for entry in _actors(namespace)]
    return sorted({part[1] for part in parts if len(part) == 3 and part[0] == "trinity"})


def exists(pool: str, namespace: str) -> bool:
    return pool in names(namespace)


def of_server(namespace: str) -> list[str]:
    """The pools that were made for the server of this cluster, and end with it."""
    found = {name: tried(PlacementClient(name, namespace, ASK_S).spec, TrinityError) for name in names(namespace)}
    for name, spec in found.items():
        if isinstance(spec, TrinityError):  # `trinity placement rm` ends it
            log.warning("pool %s is left alone: %s", name, spec)
    return [name for name, spec in found.items() if not isinstance(spec, TrinityError) and spec.ends_with_server]


def destroy(pool: str, namespace: str, memory_dir: str | None = None) -> None:
    """End every actor of the pool and give its resources back; then another of its name may be made. Harmless when there is
    nothing."""
    for name in _names_of(pool, namespace):
        ray.kill(ray.get_actor(name, namespace=namespace))
    left = tried(lambda: retrying(partial(_require_none, pool, namespace), time.monotonic() + GONE_S), Unavailable)
    if left is not None:
        log.warning("%s", left)
    shm_folders.remove(pool, namespace, memory_dir)


def _require_none(pool: str, namespace: str) -> None:
    if left := _names_of(pool, namespace):
        raise Unavailable(f"pool {pool!r} is being ended; there still are {', '.join(left)}")


def _names_of(pool: str, namespace: str) -> list[str]:
    return [entry["name"] for entry in _actors(namespace) if entry["name"].startswith(name_of(pool, ""))]


def _spec(
    settings: PlacementConfig, model: ModelConfig, optim: OptimConfig | None, ends_with_server: bool = False
) -> PoolSpec:
    expert_dtype = settings.expert_dtype or (model.dtype,)
    num_bytes = bytes_by_form(model, optim, expert_dtype)
    return PoolSpec(model, optim, settings.num_shards, device_of(settings), num_bytes, expert_dtype, ends_with_server)


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


def _wait(refs: list[Any], settings: PlacementConfig) -> None:
    """Wait for the shards to say where they are. Raises what any of them does, and Unavailable when the time is up."""
    started_s = time.monotonic()
    _, left = ray.wait(refs, num_returns=len(refs), timeout=settings.ready_timeout_s)
    if left:
        wanted = {"CPU": settings.num_cpus_per_shard, "GPU": settings.num_gpus_per_shard, **settings.resources}
        free = {name: amount for name, amount in ray.available_resources().items() if name in wanted}
        since_s = time.monotonic() - started_s
        raise Unavailable(
            f"{len(left)} of {len(refs)} shards, which take {wanted} each, not ready after {since_s:.0f} s; "
            f"free in the cluster: {free}. Use fewer shards, a larger cluster or a longer placement.ready_timeout_s"
        )
    ray.get(refs)
