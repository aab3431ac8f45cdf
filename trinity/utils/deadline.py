"""Limits on how long a piece of work may go on."""

import math
import time
from collections.abc import Callable


class Deadline:
    """A moment `seconds` from now, by a clock that nobody sets back."""

    def __init__(self, seconds: float = math.inf, clock_s: Callable[[], float] = time.monotonic):
        self._clock_s, self._at_s = clock_s, clock_s() + seconds

    @property
    def remaining_s(self) -> float:
        """Seconds until then, 0 afterwards."""
        return max(0.0, self._at_s - self._clock_s())

    @property
    def expired(self) -> bool:
        return self._clock_s() > self._at_s
