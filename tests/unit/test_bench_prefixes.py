"""The loads of `trinity bench serve --prefixes`, and the ideal that hits are held against."""

import numpy as np
import pytest

from trinity.bench import prefixes
from trinity.bench.prefixes import ALONE, CHAT, DRAWN, OFF, ON, QUICK, SHARED, Talk


def test_a_conversation_begins_with_all_that_was_said():
    talk = Talk(0, [[1], [2, 3]], grows=True)
    assert talk.next() == [1]
    talk.said = [*talk.said, 9]
    assert (talk.next(), talk.next()) == ([1, 9, 2, 3], None)


def test_the_ideal_is_all_that_was_there_before_but_the_last_token():
    prompts = {"a": [1, 2, 3], "b": [1, 2, 3], "c": [1, 2, 3, 7, 8], "d": [2, 3]}
    answers = {"a": [7], "b": [], "c": [], "d": []}
    assert prefixes.ideal(prompts, answers) == (0 + 2 + 4 + 0) / 13


@pytest.mark.parametrize(("load", "ideal"), [(CHAT, 0.0), (SHARED, 0.7), (DRAWN, 0.8), (ALONE, 0.0)])
def test_loads_share_what_they_say(load, ideal):
    talks = prefixes.talks_of(load, QUICK, 1 << 30, np.random.default_rng(0))
    asked = {f"{talk.number}.{i}": part for talk in talks for i, part in enumerate(talk.parts)}
    assert prefixes.ideal(asked, {name: [] for name in asked}) == pytest.approx(ideal, abs=0.13)
    assert all(talk.grows == (load == CHAT) for talk in talks)


def test_both_arms_take_turns_and_say_what_was_spared():
    found = prefixes._alternated(SHARED, QUICK)
    [on], [off] = found[ON], found[OFF]
    assert on.num_computed < 0.5 * off.num_computed
    assert (off.hit_rate, on.hit_rate) == (0.0, pytest.approx(on.ideal, abs=0.1))
    assert on.answers == off.answers
    assert prefixes._row(SHARED, ON, [on])[:2] == (SHARED, ON)
