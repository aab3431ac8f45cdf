"""`trinity bench attention` runs, and its arms agree before any time counts."""

import argparse

import pytest

from trinity.bench import attention
from trinity.errors import TrinityError


def measured(*flags):
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    attention.flags(parser)
    return attention.measure(parser.parse_args(["--quick", *flags]))


def test_quick():
    report = measured("--keys", "70,130")
    [table] = report.tables
    assert len(table.rows) == 2 * 2 * 2 * 3
    assert all(milliseconds >= 0 for *_, milliseconds, _ in table.rows)
    assert len(report.targets) == 4


def test_answers_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setattr(attention, "_library", lambda q, k, v, end_T: q)
    with pytest.raises(TrinityError, match="apart in float32"):
        measured()
