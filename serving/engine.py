"""Engines behind the edges: in this process, or replicas of a Ray Serve deployment.

Decisions: a gateway has one line to an engine for all its requests (serving/lines.py). Opening it is Ray Serve's affair, which
chooses a replica that is there; what is asked of it then goes to the replica's actor, whether Serve still sends it anything or
not: requests of one that drains are given up like any others.
"""

import asyncio
import importlib
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import ray
from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException

from serving.addresses import bracketed
from serving.fitting import num_sharing
from serving.frontend import EngineInfo, now_s
from serving.line_end import LineEnd, Message, Order
from serving.lines import Line
from serving.nodes import REQUESTS
from serving.roles import Roles, newest
from serving.routed import RoutedClient, Status
from trinity.config import Config, EngineConfig, ModelConfig, Role
from trinity.engine.numerics import Numerics
from trinity.engine.request import Delta
from trinity.errors import ConfigError, EngineLost, InvalidRequest, Overloaded, TrinityError, Unavailable
from trinity.text.tokenizer import Tokenizer
from trinity.utils.garbage import uncollected
from trinity.utils.hugepages import share_heaps
from trinity.utils.lines import line_of, step_of
from trinity.utils.trying import tried

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from actors.pool import RayPool
    from trinity.engine.adapters import AdapterStore
    from trinity.engine.async_engine import AsyncEngine
    from trinity.engine.engine import Engine
    from trinity.engine.handoff import Prefilled

SERVE = "serve"  # the namespace of Ray Serve's actors
ENDS = dict[str, LineEnd]()  # of the replica that is this process, by the names of their lines
Built = tuple["AsyncEngine", Tokenizer, str] | tuple["AsyncEngine", Tokenizer, str, Numerics]
Factory = Callable[[str, str], Built]
RESET_S = 10.0
NUMERICS = Numerics()


def build_engine(source: str, config_json: str) -> Built:
    """The real engine: a backbone here, its experts in the pool of shards that the config names."""
    with uncollected():
        from actors.sync.kv_tiers import handoff_of
        from trinity.checkpoint import title_of
        from trinity.engine.async_engine import AsyncEngine

    config = Config.model_validate_json(config_json)
    engine, numerics = (_engine_of_run if config.serve.is_of_run else _engine_of_checkpoint)(source, config)
    served = AsyncEngine(engine, handoff_of(config, engine))
    return served, engine.tokenizer, config.serve.served_model_name or title_of(source), numerics


def _engine_of_checkpoint(checkpoint: str, config: Config) -> "tuple[Engine, Numerics]":
    from actors.pool import connect
    from actors.sync.kv_tiers import tier_of
    from trinity.checkpoint import open_checkpoint
    from trinity.engine.defaults import read_defaults
    from trinity.engine.engine import Engine
    from trinity.engine.weights import FixedWeights, fingerprint
    from trinity.models.registry import weight_bytes

    found = open_checkpoint(checkpoint)
    settings = _settled(config, found.config, weights=weight_bytes(found.config, config.engine.weight_dtype)[0])
    pool = connect(config.placement, config.cluster.namespace)
    experts = pool.dispatcher(found.version, config.serve.request_timeout_s)
    model = found.load_model(experts, _device(config), settings.weight_dtype)
    weights = FixedWeights(model, found.version)
    counts = lambda: (experts.num_retries, experts.times.phases)  # noqa: E731
    tree = found.generation if config.serve.generation_config == "checkpoint" else None
    defaults = read_defaults(tree, found.path)
    line = f"{pool.service.identity()}/{fingerprint(weights.model(found.version))}"
    tier = tier_of(config, lambda version: line)
    own = _adapters(config, found.config)
    engine = Engine(weights, found.config, settings, found.tokenizer, counts, defaults, own, tier)
    return engine, _numerics(found.config, config, pool)


def _engine_of_run(run_dir: str, config: Config) -> "tuple[Engine, Numerics]":
    """Over weights that the run commits while it is served."""
    from actors.pool import connect
    from actors.sync.kv_tiers import tier_of
    from actors.sync.live_weights import live_source
    from trinity.engine.engine import Engine

    pool = connect(config.placement, config.cluster.namespace)
    weights, model, tokenizer = live_source(pool, config, run_dir)
    settings, adapters = _settled(config, model), _adapters(config, model)
    tier = tier_of(config, weights.line)
    engine = Engine(weights, model, settings, tokenizer, weights.counts, adapters=adapters, tier=tier)
    return engine, _numerics(model, config, pool)


def _numerics(model: ModelConfig, config: Config, pool: "RayPool") -> Numerics:
    device = max(_device(config), pool.service.spec().device)  # "cuda" where one of the two is
    return Numerics.of(model, config.engine, device, tuple(dict.fromkeys(pool.expert_dtypes)))


