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
from serving.app import APP, DRAINING, READY, About, Server, be_quiet, settings_of
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
        gateway, about = _asked()
        yield f"draining: {_told(found, about)}"
        _end(gateway, about)
        yield "the application is ended"
        namespace = about.namespace if about else namespace
    for pool in pools.of_server(namespace):
        pools.destroy(pool, namespace)
        yield f"pool {pool} is ended"
    if found is None and pool is None:
        yield "nothing is served in this cluster"


def _adopted(config: Config, source: str) -> Server | None:
    if (found := overview()) is None:
        return None
    gateway, about = _asked()
    if found.status == ApplicationStatus.DEPLOY_FAILED or (about and about.state == DRAINING):
        _end(gateway, about)
        return None
    if about is None or found.status == ApplicationStatus.DELETING:
        raise Unavailable(
            f"{_told(found, about)}; wait longer (placement.ready_timeout_s), or end it: trinity serve stop"
        )
    if differs := gateway.differences.remote(settings_of(config, source)).result(timeout_s=ANSWER_S):
        more = f" and {len(differs) - SHOWN} more" if len(differs) > SHOWN else ""
        raise ConfigError(
            f"{_told(found, about)}, with other settings: {', '.join(differs[:SHOWN])}{more}; adopt it with those that it has, "
            "or end it with `trinity serve stop`"
        )
    if about.state != READY:
        raise Unavailable(f"{_told(found, about)} and is {about.state}; `trinity serve stop` ends it")
    return Server.of(gateway, about)


def _end_unfinished(config: Config, until_s: float) -> None:
    """End the pool if it was to be this server's and the command that made it died before it was given any weights."""
    name, namespace = config.placement.pool, config.cluster.namespace
    service = PlacementClient(name, namespace, config.placement.call_timeout_s)
    while pools.exists(name, namespace) and service.spec().ends_with_server and service.source() is None:
        if time.monotonic() > until_s:
            pools.destroy(name, namespace, config.placement.memory_dir)
        time.sleep(LOOK_S)


def _asked() -> tuple[Any, About | None]:
    """-> the gateway and what it says; None where it does not answer."""
    gateway = tried(partial(serve.get_app_handle, APP), RayServeException)
    if isinstance(gateway, RayServeException):
        return None, None
    about = tried(lambda: gateway.about.remote().result(timeout_s=ANSWER_S), RayServeException, RayError, TimeoutError)
    return gateway, about if isinstance(about, About) else None


def _end(gateway: Any, about: About | None) -> None:
    if about is not None:
        Server.of(gateway, about).stop()
    else:
        serve.delete(APP)


def _told(found: ApplicationStatusOverview, about: About | None) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.last_deployed_time_s))
    if about is None:
        return f"an application {APP!r} is here since {since}, {found.status.value}, and its gateway does not answer"
    return f"{about.source} is served here since {since} as {about.model!r}, HTTP {about.http_url}, gRPC {about.grpc_address}"
