"""Bars on a terminal, of what this process does and of what others do while it waits."""

import io

import pytest

from tests.waiting import until
from trinity.errors import Unavailable
from trinity.utils import terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(monkeypatch):
    """-> a function that says what is on it. To be called in the test itself: pytest has its own stderr for each phase."""
    made = Terminal()
    monkeypatch.setattr("sys.stderr", made)
    monkeypatch.setattr(terminal, "LOOK_S", 0.01)
    return made.getvalue


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_bar_is_shown_on_a_terminal_and_nothing_elsewhere(kind, monkeypatch):
    stderr = kind()
    monkeypatch.setattr("sys.stderr", stderr)
    with terminal.progress("reading the experts", 3 << 20) as told:
        told(1 << 20)
        told(2 << 20)
    shown = stderr.getvalue()
    assert ("reading the experts: 100%" in shown and "3.00M/3.00M" in shown) if kind is Terminal else not shown


def test_a_bar_follows_and_ends_whole(monkeypatch):
    shown = screen(monkeypatch)
    told = iter([(0, 0), Unavailable("starting again"), (1 << 20, 4 << 20)])
    with terminal.watched("reading", lambda: next(told, (2 << 20, 4 << 20))):
        until(lambda: "25%" in shown() and "50%" in shown())
    assert "reading: 100%" in shown().split("\r")[-1]
    assert "4.00M/4.00M" in shown()


def test_what_failed_does_not_end_whole(monkeypatch):
    shown = screen(monkeypatch)

    def die():
        until(lambda: "25%" in shown())
        raise Unavailable("a shard died")

    with pytest.raises(Unavailable), terminal.watched("reading", lambda: (1 << 20, 4 << 20)):
        die()
    assert "100%" not in shown()


def test_elsewhere_nobody_is_asked(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with terminal.watched("reading", lambda: pytest.fail("asked")):
        pass
