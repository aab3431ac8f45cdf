"""Names of a pool's actors, and how these are asked: one place for Ray's errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trinity.errors import ConfigError, DeadlineExceeded, TrinityError, Unavailable
from trinity.rpc.messages import PROTOCOL, Load, other_release

PLACEMENT = "placement"
SERVICE = "the placement service"


def name_of(pool: str, what: str) -> str:
    return f"trinity/{pool}/{what}"


@contextmanager
def translate_ray_errors(who: str, within: str = "in time") -> Iterator[None]:
    """Raise what Ray says about `who` inside the block as ours: DeadlineExceeded, Unavailable where it is away (whatever was
    asked may or may not have been done), or the TrinityError that was raised over there. A bug over there stays Ray's."""
    try:
        yield
    except RayError as error:
        raise _ours(error, who, within) from None


def _ours(error: RayError, who: str, within: str) -> Exception:
    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, TrinityError) else error
    if isinstance(error, GetTimeoutError):
        return DeadlineExceeded(f"{who} did not answer {within}; is it overloaded or stopped?")
    return Unavailable(f"{who} is away ({type(error).__name__}); is the cluster healthy?")


def on_node(task: Any, node: str) -> Any:
    """The remote function, to run on that node and no other."""
    return task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


def find(pool: str, what: str, namespace: str) -> Any:
    """Raises Unavailable when there is no such actor."""
    name = name_of(pool, what)
    try:
        with translate_ray_errors(name):
            return ray.get_actor(name, namespace=namespace)
    except ValueError:
        raise Unavailable(f"there is no {name!r} in namespace {namespace!r}; start the pool first") from None


def ask(ref: Any, timeout_s: float, who: str) -> Any:
    """The answer; a TrinityError that came as a value, or was raised over there, is raised here."""
    with translate_ray_errors(who, f"within {timeout_s:.1f} s"):
        answer = ray.get(ref, timeout=timeout_s)
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


class PlacementClient:
    """A pool's placement service, asked from any process of the cluster. Its handle is kept: work goes on while Ray's head,
    which knows the names, is away."""

    def __init__(self, pool: str, namespace: str, timeout_s: float):
        self.pool, self.namespace, self.timeout_s = pool, namespace, timeout_s
        self._handle: Any = None

    @property
    def handle(self) -> Any:
        """Raises Unavailable when there is no such service, ConfigError where it is of a release that this one does not
        understand."""
        found = self._handle = self._handle or self._checked(find(self.pool, PLACEMENT, self.namespace))
        return found

    def _checked(self, found: Any) -> Any:
        asked = getattr(found, "protocol", None)
        theirs = None if asked is None else ask(asked.remote(), self.timeout_s, SERVICE)
        if theirs != PROTOCOL:
            raise ConfigError(other_release(f"pool {self.pool!r}", theirs))
        return found

    def ask(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """The answer of one of its methods. Raises TrinityErrors."""
        try:
            return ask(getattr(self.handle, method).remote(*arguments), timeout_s or self.timeout_s, SERVICE)
        except Unavailable:
            self._handle = None  # another pool may have the name now
            raise

    def identity(self) -> str:
        """Name that no other pool has, nor one that is made anew under the same name."""
        return self.handle._actor_id.hex()

    def secret(self) -> bytes:
        """The secret that callers prove to shards that they know."""
        return self.ask("secret")

    def spec(self) -> Any:
        """The specification that the pool is made from (actors/control/state.py)."""
        return self.ask("spec")

    def source(self) -> Load | None:
        """The source in which a shard that starts again finds its weights."""
        return self.ask("source")

    def next_line(self) -> int:
        """The line of versions that what shards load now is of: another one as soon as a run goes back."""
        return self.ask("next_line")

    def pin(self, version: int | None, holder: str, lease_s: float) -> int:
        """Keep a version (None: the one that is served) for `holder` until the lease ends; -> the version."""
        return self.ask("pin", version, holder, lease_s)

    def tell(self, method: str, *arguments: Any) -> None:
        """Tell it without waiting for an answer. Raises Unavailable when there is no such service."""
        getattr(find(self.pool, PLACEMENT, self.namespace), method).remote(*arguments)
