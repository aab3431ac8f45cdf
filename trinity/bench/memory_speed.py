"""Speed at which the cores of this machine read memory: the best of several loops that do nothing else.

Decisions: memory on huge pages and far larger than any cache; each thread reads a part of its own, as one, two or four streams
side by side, in numbers of 8 bytes, which are added up. A loop's figure is its best of several readings: what disturbs only
makes one slower.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from trinity.ops.batch_invariant.compiled import kernel

NUM_BYTES, READINGS = 512 << 20, 5


def best_read_speed(num_threads: int, num_bytes: int = NUM_BYTES, readings: int = READINGS) -> float:
    """Bytes per second that so many threads read together."""
    import torch

    from trinity.utils.hugepages import empty

    memory = empty((num_bytes // 8,), torch.int64, "cpu").zero_().numpy()
    parts = np.array_split(memory, num_threads)
    with ThreadPoolExecutor(num_threads) as threads:
        return num_bytes / min(_seconds(threads, loop, parts, readings) for loop in (_one, _two, _four))


def _seconds(threads: ThreadPoolExecutor, loop: Any, parts: list[np.ndarray], readings: int) -> float:
    found = []
    for _ in range(readings + 1):  # the first compiles
        begun_s = time.perf_counter()
        list(threads.map(loop, parts))
        found.append(time.perf_counter() - begun_s)
    return min(found[1:])


@kernel
def _one(x):  # type: ignore[no-untyped-def]
    found = 0
    for i in range(len(x)):
        found += x[i]
    return found


@kernel
def _two(x):  # type: ignore[no-untyped-def]
    half = len(x) // 2
    a, b, found = x[:half], x[half : 2 * half], 0
    for i in range(half):
        found += a[i] ^ b[i]
    return found


@kernel
def _four(x):  # type: ignore[no-untyped-def]
    part = len(x) // 4
    a, b, c, d, found = x[:part], x[part : 2 * part], x[2 * part : 3 * part], x[3 * part : 4 * part], 0
    for i in range(part):
        found += (a[i] ^ b[i]) + (c[i] ^ d[i])
    return found
