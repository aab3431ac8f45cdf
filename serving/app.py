"""The Ray Serve application: engine replicas behind gateways.

Decisions: the gateway's replica opens HTTP and gRPC itself, so that bind address, TLS, key, limits and the order of
draining are ours; Ray Serve starts, checks, scales and replaces the processes, and its own proxies stay off
(measurements: docs/serving.md). One gateway runs on the node that started it: a loopback address means that machine. Several
are replicas of one deployment: they tell each other nothing, and one that comes later is like the first. On one machine they
take neighbouring ports.
"""

import asyncio
import functools
import json
import logging
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException

from actors.names import PlacementClient
from serving.addresses import Door
from serving.engine import EngineReplica, connect_client, keep_to_node_address, load_factory
from serving.frontend import Frontend
from serving.gateway import Gateway
from serving.nodes import num_nodes, num_replicas, scaled
from serving.pins import STARTING, Pins
from serving.pool_operator import Operator
from serving.removal import remove
from trinity.config import NODE, Config, EngineConfig, PlacementConfig, ServeConfig, differences, setup_grpc
from trinity.errors import ConfigError, Unavailable, VersionGone
from trinity.utils.hugepages import FLAT_HEAP
from trinity.utils.origins import LOOPBACK
from trinity.utils.trying import tried

log = logging.getLogger("trinity.serving")
APP, GATEWAY = "trinity", "Gateway"
FACTORY = "serving.engine:build_engine"
READY, DRAINING = "ready", "draining"
SPARE_CALLS = 64  # health probes beside a full house of requests
SPARE_S = 10.0  # for closing, after the last request
OPENED_S, LOOK_S = 30.0, 0.05  # for gateways that run to answer
COUNT_S = 2.0
AWAY = (RayServeException, RayError, TimeoutError)
QUIET = {"enable_access_log": False}


@dataclass(frozen=True)
class About:
    """Facts that a gateway tells a command which did not start it."""

    source: str
    model: str
    door: Door
    namespace: str
    stop_timeout_s: float
    state: str  # READY, DRAINING, or what else it is


