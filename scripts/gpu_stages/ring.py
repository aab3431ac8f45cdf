"""The put, the ring and the wait of a window in memory that two sides share, as kernels.

Legend: N numbers of a message. The flag counts blocks that have stored; it is added to with release and read with acquire,
system wide. The wait ends after so many looks, and says so, instead of hanging.
"""

import triton
import triton.language as tl


@triton.jit
def put_and_ring(slot_N, x_N, flag, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(slot_N + at, tl.load(x_N + at, mask=at < n), mask=at < n)
    tl.debug_barrier()  # all of the block has stored before one of it rings
    tl.atomic_add(flag, 1, sem="release", scope="sys")


@triton.jit
def wait_and_take(y_N, slot_N, flag, late, n, wanted, max_looks, BLOCK: tl.constexpr):
    looks = 0
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    while (seen < wanted) & (looks < max_looks):
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        looks += 1
    if seen < wanted:
        tl.store(late, 1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_N + at, tl.load(slot_N + at, mask=at < n), mask=at < n)
