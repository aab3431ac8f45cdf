"""What the actors of a pool are called, and how they are asked: one place for Ray's errors."""

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from trinity.errors import DeadlineExceeded, TrinityError, Unavailable

PLACEMENT = "placement"


def name_of(pool: str, what: str) -> str:
    return f"trinity/{pool}/{what}"


def find(pool: str, what: str, namespace: str) -> Any:
    """Raises Unavailable when there is no such actor."""
    try:
        return ray.get_actor(name_of(pool, what), namespace=namespace)
    except ValueError:
        raise Unavailable(
            f"there is no {name_of(pool, what)!r} in namespace {namespace!r}; start the pool first"
        ) from None


def ask(ref: Any, timeout_s: float, who: str) -> Any:
    """The answer; a TrinityError that came as a value, or was raised over there, is raised here."""
    try:
        answer = ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        raise DeadlineExceeded(f"{who} did not answer within {timeout_s:.1f} s; is it overloaded or stopped?") from None
    except RayActorError as error:
        raise Unavailable(f"{who} is away ({type(error).__name__}); is the cluster healthy?") from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TrinityError):
            raise error.cause from None
        raise
    if isinstance(answer, TrinityError):
        raise answer
    return answer


class Handles(dict[str, Any]):
    """Shard name -> actor handle, looked up when first needed: shards come and go."""

    def __init__(self, pool: str, namespace: str):
        self.pool, self.namespace = pool, namespace

    def __missing__(self, shard: str) -> Any:
        self[shard] = find(self.pool, shard, self.namespace)
        return self[shard]
