"""Durations of the phases of an attempt at a step."""

import functools
import time
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class PhaseClock:
    """Seconds since an attempt began, and of each of its phases that has ended."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()
        self.phases_s: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began_s


class HasClock(Protocol):
    clock: PhaseClock


Owner = TypeVar("Owner", bound=HasClock)


def phase(name: str) -> Callable[[Callable[Concatenate[Owner, P], R]], Callable[Concatenate[Owner, P], R]]:
    """A method that is a phase of an attempt: its seconds are noted in its owner's `clock` when it returns."""

    def timed(method: Callable[Concatenate[Owner, P], R]) -> Callable[Concatenate[Owner, P], R]:
        @functools.wraps(method)
        def call(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> R:
            began_s = time.perf_counter()
            found = method(self, *args, **kwargs)
            self.clock.phases_s[name] = time.perf_counter() - began_s
            return found

        return call

    return timed
