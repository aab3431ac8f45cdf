"""Costs of the kernel's pages, and how not to pay them: huge pages for weights, freed memory kept for the next step, zeros that
take none until they are written.

Decisions: the first two are hints to Linux with glibc and do nothing elsewhere. Huge pages are for what is allocated once and
read in each pass; zeroing them again and again, as for gradients, costs more than it brings.
"""

import ctypes
import errno
import gc
import math
import mmap
import platform
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HUGE_BYTES = 2 << 20
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
MADV_COLLAPSE = 25  # mman.h of Linux 6.1
REFUSALS = 16  # in a row, after which nothing more is asked for
ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}  # at a process's start: threads share the heap, and so what is kept
# and give large blocks back when they are freed: a heap is as large as its threads' largest moments all together otherwise
FLAT_HEAP = {**ONE_HEAP, "MALLOC_MMAP_THRESHOLD_": str(256 << 10)}


def on_huge_pages(tensor: "Tensor") -> "Tensor":
    """The tensor, its memory asked to be huge pages where it has not been touched yet. Fewer address translations:

    experts with a few rows each are read 1.15 to 1.25 times as fast (2 threads, 700 MB of weights).
    """
    libc = _libc()
    if tensor.is_cpu and libc is not None and hasattr(mmap, "MADV_HUGEPAGE"):
        first = -(-tensor.data_ptr() // HUGE_BYTES) * HUGE_BYTES
        size = (tensor.data_ptr() + tensor.nbytes - first) // HUGE_BYTES * HUGE_BYTES
        if size > 0:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return tensor


def regather(tensors: "Iterable[Tensor]", make_room: Callable[[], object]) -> None:
    """Move weights in the CPU's memory onto huge pages where the kernel had none to give when they were first written: what was
    read fills its cache of files. `make_room` is called once, if it still has none, to have it let go of that.

    With 20 GB of files in the cache 70 % of 7 GB of weights were on huge pages after loading, and 95 to 100 % after this.
    """
    libc = _libc()
    places = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.is_cpu}
    if libc is not None and not all(_collapsed(libc, *place) for place in places.items()):
        make_room()
        for place in places.items():
            _collapsed(libc, *place)


def _collapsed(libc: ctypes.CDLL, address: int, num_bytes: int) -> bool:
    """Ask for huge pages in that memory; -> False where there were none. Memory that cannot have any has all that it can."""
    refusals = 0
    for place in range(-(-address // HUGE_BYTES), (address + num_bytes) // HUGE_BYTES):
        where = (ctypes.c_void_p(place * HUGE_BYTES), ctypes.c_size_t(HUGE_BYTES))
        if libc.madvise(*where, MADV_COLLAPSE) == 0:
            refusals = 0
        elif (refusals := refusals + 1) == REFUSALS or ctypes.get_errno() == errno.EINVAL:
            break
    return refusals == 0 or ctypes.get_errno() != errno.ENOMEM


def empty(shape: Sequence[int], dtype: "torch.dtype", device: str) -> "Tensor":
    """Memory whose values are anything, on huge pages where it is the CPU's."""
    import torch

    return on_huge_pages(torch.empty(*shape, dtype=dtype, device=device))


def lazy_zeros(shape: Sequence[int], dtype: "torch.dtype") -> "Tensor":
    """Zeros on the CPU whose pages take no memory before they are written to, where the system has such."""
    import torch

    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(*shape, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def keep_freed_memory() -> None:
    """Keep large blocks that are freed, in a process that trains. Other threads' only where ONE_HEAP was set.

    glibc returns them to the kernel at once, which zeroes pages anew for the gradients of each step: an eighth of its time on
    the `bench` model (sys 2.8 s of 16 s, then 0.6 s).
    """
    libc = _libc()
    if libc is not None:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)


def share_heaps() -> None:
    """Have threads that come from now on allocate from the heaps that are there: where each has its own, a process of many
    threads grows until all of them have had their largest moment. For processes that start without ONE_HEAP."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Give back to the machine what `keep_freed_memory` has kept."""
    gc.collect()
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(ctypes.c_size_t(0))


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if platform.libc_ver()[0] == "glibc" else None
