"""Pins of versions: each holds as long as it is renewed, whatever the time of day does."""

import json
import threading
from types import SimpleNamespace

import pytest

from actors.control import ledger as ledgers
from actors.control.ledger import Ledger
from trinity.errors import VersionGone
from trinity.utils.lines import named


@pytest.fixture
def clock(monkeypatch):
    """-> a list with the time of the clock that the ledger sees."""
    now = [1000.0]
    monkeypatch.setattr(ledgers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def opened(tmp_path, clock):
    """-> open(): the ledger over what is on the disk. Version 5 is the newest."""
    tree = {"decision": {"version": 5, "notes": {}}, "good": 5}
    (tmp_path / "record.json").write_text(json.dumps(tree))
    return lambda: Ledger(tmp_path, threading.Condition())


def test_a_pin_holds_until_its_lease_ends_and_longer_where_it_is_renewed(opened, clock):
    ledger = opened()
    ledger.pin(4, "one", 10.0)
    ledger.pin(4, "other", 10.0)
    clock[0] += 9
    ledger.pin(4, "other", 10.0)
    clock[0] += 2
    assert set(ledger.pins()) == {"other"}
    assert ledger.keep() == (4,)
    clock[0] += 9
    assert ledger.keep() == ()


def test_after_a_restart_it_holds_for_as_long_again(opened, clock):
    opened().pin(4, "one", 10.0)
    clock[0] = 3.0  # another host's clock
    again = opened()
    assert again.keep() == (4,)
    clock[0] += 11
    assert again.keep() == ()
    with pytest.raises(VersionGone):
        again.pin(3, "one", 10.0)
    again.unpin("nobody")  # whatever is written next
    assert opened().keep() == (), "what has ended does not begin again"


def test_a_file_of_before_is_read(tmp_path, opened):
    opened()
    file = tmp_path / "record.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps({**tree, "pins": {"one": {"version": 4, "until_s": 1.7e9}}}))
    assert opened().keep() == (4,)


def test_what_was_pinned_before_the_run_went_back_is_not_the_same_step_now(tmp_path):
    ledger = Ledger(tmp_path, threading.Condition())
    assert (ledger.serving, ledger.line) == (-1, 0)
    first = ledger.new_line()
    ledger.begin(5, {"is_source": True})
    before = ledger.pin(5, "one", 10.0)
    assert before == ledger.serving == named(first, 5)
    second = ledger.new_line()
    assert (ledger.serving, ledger.next_line) == (before, second), "shards load; nothing is decided yet"
    ledger.begin(4, {})
    ledger.decide(5, ledger.new_attempt(4), {})
    assert second > first
    assert (ledger.serving, ledger.pins()) == (named(second, 5), {})
    with pytest.raises(VersionGone, match="version 5 has gone: the run went back, and its present version is 5"):
        ledger.pin(before, "one", 10.0)
    assert ledger.quarantine(before) == ledger.serving == named(second, 5), "the damage was another's"
    assert ledger.quarantine(ledger.serving) == named(second, 4)
    assert ledger.pin(None, "one", 10.0) == named(second, 4)
    again = Ledger(tmp_path, threading.Condition())
    assert (again.keep(), again.decision.line, again.line) == ((4,), second, second)