class GatewayReplica:
    """The ingress deployment: a Gateway in Serve's event loop. `settings_json` is what `settings_of` says of it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engines: Any, settings_json: str, ready_timeout_s: float, placement_json: str | None
    ):
        keep_to_node_address()
        setup_grpc()
        self.settings = json.loads(settings_json)
        self.namespace = self.settings["cluster"]["namespace"]
        self.node = ray.util.get_node_ip_address()
        config = at_node(ServeConfig.model_validate(self.settings["serve"]), self.node)
        own = EngineConfig.model_validate(self.settings["engine"])
        client, tokenizer, info = await connect_client(engines, ready_timeout_s, own)
        operator = functools.partial(find_operator, placement_json, self.namespace) if placement_json else None
        pins = Pins(placement(placement_json, self.namespace).tell) if placement_json and config.is_of_run else None
        self.gateway = Gateway(Frontend(client, tokenizer, info, config, operator, self.settings["SOURCE"], pins))
        fixed = config.gateways if isinstance(config.gateways, int) else None
        num_places = fixed or num_nodes({}, self.node)
        await self.gateway.start(num_places)
        self.gateway.front.admission.num_gateways = fixed or num_nodes(config.gateway_resources)  # until it has asked
        self.counting = asyncio.create_task(self._count()) if config.gateways != 1 else None

    async def _count(self) -> None:
        """Have the gateways that are there share the limits, for ever."""
        while True:
            await asyncio.sleep(COUNT_S)
            num = await asyncio.to_thread(
                tried, functools.partial(num_replicas, APP, GATEWAY), RayError, RayServeException
            )
            if isinstance(num, int):  # a controller that is away for a moment has taken none away
                self.gateway.front.admission.num_gateways = max(1, num)

    async def about(self) -> About:
        front = self.gateway.front
        stop_timeout_s = grace_s(front.config)
        facts = (
            self.settings["SOURCE"],
            front.info.model,
            self.gateway.door(self.node),
            self.namespace,
            stop_timeout_s,
        )
        return About(*facts, DRAINING if front.leaving else READY if front.ready else "without an engine")

    async def differences(self, settings_json: str) -> list[str]:
        """Differences between its settings and those that are wanted. Keys stay here."""
        return differences(self.settings, json.loads(settings_json))

    async def stop(self) -> None:
        await self.gateway.stop()

    def check_health(self) -> None:
        self.gateway.check_health()

    async def __del__(self) -> None:
        """Ray Serve awaits it before the process ends, whoever deletes or replaces the deployment."""
        if hasattr(self, "gateway"):
            await self.gateway.stop()


def find_operator(placement_json: str, namespace: str) -> Operator:
    """Operator of the pool that the engines use. Raises Unavailable while there is none."""
    from actors.control.admin import operator

    return operator(PlacementConfig.model_validate_json(placement_json), namespace)


def placement(placement_json: str, namespace: str) -> PlacementClient:
    settings = PlacementConfig.model_validate_json(placement_json)
    return PlacementClient(settings.pool, namespace, settings.call_timeout_s)


def of_one_version(config: Config) -> Config:
    """The engines' settings, with `pinned` as the name that it has now, so that all of them, and those that come later, serve
    the same or nothing. The version is kept until they are there. Raises ConfigError for one that is gone, before anything
    starts."""
    if not config.serve.weights.startswith("pinned"):
        return config
    settings, step = config.placement, config.serve.pinned_step
    service = placement(settings.model_dump_json(), config.cluster.namespace)
    version = tried(functools.partial(service.pin, step, STARTING, settings.ready_timeout_s), VersionGone)
    if isinstance(version, VersionGone):
        raise ConfigError(f"--weights {config.serve.weights}: {version.message}; or serve that step's checkpoint")
    return config.replace(serve={"weights": f"pinned:{version}"})


@dataclass(frozen=True)
class Server:
    """A running application. `doors`: of all gateways that it had; `gateway` is the handle of all that it has."""

    doors: tuple[Door, ...]
    gateway: Any
    stop_timeout_s: float

    @classmethod
    def of(cls, gateway: Any, found: Sequence[About]) -> "Server":
        return cls(tuple(about.door for about in found), gateway, max(about.stop_timeout_s for about in found))

    @property
    def http_url(self) -> str:
        return self.doors[0].http_url

    @property
    def grpc_address(self) -> str:
        """host:port of the first, as http_url is."""
        return self.doors[0].grpc_address

    def stop(self) -> None:
        """Drain all gateways at once, then remove the application; blocks for at most serve.drain_delay_s, .drain_timeout_s and
        some seconds. Repeatable."""
        ended = tried(functools.partial(asked_all, self.gateway, "stop", self.stop_timeout_s), *AWAY)
        for error in [ended] if isinstance(ended, Exception) else filter(None, ended):
            log.warning("a gateway did not end by itself: %s", type(error).__name__)
        remove(APP)


def asked_all(gateway: Any, method: str, timeout_s: float) -> list[Any]:
    """Answers of all gateways, or the errors of those that do not answer. Raises where none is there."""
    found: list[Any] = gateway.broadcast(method).results(timeout_s=timeout_s, return_exceptions=True)
    return found


def all_about(gateway: Any, timeout_s: float) -> list[About]:
    """Facts of the gateways that answer, in the order of their addresses."""
    found = tried(functools.partial(asked_all, gateway, "about", timeout_s), *AWAY)
    said = [] if isinstance(found, Exception) else [each for each in found if isinstance(each, About)]
    return sorted(said, key=lambda about: about.door)


def grace_s(settings: ServeConfig) -> float:
    """Seconds until a gateway has ended: its balancers have heard of it, its requests have ended, its listeners are closed."""
    return settings.drain_delay_s + settings.drain_timeout_s + SPARE_S


def at_node(settings: ServeConfig, address: str) -> ServeConfig:
    """The settings with the host as an address: `node` is that."""
    return settings.model_copy(update={"host": address}) if settings.host == NODE else settings


def be_quiet() -> None:
    """Have Ray Serve say errors only in this process: its handles warn of each answer of a starting replica over 0.1 s."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def settings_of(config: Config, source: str) -> str:
    """The settings by which one application is the same as another, as JSON."""
    tree = config.model_dump(mode="json")
    own = {name: tree[name] for name in ("model", "engine", "serve")}
    own["placement"] = {name: tree["placement"][name] for name in ("pool", "keep")}
    return json.dumps({"SOURCE": source, **own, "cluster": {"namespace": config.cluster.namespace}})


