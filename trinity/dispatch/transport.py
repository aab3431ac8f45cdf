"""The one seam for distance: how a verb reaches a shard and its answer comes back.

Decision: whatever a caller sends again carries the same op_id, and a shard applies it once.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

from trinity.errors import TrinityError
from trinity.utils.trying import retrying, tried


class Reply(Protocol):
    """An answer on its way."""

    def result(self) -> Any:
        """Wait, return the answer or raise a TrinityError. Tensors are the receiver's own."""
        ...


class Transport(Protocol):
    """The one seam for distance. Verbs: infer, backward, prepare, commit, abort, and the shard's control verbs.

    `send` returns at once. A verb's message and answer are frozen values of tensors and numbers. Unavailable means
    that the verb may or may not have been applied: send it again, with the same op_id.
    """

    def send(self, shard: str, verb: str, message: Any) -> Reply: ...


@runtime_checkable
class Rings(Protocol):
    """A transport with a faster way for inference to some shards (near.py)."""

    num_changes: int  # of what `ring` answers

    def renew(self) -> None:
        """Count a change: what `ring` answered has broken."""
        ...

    def ring(self, shard: str, epoch: int, deadline_s: float) -> Any:
        """The way of native/ring to that shard, for calls of that epoch; None without one. Waits until the deadline where the
        shard has to be asked for it."""
        ...


@runtime_checkable
class Lends(Protocol):
    """A transport that knows shards of this process, of which callers may compute with the weights."""

    def lend(self, shard: str, version: int, dtype: Any) -> AbstractContextManager[Mapping[int, bytes]]: ...


def result_with_retry(
    transport: Transport, shard: str, verb: str, message: Any, reply: Reply, deadline_s: float
) -> Any:
    """The answer, sending the same message again while its shard is away and there is time.

    Safe for every verb: they are pure, or applied once per op_id or step.
    """
    return retrying(lambda: transport.send(shard, verb, message).result(), deadline_s, first=reply.result)


class Done:
    """A reply that is already there."""

    def __init__(self, value: Any = None, error: Exception | None = None):
        self.value, self.error = value, error

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class LocalTransport:
    """Shards in this process: the oracle of every other transport, and what offline inference uses. Errors come, as from
    another process, without the frames that they were raised in: those would hold the caller."""

    def __init__(self, shards: dict[str, Any]):
        self.shards = shards

    def lend(self, shard: str, version: int, dtype: Any) -> AbstractContextManager[Mapping[int, bytes]]:
        """Layers of a shard as the extension in C++ takes them (ExpertShard.lend)."""
        lend = getattr(self.shards[shard], "lend", None)
        return nullcontext({}) if lend is None else lend(version, dtype)

    def send(self, shard: str, verb: str, message: Any) -> Reply:
        found = tried(partial(getattr(self.shards[shard], verb), message), TrinityError)
        return Done(error=found.with_traceback(None)) if isinstance(found, TrinityError) else Done(found)
