"""Reasons why an attempt at a training step comes to nothing, and is made again."""

from trinity.errors import DeadlineExceeded, InputGone, StepConflict, TrinityError, Unavailable, VersionGone, WrongEpoch


class WorkerFailed(Unavailable):
    """Another training worker could not reach a shard; what it saw is in its own log."""


RETRY_REASONS: dict[type[TrinityError], str] = {  # what the next attempt may not meet; a subclass before its base
    WorkerFailed: "worker_failed",
    Unavailable: "unavailable",
    DeadlineExceeded: "deadline",
    StepConflict: "step_conflict",
    WrongEpoch: "wrong_epoch",
    VersionGone: "version_gone",
    InputGone: "input_gone",
}
RETRYABLE = tuple(RETRY_REASONS)


def reason_of(error: TrinityError) -> str:
    """The label of an error that is RETRYABLE."""
    return next(reason for kind, reason in RETRY_REASONS.items() if isinstance(error, kind))


class RetryStep(Exception):
    """All workers make the attempt again. `reason` is one of RETRY_REASONS' labels; worker 0 has the error as `__cause__`."""

    def __init__(self, reason: str, why: str):
        super().__init__(why)
        self.reason, self.why = reason, why
