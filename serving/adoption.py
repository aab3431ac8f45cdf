"""The application that runs in this cluster already: what it is, whether it is the one that is wanted, and its end.

It outlives the command that started it, as its pool does: both are Ray's. The application says what it serves, the pool whether
it was made for a server (actors/control/state.py); so another command can end both as the first would have.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import ActorDiedError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from actors import pool as pools
from actors.names import PlacementClient
from serving.app import APP, DRAINING, READY, About, Server, all_about, be_quiet, settings_of
from serving.removal import remove
from trinity.config import Config
from trinity.errors import ConfigError, Unavailable
from trinity.utils.trying import retrying, tried

ANSWER_S, LOOK_S = 5.0, 0.5
SHOWN = 3  # settings that differ
REMEDIES = "`trinity serve SOURCE --adopt` takes it over, `trinity serve stop` ends it"


def overview() -> ApplicationStatusOverview | None:
    """Ray Serve's view of the application; None where there is none."""
    be_quiet()
    return serve.status().applications.get(APP)


def is_gone() -> bool:
    """Say whether somebody has ended it. A controller that is away for a moment has not."""
    found = tried(overview, RayError)
    return found is None or isinstance(found, ActorDiedError)


def taken_over(config: Config, source: str, may_adopt: bool) -> Server | None:
    """The running application, if it may be adopted; None where there is none. Raises ConfigError where it may not."""
    if may_adopt:
        return adopted(config, source)
    if (found := overview()) is not None:
        raise ConfigError(f"{_told(found, _asked()[1])}; {REMEDIES}")
    return None


def adopted(config: Config, source: str) -> Server | None:
    """The running application; None where there is none, also because it had failed or was half ended.

    Raises ConfigError where it serves something else, Unavailable where it is not ready within placement.ready_timeout_s.
    """
    until_s = time.monotonic() + config.placement.ready_timeout_s
    server = retrying(partial(_adopted, config, source), until_s)
    if server is None:
        _end_unfinished(config, until_s)
    return server


def ended(namespace: str) -> Iterator[str]:
    """End the application and the pools that were made for it; yields what it is at, and what is ended then."""
    found, pool = overview(), None
    if found is not None:
        gateway, said = _asked()
        yield f"draining: {_told(found, said)}"
        _end(gateway, said)
        yield "the application is ended"
        namespace = said[0].namespace if said else namespace
    for pool in pools.of_server(namespace):
        pools.destroy(pool, namespace)
        yield f"pool {pool} is ended"
    if found is None and pool is None:
        yield "nothing is served in this cluster"


def _adopted(config: Config, source: str) -> Server | None:
    if (found := overview()) is None:
        return None
    gateway, said = _asked()
    states = {about.state for about in said}
    if found.status == ApplicationStatus.DEPLOY_FAILED or states == {DRAINING}:
        _end(gateway, said)
        return None
    if not said or found.status == ApplicationStatus.DELETING:
        raise Unavailable(
            f"{_told(found, said)}; wait longer (placement.ready_timeout_s), or end it: trinity serve stop"
        )
    if differs := gateway.differences.remote(settings_of(config, source)).result(timeout_s=ANSWER_S):
        more = f" and {len(differs) - SHOWN} more" if len(differs) > SHOWN else ""
        raise ConfigError(
            f"{_told(found, said)}, with other settings: {', '.join(differs[:SHOWN])}{more}; adopt it with those that it has, "
            "or end it with `trinity serve stop`"
        )
    if READY not in states:
        raise Unavailable(f"{_told(found, said)} and is {said[0].state}; `trinity serve stop` ends it")
    return Server.of(gateway, said)


def _end_unfinished(config: Config, until_s: float) -> None:
    """End the pool if it was to be this server's and the command that made it died before it was given any weights."""
    name, namespace = config.placement.pool, config.cluster.namespace
    service = PlacementClient(name, namespace, config.placement.call_timeout_s)
    while pools.exists(name, namespace) and service.spec().ends_with_server and service.source() is None:
        if time.monotonic() > until_s:
            pools.destroy(name, namespace, config.placement.memory_dir)
        time.sleep(LOOK_S)


def _asked() -> tuple[Any, list[About]]:
    """-> the handle of all gateways and what those say that answer."""
    gateway = tried(partial(serve.get_app_handle, APP), RayServeException)
    return (None, []) if isinstance(gateway, RayServeException) else (gateway, all_about(gateway, ANSWER_S))


def _end(gateway: Any, said: list[About]) -> None:
    if said:
        Server.of(gateway, said).stop()
    else:
        remove(APP)


def _told(found: ApplicationStatusOverview, said: list[About]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.last_deployed_time_s))
    if not said:
        return f"an application {APP!r} is here since {since}, {found.status.value}, and its gateway does not answer"
    doors = ", ".join(f"HTTP {about.door.http_url}, gRPC {about.door.grpc_address}" for about in said)
    return f"{said[0].source} is served here since {since} as {said[0].model!r}, {doors}"