def _adapters(config: Config, model: ModelConfig) -> "AdapterStore | None":
    if config.engine.weight_dtype != "auto":  # which knows none
        return None
    from trinity.checkpoint import backbone_adapter
    from trinity.engine.adapters import AdapterStore

    return AdapterStore(partial(backbone_adapter, model=model, device=_device(config)))


def _device(config: Config) -> str:
    return "cuda" if config.engine.num_gpus else "cpu"


def _settled(config: Config, model: ModelConfig, weights: int = 0) -> EngineConfig:
    """The engine's settings, with what nobody chose chosen by this node's memory, beside `weights` bytes still to come."""
    from trinity.engine.memory import settled

    return settled(model, config.engine, model.itemsize, _device(config), num_sharing(config), weights)


def load_factory(path: str) -> Factory:
    """`package.module:function`. Raises ConfigError where there is none."""
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name, None)
    if not callable(found):
        raise ConfigError(f"{path!r} names no engine factory; give `package.module:function`")
    return found


class LocalClient:
    """An AsyncEngine in this process, as an EngineClient. Owns it."""

    def __init__(
        self,
        engine: "AsyncEngine",
        tokenizer: Tokenizer,
        model: str,
        numerics: Numerics = NUMERICS,
        *,
        name: str | None = None,
    ):
        self.engine, self.tokenizer, self.model, self.numerics = engine, tokenizer, model, numerics
        self._id, self._started = name or uuid4().hex, now_s()
        self._role: Role = "both"
        self._roles: Roles | None = None

    async def generate(self, *asked: Any, **begun: Any) -> AsyncGenerator[Delta, None]:
        """Arguments are those that Engines says (serving/continuation.py), here and below."""
        stream: Any = self.engine.generate(*asked, **begun)
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                yield delta

    async def prefill(self, *asked: Any) -> "Prefilled":
        return await self.engine.prefill(*asked)

    async def info(self) -> EngineInfo:
        """Raises Unavailable when the engine has failed."""
        if not self.engine.healthy:
            raise Unavailable("the engine has stopped")
        engine, stats = self.engine, asdict(self.engine.stats())
        about = (self.model, engine.max_model_len, step_of(engine.version), self._id, stats)
        more = (engine.defaults, engine.routed_bytes, engine.moe_layers)
        about_weights = line_of(engine.version), self.numerics
        return EngineInfo(*about, *more, self._started, engine.key_base, self._role, *about_weights)

    async def infos(self) -> list[EngineInfo]:
        return [await self.info()]

    async def status(self, role: Role | None = None, roles: Roles | None = None, since: int | None = None) -> Status:
        """Take up what it is told, unless it knows better; -> what it is like, with an account of its cache where `since`
        names the one before."""
        self._roles = newest(self._roles, roles)
        if role is not None and roles == self._roles:
            self._take(role)
        return Status(await self.info(), None if since is None else self.engine.key_changes(since), self._roles)

    def _take(self, role: Role) -> None:
        """An engine that computes prompts leaves the cores to those that answer."""
        if role != self._role:
            self._role = role
            self.engine.give_way(role == "prefill")

    async def set_roles(self, names: Sequence[Role]) -> None:
        raise InvalidRequest("there is one engine, in the server's own process; it does everything", param="roles")

    async def reset_prefix_cache(self) -> None:
        self.engine.reset_prefix_cache()


def keep_to_node_address() -> None:
    """Have this replica's port for other replicas on the node's own address, loopback in a local cluster: Ray Serve 2.60
    opens it on all interfaces when the constructor is done."""
    if module := sys.modules.get("ray.serve._private.replica"):
        names, here = vars(module), bracketed(ray.util.get_node_ip_address())
        bind = names["add_port_to_grpc_server"]
        names["add_port_to_grpc_server"] = lambda server, address: bind(server, address.replace("[::]", here))


class EngineReplica:
    """Replica of the engine deployment: one engine, its streams in batches. What is called `engine` and `besides` in a call is
    Ray Serve's router's (serving/chosen_replica.py)."""

    def __init__(self, factory: str, checkpoint: str, config_json: str):
        keep_to_node_address()
        share_heaps()
        name = serve.get_replica_context().replica_id.unique_id
        self.client = LocalClient(*load_factory(factory)(checkpoint, config_json), name=name)

    async def line(self, name: str, orders: Sequence[Order], engine: str | None = None) -> AsyncIterator[str | Message]:
        """The actor that hears more orders, then messages until the gateway leaves."""
        ENDS[name] = end = LineEnd(self.client.engine)
        end.follow(orders)
        try:
            yield serve.get_replica_context().replica_id.to_full_id_str()
            async with aclosing(end.messages()) as messages:
                async for message in messages:
                    yield message
        finally:
            del ENDS[name]

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Numbers by which Ray Serve scales (serving/nodes.py): it sees lines, not requests."""
        stats = self.client.engine.stats()
        return {REQUESTS: stats.num_running + stats.num_waiting}

    async def status(self, engine: str | None = None, besides: Collection[str] = (), **told: Any) -> Status:
        return await self.client.status(**told)

    async def reset_prefix_cache(self) -> None:
        await self.client.reset_prefix_cache()

    async def tokenizer(self) -> Tokenizer:
        return self.client.tokenizer

    async def check_health(self) -> None:
        """Ray Serve replaces a replica whose engine has failed."""
        await self.client.info()

    def __del__(self) -> None:
        """Ray Serve calls it after the replica's last request."""
        if hasattr(self, "client"):
            self.client.engine.close()


