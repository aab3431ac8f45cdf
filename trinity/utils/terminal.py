"""Words to the person at the terminal, beside what a command prints as its result."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    """Print a line to stderr at once."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, num_bytes: int) -> Iterator[Callable[[int], object]]:
    """Give what is told of bytes that are done: on a terminal a bar up to `num_bytes`, elsewhere nothing is shown."""
    if not (what and sys.stderr.isatty()):
        yield int
        return
    from tqdm import tqdm  # only here: `--help` is quick

    with tqdm(total=num_bytes, desc=what, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar.update


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
