"""Reasons why an attempt at a training step comes to nothing, and is made again; and patience with data that cannot be read."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from trinity.errors import DeadlineExceeded, InputGone, StepConflict, TrinityError, Unavailable, VersionGone, WrongEpoch
from trinity.utils.trying import tried

log = logging.getLogger(__name__)
T = TypeVar("T")
PAUSE_S, SAY_EVERY_S = 1.0, 60.0


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


def patiently(read: Callable[[], T]) -> T:
    """Return what `read` reads of the run's data. While their store does not answer or refuses, the run pauses; it goes on when
    that is mended."""
    said_s = -SAY_EVERY_S
    while isinstance(found := tried(read, Unavailable), Unavailable):
        if time.monotonic() - said_s >= SAY_EVERY_S:
            said_s = time.monotonic()
            log.error("the run pauses until its data can be read: %s", found.message)
        time.sleep(PAUSE_S)
    if said_s > 0:
        log.warning("its data can be read again; the run goes on")
    return found
