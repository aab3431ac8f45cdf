"""Work shared out among threads: each takes the next chunk, so that one that is held up leaves its share to the others."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

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


@cache
def _pool(num_threads: int, priority: tuple[int, int]) -> ThreadPoolExecutor:
    """Threads that one of that priority has started."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="trinity-exact")
