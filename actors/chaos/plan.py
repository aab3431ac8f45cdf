"""Chaos as values: which faults there are, when each strikes, and what a run's attempts say of how it came through.

Decisions: a plan is a function of its seed, so that a run can be repeated; every chosen fault strikes once before one strikes
twice. All that is said of a training run comes from one list, the attempts at its steps: an attempt that begins at position P
shows that steps up to P are done, and a second one at the same P that the first came to nothing.
"""

import random
import statistics
from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

SHARE_LOST = 0.3  # of requests, and of replies, while messages are lost


class Fault(Enum):
    KILL_SHARD = "kill-shard"
    STOP_SHARD = "stop-shard"
    KILL_WORKER = "kill-worker"
    KILL_SERVICE = "kill-service"
    LOSE_MESSAGES = "lose-messages"
    MOVE_EXPERTS = "move-experts"
    CUT_HOST = "cut-host"
    CUT_ONE_WAY = "cut-one-way"
    CUT_BETWEEN = "cut-between"
    SLOW_HOST = "slow-host"
    LOSE_POWER = "lose-power"
    SHIFT_CLOCK = "shift-clock"


OF_HOSTS = (
    Fault.CUT_HOST,
    Fault.CUT_ONE_WAY,
    Fault.CUT_BETWEEN,
    Fault.SLOW_HOST,
    Fault.LOSE_POWER,
    Fault.SHIFT_CLOCK,
)
OF_PROCESSES = tuple(fault for fault in Fault if fault not in OF_HOSTS)


class Planned(NamedTuple):
    """A fault to come, so many seconds after the one before was got over. `draw` in [0, 1) picks the victim among those that
    are there then; `for_s`: how long, if it lasts."""

    after_s: float
    fault: Fault
    draw: float
    for_s: float


class Struck(NamedTuple):
    """A fault that came. `error`: why it did not, after all; `recovered_s`: None as long as it is not got over."""

    fault: Fault
    target: str
    time_s: float  # time.monotonic() of who strikes, as of attempts
    error: str = ""
    recovered_s: float | None = None


class Attempt(NamedTuple):
    """A worker began to compute the step after `position`."""

    time_s: float
    position: int


def plan(seed: int, duration_s: float, faults: Sequence[Fault], every_s: float) -> Iterator[Planned]:
    """Faults whose waits come to less than `duration_s` (inf: for ever); each from half to one and a half of `every_s`."""
    rng, at_s, bag = random.Random(seed), 0.0, list[Fault]()
    while True:
        after_s = every_s * rng.uniform(0.5, 1.5)
        at_s += after_s
        if at_s >= duration_s:
            return
        if not bag:
            bag = rng.sample(sorted(set(faults), key=lambda fault: fault.value), len(set(faults)))
        yield Planned(after_s, bag.pop(), rng.random(), every_s * rng.uniform(0.1, 0.5))


def done_at(attempts: Sequence[Attempt]) -> dict[int, float]:
    """Time at which each position was first seen to be reached, in order."""
    reached: dict[int, float] = {}
    for attempt in attempts:
        reached.setdefault(attempt.position, attempt.time_s)
    return reached


def num_replays(attempts: Sequence[Attempt]) -> int:
    return len(attempts) - len(done_at(attempts))


def num_lost(attempts: Sequence[Attempt]) -> int:
    """Steps that had been done and were not any more."""
    return sum(max(0, before.position - after.position) for before, after in pairwise(attempts))


def goodput(attempts: Sequence[Attempt]) -> float:
    """The median time of a step x steps / wall, from the first attempt to the last. nan for fewer than two steps."""
    reached = list(done_at(attempts).values())
    if len(reached) < 3:
        return float("nan")
    steps_s = [after - before for before, after in pairwise(reached)]
    return statistics.median(steps_s) * len(steps_s) / (reached[-1] - reached[0])


def step_at(attempts: Sequence[Attempt], time_s: float) -> int:
    """The step that was under way then."""
    return 1 + max((a.position for a in attempts if a.time_s <= time_s), default=0)


def recovery_s(attempts: Sequence[Attempt], time_s: float) -> float | None:
    """Seconds from then to the end of the step that was under way; None: that was the last one."""
    step = step_at(attempts, time_s)
    return next((at_s - time_s for position, at_s in done_at(attempts).items() if position >= step), None)


def longest_step_s(attempts: Sequence[Attempt], since_s: float, until_s: float) -> float | None:
    """Longest of the steps that ended in that time; None without any."""
    spans = pairwise(done_at(attempts).values())
    return max((end - start for start, end in spans if since_s < end <= until_s), default=None)
