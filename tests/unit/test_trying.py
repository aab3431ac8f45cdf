"""Retries end with an answer, an error of another kind, or the deadline; an error as a value is the one that was raised."""

import itertools
from types import SimpleNamespace

import pytest

from trinity.errors import DeadlineExceeded, StepConflict, Unavailable
from trinity.utils import trying
from trinity.utils.trying import retrying, tried


@pytest.fixture
def clock(monkeypatch):
    """Time passes in `sleep` only; -> the pauses that were made."""
    pauses = []
    clock = SimpleNamespace(monotonic=lambda: 1000.0 + sum(pauses), sleep=pauses.append)
    monkeypatch.setattr(trying, "time", clock)
    return pauses


def failing(*answers):
    """Raises or returns one after the other, then the last one for ever; `.num` counts the calls."""
    left = itertools.chain(answers, itertools.repeat(answers[-1]))

    def call():
        call.num += 1
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return answer

    call.num = 0
    return call


def test_the_first_answer_costs_no_wait(clock):
    assert retrying(failing(7), 1000.0) == 7
    assert clock == []


def test_pauses_double_up_to_the_longest(clock):
    call = failing(*[Unavailable("away")] * 8, "there")
    assert retrying(call, 1100.0) == "there"
    assert clock == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("left_s", [0.0, 0.04, 0.05, 0.06, 0.5, 3.0, 17.3])
def test_the_last_error_is_raised_before_the_deadline(clock, left_s):
    call = failing(Unavailable("first"), Unavailable("later"))
    with pytest.raises(Unavailable, match="first" if left_s <= 0.05 else "later"):
        retrying(call, 1000.0 + left_s)
    assert sum(clock) < left_s or not clock
    assert call.num == len(clock) + 1


def test_another_error_is_raised_at_once(clock):
    for error in (StepConflict("no"), DeadlineExceeded("late")):
        call = failing(error)
        with pytest.raises(type(error)):
            retrying(call, 1e9)
        assert call.num == 1
    assert retrying(failing(DeadlineExceeded("late"), 3), 1e9, (Unavailable, DeadlineExceeded)) == 3


def test_the_first_try_may_be_another_one(clock):
    first, call = failing(Unavailable("lost")), failing(Unavailable("away"), "there")
    assert retrying(call, 1e9, first=first) == "there"
    assert (first.num, call.num) == (1, 2)
    assert retrying(failing("no"), 1e9, first=failing("at once")) == "at once"


def test_an_error_as_a_value():
    error = Unavailable("away")
    assert tried(failing(error), Unavailable) is error
    assert tried(failing(3), Unavailable) == 3
    with pytest.raises(Unavailable):
        tried(failing(error), StepConflict, KeyError)
    assert tried(failing(error), StepConflict, Unavailable) is error
