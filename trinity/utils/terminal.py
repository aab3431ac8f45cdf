"""Words to the person at the terminal, beside what a command prints as its result."""

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOOK_S = 0.25


def say(text: str) -> None:
    """Print a line to stderr at once."""
    print(text, file=sys.stderr, flush=True)


def occasionally(tell: Callable[[str], object], every_s: float = 5.0) -> Callable[[str, bool], None]:
    """Tell a text at most so often, and always when it `is_last`."""
    told_s = -math.inf

    def now_and_then(text: str, is_last: bool) -> None:
        nonlocal told_s
        if is_last or time.monotonic() - told_s >= every_s:
            told_s = time.monotonic()
            tell(text)

    return now_and_then


@contextmanager
def progress(what: str, num_bytes: int) -> Iterator[Callable[[int], object]]:
    """Give what is told of bytes that are done: on a terminal a bar up to `num_bytes`, elsewhere nothing is shown."""
    if not (what and sys.stderr.isatty()):
        yield int
        return
    from tqdm import tqdm  # only here: `--help` is quick

    with tqdm(total=num_bytes, desc=what, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar.update


@contextmanager
def watched(what: str, look: Callable[[], tuple[int, int] | Exception]) -> Iterator[None]:
    """While the block runs, show on a terminal a bar of the bytes that are done, of how many: `look()`, asked on a thread of
    its own. An error of it is not shown. Elsewhere nothing is asked."""
    if not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        ended = threading.Event()
        thread = threading.Thread(target=_follow, args=(bar, look, ended), name="trinity-bar", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(LOOK_S)  # it may wait for one who is away
        bar.n = bar.total or 0


def _follow(bar: Any, look: Callable[[], tuple[int, int] | Exception], ended: threading.Event) -> None:
    while not ended.wait(LOOK_S):
        found = look()
        if not isinstance(found, Exception) and not ended.is_set():
            bar.n, bar.total = found
            bar.refresh()


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def show_info(name: str) -> None:
    """Say what the logger of that name logs, from INFO on. Harmless when repeated."""
    log = logging.getLogger(name)
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, _Said) for handler in log.handlers):
        log.addHandler(_Said())
        log.propagate = False
