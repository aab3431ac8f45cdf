"""Work shared out among threads: each takes the next chunk, so that one that is held up leaves its share to the others."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch

from trinity.utils.niceness import of_this_thread

CHUNKS_PER_THREAD = 4
ALONE = 1 << 21  # operations that are done before another thread has woken up


def in_threads(num: int, operations: int, run: Callable[[int, int], None]) -> None:
    """run(first, last) over [0, num) in chunks, on torch's number of threads; on this one if there is little to do."""
    num_threads = min(torch.get_num_threads(), num)
    if num_threads == 1 or operations < ALONE:
        return run(0, num)
    size = max(1, -(-num // (num_threads * CHUNKS_PER_THREAD)))
    starts = itertools.count(0, size)

    def work() -> None:
        while (first := next(starts)) < num:
            run(first, min(num, first + size))

    helpers = [_pool(num_threads - 1, of_this_thread()).submit(work) for _ in range(num_threads - 1)]
    work()
    for helper in helpers:
        helper.result()


class Job(NamedTuple):
    """Work on a stack of matrices and their rows: `run(first, last)` over its units, of which each matrix has as many.
    `is_compiled`: any thread may run it."""

    num_units: int
    operations: int
    run: Callable[[int, int], None]
    is_compiled: bool = True


def in_turn(num_matrices: int, jobs: Sequence[Job]) -> None:
    """Do all jobs, where there are many matrices one matrix after the other: what a job has read is in a core's cache for the
    next. Each job may need what those before it have made of the same matrix."""
    if num_matrices < CHUNKS_PER_THREAD * torch.get_num_threads() or not all(job.is_compiled for job in jobs):
        for job in jobs:
            is_compiled, num = job.is_compiled, num_matrices * job.num_units
            in_threads(num, job.operations, job.run) if is_compiled else job.run(0, num)
        return

    def work(first: int, last: int) -> None:
        for matrix in range(first, last):
            for job in jobs:
                job.run(matrix * job.num_units, (matrix + 1) * job.num_units)

    in_threads(num_matrices, sum(job.operations for job in jobs), work)


def side_by_side(jobs: Sequence[Job]) -> None:
    """Do all jobs, each of one matrix, in any order: threads are handed work once for all."""
    units = list(itertools.accumulate((job.num_units for job in jobs), initial=0))

    def run(first: int, last: int) -> None:
        for job, begin, stop in zip(jobs, units, units[1:], strict=False):
            if first < stop and last > begin:
                job.run(max(first, begin) - begin, min(last, stop) - begin)

    in_threads(units[-1], sum(job.operations for job in jobs), run)


@cache
def _pool(num_threads: int, priority: tuple[int, int]) -> ThreadPoolExecutor:
    """Threads that one of that priority has started."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="trinity-exact")