def heard(replica: object, name: str, orders: Sequence[Order]) -> bool:
    """Have orders followed by the end of that line, in the replica's process; False where there is none."""
    end = ENDS.get(name)
    if end is not None:
        end.tell(orders)
    return end is not None


class RayWire:
    """Way from a gateway to the replica of that name, or to another one where it is gone."""

    def __init__(self, streams: "DeploymentHandle[Any]", engine: str | None):
        self._streams, self._engine, self._name = streams, engine, uuid4().hex
        self._actor_name = ""
        self._actor: Any = None

    async def opened(self, orders: list[Order]) -> AsyncGenerator[Message, None]:
        response = self._streams.line.remote(self._name, orders, engine=self._engine)
        try:
            while True:
                with errors_of_replicas():
                    message = await anext(response, None)
                if message is None:
                    return
                if isinstance(message, str):
                    self._actor_name, message = message, []
                yield message
        finally:
            response.cancel()

    async def tell(self, orders: list[Order]) -> None:
        if self._actor is None:
            self._actor = await asyncio.to_thread(tried, partial(ray.get_actor, self._actor_name, SERVE), ValueError)
        if isinstance(self._actor, ValueError):
            raise EngineLost("its process is gone")
        with errors_of_replicas():
            if not await self._actor.__ray_call__.remote(heard, self._name, orders):
                raise EngineLost("it has no such line any more")


class RayClient:
    """Replicas behind a DeploymentHandle, as a Fleet."""

    def __init__(self, handle: "DeploymentHandle[Any]"):
        # By value: over the gRPC between replicas instead of actor calls, twice as many messages (docs/serving.md).
        self._calls, self._streams = handle, handle.options(stream=True, _by_reference=False)
        self._lines = dict[str | None, Line]()

    def generate(self, engine: str | None, *asked: Any, **more: Any) -> AsyncGenerator[Delta, None]:
        """Deltas from that engine, or from another one where it is gone."""
        return self._line(engine).call("generate", *asked, **more)

    async def prefill(self, engine: str, *asked: Any) -> "Prefilled":
        async with aclosing(self._line(engine).call("prefill", *asked)) as found:
            return await anext(found)

    def _line(self, engine: str | None) -> Line:
        if (line := self._lines.get(engine)) is None or line.is_over:
            self._lines = {name: each for name, each in self._lines.items() if not each.is_over}
            self._lines[engine] = line = Line(RayWire(self._streams, engine))
        return line

    async def status(self, engine: str | None, besides: Collection[str], **told: Any) -> Status:
        with errors_of_replicas():
            return await self._calls.status.remote(engine=engine, besides=besides, **told)

    async def reset_prefix_cache(self) -> None:
        """Have every replica do it. Raises Unavailable where one does not say that it has."""
        try:
            await self._calls.broadcast("reset_prefix_cache").results_async(timeout_s=RESET_S)
        except (RayTaskError, RayServeException, RayActorError, TimeoutError):
            raise Unavailable("not every engine has answered; ask again") from None

    async def tokenizer(self) -> Tokenizer:
        return await self._calls.tokenizer.remote()


@contextmanager
def errors_of_replicas() -> Iterator[None]:
    """Make Ray's errors ours."""
    try:
        yield
    except (RayActorError, AioRpcError) as error:
        raise EngineLost(f"its process is gone: {type(error).__name__}") from None
    except (RayTaskError, RayServeException, TaskCancelledError) as error:
        raise typed(error) from None


def typed(error: Exception) -> Exception:
    """The error a replica raised, out of Ray's wrapping; Serve's own become Overloaded and Unavailable."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, TrinityError):
        return cause
    if isinstance(error, BackPressureError):
        return Overloaded("every engine's queue is full; try again later")
    if isinstance(error, TaskCancelledError):
        return EngineLost("its process has given the request up")
    if isinstance(error, RayServeException | RayActorError) or isinstance(cause, RayActorError):
        return Unavailable("no engine is there right now; send the request again")
    return error


async def connect_client(
    handle: "DeploymentHandle[Any]", timeout_s: float, settings: EngineConfig
) -> tuple[RoutedClient, Tokenizer, EngineInfo]:
    """Wait until a replica answers."""
    fleet = RayClient(handle)
    client = RoutedClient(fleet, settings)
    async with asyncio.timeout(timeout_s):
        tokenizer = await fleet.tokenizer()
        return client, tokenizer, await client.first()
