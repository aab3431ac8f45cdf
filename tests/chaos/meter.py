"""What the processes of a server hold over time: memory, threads, descriptors, as Linux counts them."""

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Sample(NamedTuple):
    """`own_mib`: what is in no file. Pages of files leave and come back as other programs of the machine need memory."""

    at_s: float
    name: str
    rss_mib: float
    own_mib: float
    num_threads: int
    num_descriptors: int


class Growth(NamedTuple):
    """A process between the first and the last quarter of its time: medians of each. It grows by what is in no file."""

    name: str
    pid: int
    rss_mib: float
    mib_per_hour: float
    num_threads: tuple[int, int]
    num_descriptors: tuple[int, int]


class Meter:
    """Samples a process and all that descend from it."""

    def __init__(self, root: int):
        self.root, self.samples = root, defaultdict(list)

    def sample(self) -> None:
        now_s = time.monotonic()
        for pid in family(self.root):
            with suppress(OSError, IndexError):  # it has ended
                self.samples[pid].append(_sample(pid, now_s))

    @contextmanager
    def running(self, every_s: float) -> Iterator[None]:
        """Sample on a thread inside the block."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(every_s):
                self.sample()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def growth(self, since_s: float = 0.0) -> list[Growth]:
        """Of the processes that were there from that moment of time.monotonic() until now."""
        last_s = max(samples[-1].at_s for samples in self.samples.values())
        found = []
        for pid, samples in self.samples.items():
            counted = [sample for sample in samples if sample.at_s >= since_s]
            if samples[-1].at_s == last_s and samples[0].at_s <= max(
                since_s, min(s[0].at_s for s in self.samples.values())
            ):
                found.append(_growth(pid, counted))
        return sorted(found)


def family(root: int) -> list[int]:
    """The process and all that descend from it."""
    children = defaultdict(list)
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):
            children[int((folder / "stat").read_text().rpartition(")")[2].split()[1])].append(int(folder.name))
    found = [root]
    for pid in found:
        found += children[pid]
    return found


def _sample(pid: int, now_s: float) -> Sample:
    status = dict(line.split(":", 1) for line in (PROC / str(pid) / "status").read_text().splitlines())
    words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    title = " ".join(words).strip()
    name = title.split(".")[0] if title.startswith("ray::") else _program(words)
    descriptors = sum(1 for _ in (PROC / str(pid) / "fd").iterdir())
    rss, anonymous, shared = (int(status[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon", "RssShmem"))
    return Sample(now_s, name, rss, anonymous + shared, int(status["Threads"]), descriptors)


def _program(words: list[str]) -> str:
    """The script or module of a Python process, or the program's own name."""
    scripts = [word for word in words[1:] if word.endswith(".py") or word.startswith("trinity.")]
    return Path(scripts[0] if scripts and "python" in words[0] else words[0]).name


def _growth(pid: int, samples: list[Sample]) -> Growth:
    quarter = max(1, len(samples) // 4)
    first, last = samples[:quarter], samples[-quarter:]

    def both(field: str) -> tuple[float, float]:
        before, after = (statistics.median(getattr(sample, field) for sample in part) for part in (first, last))
        return before, after

    (before_s, after_s), (before_mib, after_mib), (_, rss_mib) = both("at_s"), both("own_mib"), both("rss_mib")
    slope = (after_mib - before_mib) / max(1e-9, after_s - before_s) * 3600
    threads, descriptors = (tuple(map(int, both(field))) for field in ("num_threads", "num_descriptors"))
    return Growth(samples[-1].name, pid, rss_mib, slope, threads, descriptors)
