"""Removing an application, in which no request is left, from Ray Serve within seconds.

Decision: Ray Serve has a replica that is being started be started first, and then end, for as long as a request might last.
Once the gateways have drained there is nothing to wait for: who has not ended by himself after OWN_S is killed.
"""

import time
from functools import partial

import ray
from ray import serve

from trinity.errors import Unavailable
from trinity.utils.trying import retrying, tried

OWN_S, GONE_S = 4.0, 10.0
NAMESPACE = "serve"  # of Ray Serve's own actors


def remove(app: str) -> None:
    """Blocks until it is gone. Raises Unavailable where it is there after GONE_S more. Harmless when there is none."""
    serve.delete(app, _blocking=False)
    if _gone_within(app, OWN_S) is not None:
        for name in replicas(app):
            _kill(name)
        if (left := _gone_within(app, GONE_S)) is not None:
            raise left


def replicas(app: str) -> list[str]:
    """Names of the actors of its replicas, also of those that are being started."""
    found = ray.util.list_named_actors(all_namespaces=True)
    return [each["name"] for each in found if each["name"].startswith(f"SERVE_REPLICA::{app}#")]


def _gone_within(app: str, seconds: float) -> Unavailable | None:
    return tried(partial(retrying, partial(_require_gone, app), time.monotonic() + seconds), Unavailable)


def _require_gone(app: str) -> None:
    if app in serve.status().applications:
        raise Unavailable(
            f"Ray Serve still has the application {app!r}, with {', '.join(replicas(app)) or 'no replica'}"
        )


def _kill(name: str) -> None:
    actor = tried(partial(ray.get_actor, name, namespace=NAMESPACE), ValueError)
    if not isinstance(actor, ValueError):  # it has ended just now
        ray.kill(actor)
