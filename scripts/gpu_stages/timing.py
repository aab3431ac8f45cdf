"""Median seconds of what a device does, by the clocks of `trinity bench experts`."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from trinity.bench.expert_timing import CudaClock, HostClock


def median_s(run: Callable[[], Any], device: str, rounds: int) -> float:
    """Each round on its own, after two that do not count."""
    clock = CudaClock() if device == "cuda" else HostClock()
    laps = []
    for _ in range(rounds + 2):
        clock.synchronize()
        start = clock.mark()
        run()
        laps.append(clock.laps(start, clock.mark())[0])
    return statistics.median(laps[2:])


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
