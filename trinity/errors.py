"""Errors that users meet: each says the value, the bound and the remedy.

Raised anywhere below the edges; `serving/` maps `code` to HTTP and gRPC in one table, the CLI prints the message
and exits with 2. `assert` is for our own invariants, these are for everything a user can cause.
"""

from enum import Enum


class Code(Enum):
    """Kind of a failure, in the words both HTTP and gRPC can express."""

    INVALID = "invalid_argument"
    UNAUTHENTICATED = "unauthenticated"
    NOT_FOUND = "not_found"
    TOO_LARGE = "too_large"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    DEADLINE = "deadline_exceeded"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


class TrinityError(Exception):
    """Base of all typed errors. `param` names the offending field of a request, where there is one."""

    code = Code.INTERNAL

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword fields when Ray carries the error between processes."""
        return _rebuild, (type(self), self.message, self.param, self.retry_after_s)


def _rebuild(kind: type[TrinityError], message: str, param: str | None, retry_after_s: float | None) -> TrinityError:
    return kind(message, param=param, retry_after_s=retry_after_s)


class ConfigError(TrinityError):
    """A configuration, a flag or a file of the user's is wrong."""

    code = Code.INVALID


class InvalidRequest(TrinityError):
    """A request that can never succeed as it stands."""

    code = Code.INVALID


class PromptTooLong(InvalidRequest):
    """Prompt (plus what it wants generated) exceeds what the model or the server takes."""


class ModelNotFound(TrinityError):
    code = Code.NOT_FOUND


class Unauthenticated(TrinityError):
    code = Code.UNAUTHENTICATED


class RequestTooLarge(TrinityError):
    code = Code.TOO_LARGE


class Overloaded(TrinityError):
    """The queue is full; `retry_after_s` says when to come back."""

    code = Code.OVERLOADED


class Unavailable(TrinityError):
    """A part the request needs is not there right now (a shard restarting, a server draining)."""

    code = Code.UNAVAILABLE


class EngineLost(Unavailable):
    """The engine that was at work on a request is gone, or has stopped; another one can go on with it."""


class DeadlineExceeded(TrinityError):
    code = Code.DEADLINE


class CheckpointError(TrinityError):
    """A checkpoint is missing, incomplete, corrupt or of another model; names the file and the tensor."""

    code = Code.INVALID


class DataError(TrinityError):
    """A data file is missing, unreadable or holds too little text."""

    code = Code.INVALID


class GateClosed(TrinityError):
    """Weights score less than a task's gate asks for."""

    code = Code.INVALID


class WrongEpoch(TrinityError):
    """A shard was asked for an expert it does not hold; the caller's placement is stale or the plan is wrong."""

    code = Code.UNAVAILABLE


class StepConflict(TrinityError):
    """A step verb arrived that does not follow the shard's last committed version."""

    code = Code.INTERNAL


class VersionGone(TrinityError):
    """Weights of that version are not kept any more, or not yet there; the newest are."""

    code = Code.UNAVAILABLE


class AdapterMissing(TrinityError):
    """A shard was asked for rows of an adapter that it does not have; told where that is (verb `adapt`), it takes it up."""

    code = Code.UNAVAILABLE


class AdapterLost(TrinityError):
    """The files of an adapter that is served cannot be read any more, or are others now."""

    code = Code.UNAVAILABLE


class StateLost(TrinityError):
    """The last committed state of a training pool is nowhere any more: the run goes back to its last checkpoint."""

    code = Code.UNAVAILABLE


class Superseded(TrinityError):
    """Another worker of the job has gone on: who raises this starts again, from what was decided last."""

    code = Code.INTERNAL


class InputGone(TrinityError):
    """The forward activations of an op are no longer cached; send the rows again and the shard recomputes."""

    code = Code.UNAVAILABLE
