"""Sequences that each step of a run takes, how many and which: fewer at first, where train.batch_ramp says so.

Decision: a closed form of the step's number, so that nothing is remembered, and a run that resumes takes what it would have
taken.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from pydantic import Field

from trinity.config.yaml import Frozen


class Sequences(NamedTuple):
    """Sequences of a step: `num` of the order that the data have, from number `first` on."""

    first: int
    num: int

    @classmethod
    def nth(cls, step: int, num: int) -> "Sequences":
        """Those of a step (0, 1, ...) where each takes as many."""
        return cls(step * num, num)

    def groups(self, size: int) -> "Sequences":
        """The same in groups of that size."""
        return Sequences(self.first // size, self.num // size)


class RampPart(Frozen):
    """Steps of a run that take fewer sequences than those after them."""

    steps: int = Field(ge=1, description="so many, after those of the parts before")
    global_batch_size: int = Field(ge=1, description="sequences in each of them, over all workers")


def sequences_before(step: int, ramp: Sequence[RampPart], global_batch_size: int) -> int:
    """Number of sequences that the steps 0 .. step - 1 take."""
    num, left = 0, step
    for part in ramp:
        num += min(left, part.steps) * part.global_batch_size
        left = max(0, left - part.steps)
    return num + left * global_batch_size


def said(ramp: Sequence[RampPart], global_batch_size: int) -> str:
    """Words that tell one ramp from another, whatever its parts; none of one that changes nothing."""
    runs = groupby(ramp, lambda part: part.global_batch_size)
    sizes = [(sum(part.steps for part in run), size) for size, run in runs if size != global_batch_size]
    return ", ".join(f"{steps} x {size}" for steps, size in sizes)