def build(config: Config, checkpoint: str, factory: str = FACTORY) -> serve.Application:
    """The application as a value, for `serve.run`, a Serve config file or a RayService."""
    settings = config.serve
    engines = serve.deployment(EngineReplica, name="Engine").options(
        **_scaling(config.engine),
        request_router_config=RequestRouterConfig(request_router_class="serving.chosen_replica.ChosenReplica"),
        max_ongoing_requests=settings.max_concurrent_requests + SPARE_CALLS,
        ray_actor_options={
            "num_cpus": 0,
            "num_gpus": config.engine.num_gpus,
            "resources": dict(config.engine.resources),
        },
        graceful_shutdown_timeout_s=grace_s(settings),
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        logging_config=QUIET,
    )
    resources, here = dict(settings.gateway_resources), f"node:{ray.util.get_node_ip_address()}"
    if settings.gateways == 1 and not resources:
        resources = {here: 0.001}
    gateway = serve.deployment(GatewayReplica, name=GATEWAY).options(
        **scaled(settings.gateways, resources),
        max_ongoing_requests=SPARE_CALLS,
        ray_actor_options={"num_cpus": 0, "resources": resources, "runtime_env": {"env_vars": FLAT_HEAP}},
        graceful_shutdown_timeout_s=grace_s(settings),
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        logging_config=QUIET,
    )
    return gateway.bind(
        engines.bind(factory, checkpoint, of_one_version(config).model_dump_json(exclude={"serve": {"admin_key"}})),
        settings_of(config, checkpoint),
        config.placement.ready_timeout_s,
        config.placement.model_dump_json() if factory == FACTORY else None,
    )


def _scaling(settings: EngineConfig) -> dict[str, Any]:
    if settings.max_replicas is None:
        return {"num_replicas": settings.replicas}
    limits = {"min_replicas": settings.replicas, "max_replicas": settings.max_replicas}
    policy = {"policy_function": "serving.nodes:as_loaded"}
    each = {"target_ongoing_requests": settings.requests_per_replica}
    return {"autoscaling_config": {**limits, **each, "policy": policy}}


def start(config: Config, checkpoint: str, factory: str = FACTORY) -> Server:
    """Run the application in the cluster this process has joined, and wait until it answers.

    Raises ConfigError where a port is taken or there is no such factory, Unavailable where an engine does not start.
    """
    check_ports(config.serve)
    load_factory(factory)
    be_quiet()
    serve.start(proxy_location="Disabled")
    with ExitStack() as undo:
        undo.callback(remove, APP)
        try:
            gateway = serve.run(build(config, checkpoint, factory), name=APP, route_prefix=None)
        except RuntimeError:
            log.exception("the application did not start")
            raise Unavailable(f"the server did not start: {_last_lines()}") from None
        server = Server.of(gateway, _opened(gateway))
        undo.pop_all()
    return server


def _opened(gateway: Any) -> list[About]:
    """All gateways that run: a handle may have heard of some of them only."""
    until_s = time.monotonic() + OPENED_S
    while len(found := all_about(gateway, OPENED_S)) < num_replicas(APP, GATEWAY) or not found:
        if time.monotonic() > until_s:
            raise Unavailable(f"{len(found)} gateways answer, of {num_replicas(APP, GATEWAY)} that run")
        time.sleep(LOOK_S)
    return found


def _last_lines() -> str:
    """The error of each deployment: the last line of what Serve kept of its traceback."""
    found = {name: item.message.strip() for name, item in serve.status().applications[APP].deployments.items()}
    return "; ".join(f"{name}: {text.splitlines()[-1][:500]}" for name, text in found.items() if text)


def check_ports(settings: ServeConfig) -> None:
    """Raise ConfigError where a port of a gateway here is taken or the host is not this machine's. Cheap: ask before starting
    anything."""
    if settings.gateway_resources:  # they may all be elsewhere
        return
    host = at_node(settings, ray.util.get_node_ip_address() if ray.is_initialized() else LOOPBACK[0]).host
    for what, port in (("http", settings.http_port), ("grpc", settings.grpc_port)):
        _check_free(what, host, port)


def _check_free(what: str, host: str, port: int) -> None:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        raise ConfigError(
            f"serve.{what}_port {port} on {host}: {error.strerror}; choose another, or 0 for any"
        ) from None
