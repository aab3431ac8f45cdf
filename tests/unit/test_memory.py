"""Hints to the kernel change where memory lies, never what is in it."""

import ctypes
import errno
import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actors.shard import _environment
from trinity.config import OptimConfig, PlacementConfig, preset
from trinity.experts.spec import ShardSpec
from trinity.utils import hugepages
from trinity.utils.hugepages import HUGE_BYTES, ONE_HEAP, keep_freed_memory, on_huge_pages, regather

HAS_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.parametrize("num_bytes", [0, 100, HUGE_BYTES - 4, 3 * HUGE_BYTES])
def test_huge_pages_keep_every_value(num_bytes):
    tensor = torch.arange(num_bytes // 4, dtype=torch.float32)
    assert on_huge_pages(tensor) is tensor
    assert torch.equal(tensor, torch.arange(num_bytes // 4, dtype=torch.float32))


@pytest.mark.skipif(
    not HAS_HUGE.is_file() or "[madvise]" not in HAS_HUGE.read_text(),
    reason="huge pages are not the program's choice here",
)
def test_fresh_memory_takes_few_faults():
    """Fewer than unasked, or the kernel counts that it was asked and had no huge pages to give."""

    def faults_of(make) -> int:
        fresh = mmap.mmap(-1, 64 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor, before = make(torch.frombuffer(fresh, dtype=torch.uint8)), faults()
        tensor.zero_()
        return faults() - before

    def refused() -> int:
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(counts["thp_fault_fallback"])

    unasked, before = faults_of(lambda tensor: tensor), refused()
    assert faults_of(on_huge_pages) < 0.75 * unasked or refused() > before


@pytest.mark.skipif(not HAS_HUGE.is_file() or "[never]" in HAS_HUGE.read_text(), reason="there are no huge pages here")
def test_what_was_written_on_small_pages_moves_to_huge_ones_with_its_values():
    """Or the kernel has none, and whoever holds memory that it needs is asked for it, once."""
    small = mmap.mmap(-1, 8 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(small, dtype=torch.int64).copy_(torch.arange(8 * HUGE_BYTES // 8))

    def on_huge() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("AnonHugePages")).split()[1]) << 10

    before, asked = on_huge(), []
    regather([tensor, tensor[5:]], lambda: asked.append(True))
    assert torch.equal(tensor, torch.arange(8 * HUGE_BYTES // 8))
    assert on_huge() - before >= 6 * HUGE_BYTES or asked == [True]


def test_a_kernel_without_huge_pages_to_give_is_asked_again_when_there_is_room(monkeypatch):
    given, asked = [], []

    class Kernel:
        def madvise(self, address, num_bytes, advice):
            ctypes.set_errno(errno.ENOMEM)
            asked.append(advice)
            return 0 if given else -1

    monkeypatch.setattr(hugepages, "_libc", lambda: Kernel())
    regather([torch.zeros(64 * HUGE_BYTES, dtype=torch.uint8)], lambda: given.append(True))
    assert given == [True], "whoever holds memory is asked once"
    assert hugepages.REFUSALS + 63 <= len(asked) <= hugepages.REFUSALS + 64, "and the kernel not for ever"


AGAIN = """
import ctypes, resource, sys, threading
from trinity.utils.hugepages import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "keep": keep_freed_memory()
def passes():
    for _ in range(6):
        block = libc.malloc(48 << 20)
        ctypes.memset(block, 1, 48 << 20)
        libc.free(block)
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for run in (passes, lambda: [t := threading.Thread(target=passes), t.start(), t.join()]):
    passes(); before = faults(); run(); print(faults() - before)
"""


def test_freed_memory_is_used_again_by_every_thread():
    there, here = freed("give back", {}), freed("keep", ONE_HEAP)
    pages = 6 * (48 << 20) // 4096
    assert min(there) > pages / 2, "malloc keeps large blocks by itself here: keep_freed_memory is not needed"
    assert max(here) < pages / 10
    keep_freed_memory()  # harmless in this process, too


def freed(how, env):
    """Page faults of a process that allocates and frees again: in its main thread, and in another."""
    command = [sys.executable, "-c", AGAIN, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **env})
    return [int(n) for n in done.stdout.split()]


HEAPS = """
import ctypes, sys, threading
from trinity.utils.hugepages import share_heaps
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
if sys.argv[1] == "share": share_heaps()
found, all_there = set(), threading.Barrier(8)
def allocate():
    all_there.wait()
    found.add(libc.malloc(100_000) >> 26)
    all_there.wait()
threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found))
"""


def test_threads_share_heaps_where_they_are_asked_to():
    """Heaps of glibc are 64 MiB of addresses each; the first one lies elsewhere and may reach over a border."""

    def heaps_of(how: str) -> int:
        command = [sys.executable, "-c", HEAPS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert heaps_of("apart") >= 4, "threads have no heaps of their own here: share_heaps is not needed"
    assert heaps_of("share") <= 2


RETURNED = """
import ctypes
from pathlib import Path
from trinity.utils.hugepages import keep_freed_memory, return_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def mib(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
keep_freed_memory()
block = libc.malloc(256 << 20)
ctypes.memset(block, 1, 256 << 20)
libc.free(block)
kept = mib()
return_freed_memory()
print(kept, mib())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no other system says how much a process holds")
def test_freed_memory_goes_back_when_asked():
    done = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True)
    kept, after = map(int, done.stdout.split())
    assert kept > 256
    assert after < kept - 200


@pytest.mark.parametrize(
    ("optim", "num_threads", "wanted"),
    [
        (None, 1, {}),
        (OptimConfig(), 1, ONE_HEAP),
        (None, 2, {"OMP_NUM_THREADS": "2"}),
        (OptimConfig(), 2, {"OMP_NUM_THREADS": "2", **ONE_HEAP}),
    ],
)
def test_a_shard_starts_with_an_environment_of_its_own_only_where_that_matters(optim, num_threads, wanted):
    """One that serves, with one thread, starts half a second sooner without."""
    spec = ShardSpec("shard-0", preset("tiny"), {}, optim)
    found = _environment(spec, PlacementConfig(num_threads_per_shard=num_threads))
    assert found == ({"runtime_env": {"env_vars": wanted}} if wanted else {})
