"""The Ray Serve application: engine replicas behind one gateway.

Decisions: the gateway's replica opens HTTP and gRPC itself, so that bind address, TLS, key, limits and the order of
draining are ours; Ray Serve starts, checks, scales and replaces the processes, and its own proxies stay off
(measurements: docs/serving.md). The gateway runs on the node that started it: a loopback address means that machine.
"""

import functools
import json
import logging
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException

from actors.names import PlacementClient
from serving.engine import EngineReplica, connect_client, keep_to_node_address, load_factory
from serving.frontend import Frontend
from serving.gateway import Gateway
from serving.pins import STARTING, Pins
from serving.pool_operator import Operator
from trinity.config import Config, EngineConfig, PlacementConfig, ServeConfig, differences, setup_grpc
from trinity.errors import ConfigError, Unavailable

log = logging.getLogger("trinity.serving")
APP = "trinity"
FACTORY = "serving.engine:build_engine"
READY, DRAINING = "ready", "draining"
SPARE_CALLS = 64  # health probes beside a full house of requests
SPARE_S = 10.0  # for closing, after the last request
QUIET = {"enable_access_log": False}


@dataclass(frozen=True)
class About:
    """Facts that a gateway tells a command which did not start it."""

    source: str
    model: str
    http_url: str
    grpc_address: str
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
        config = ServeConfig.model_validate(self.settings["serve"])
        own = EngineConfig.model_validate(self.settings["engine"])
        client, tokenizer, info = await connect_client(engines, ready_timeout_s, own)
        operator = functools.partial(find_operator, placement_json, self.namespace) if placement_json else None
        pins = Pins(placement(placement_json, self.namespace).tell) if placement_json and config.is_of_run else None
        self.gateway = Gateway(Frontend(client, tokenizer, info, config, operator, self.settings["SOURCE"], pins))
        await self.gateway.start()

    async def about(self) -> About:
        front = self.gateway.front
        stop_timeout_s = front.config.drain_timeout_s + SPARE_S
        facts = (self.settings["SOURCE"], front.info.model, *self.gateway.addresses, self.namespace, stop_timeout_s)
        return About(*facts, DRAINING if front.admission.draining else READY if front.ready else "without an engine")

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
    """The engines' settings, with `pinned` as the number that it is now, so that all of them, and those that come later, serve
    the same. The version is kept until they are there."""
    if config.serve.weights != "pinned":
        return config
    settings = config.placement
    service = placement(settings.model_dump_json(), config.cluster.namespace)
    version = service.pin(None, STARTING, settings.ready_timeout_s)
    return config.replace(serve={"weights": f"pinned:{version}"})


@dataclass(frozen=True)
class Server:
    """A running application. `grpc_address` is host:port."""

    http_url: str
    grpc_address: str
    gateway: Any
    stop_timeout_s: float

    @classmethod
    def of(cls, gateway: Any, about: About) -> "Server":
        return cls(about.http_url, about.grpc_address, gateway, about.stop_timeout_s)

    def stop(self) -> None:
        """Drain, then remove the application; blocks for at most serve.drain_timeout_s and some seconds. Repeatable."""
        try:
            self.gateway.stop.remote().result(timeout_s=self.stop_timeout_s)
        except (RayServeException, RayActorError, TimeoutError) as error:
            log.warning("the gateway did not end by itself: %s", type(error).__name__)
        serve.delete(APP)


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
    grace_s = settings.drain_timeout_s + SPARE_S
    engines = serve.deployment(EngineReplica, name="Engine").options(
        **_scaling(config.engine),
        request_router_config=RequestRouterConfig(request_router_class="serving.chosen_replica.ChosenReplica"),
        max_ongoing_requests=settings.max_concurrent_requests + SPARE_CALLS,
        ray_actor_options={
            "num_cpus": 0,
            "num_gpus": config.engine.num_gpus,
            "resources": dict(config.engine.resources),
        },
        graceful_shutdown_timeout_s=grace_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        logging_config=QUIET,
    )
    here = f"node:{ray.util.get_node_ip_address()}"
    gateway = serve.deployment(GatewayReplica, name="Gateway").options(
        num_replicas=1,
        max_ongoing_requests=SPARE_CALLS,
        ray_actor_options={"num_cpus": 0, "resources": {here: 0.001}},
        graceful_shutdown_timeout_s=grace_s,
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
    return {"autoscaling_config": {**limits, "target_ongoing_requests": settings.requests_per_replica}}


def start(config: Config, checkpoint: str, factory: str = FACTORY) -> Server:
    """Run the application in the cluster this process has joined, and wait until it answers.

    Raises ConfigError where a port is taken or there is no such factory, Unavailable where an engine does not start.
    """
    check_ports(config.serve)
    load_factory(factory)
    be_quiet()
    serve.start(proxy_location="Disabled")
    with ExitStack() as undo:
        undo.callback(serve.delete, APP)
        try:
            gateway = serve.run(build(config, checkpoint, factory), name=APP, route_prefix=None)
        except RuntimeError:
            log.exception("the application did not start")
            raise Unavailable(f"the server did not start: {_last_lines()}") from None
        server = Server.of(gateway, gateway.about.remote().result(timeout_s=30))
        undo.pop_all()
    return server


def _last_lines() -> str:
    """The error of each deployment: the last line of what Serve kept of its traceback."""
    found = {name: item.message.strip() for name, item in serve.status().applications[APP].deployments.items()}
    return "; ".join(f"{name}: {text.splitlines()[-1][:500]}" for name, text in found.items() if text)


def check_ports(settings: ServeConfig) -> None:
    """Raise ConfigError where a port is taken or the host is not this machine's. Cheap: ask before starting anything."""
    for what, port in (("http", settings.http_port), ("grpc", settings.grpc_port)):
        _check_free(what, settings.host, port)


def _check_free(what: str, host: str, port: int) -> None:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        raise ConfigError(
            f"serve.{what}_port {port} on {host}: {error.strerror}; choose another, or 0 for any"
        ) from None
