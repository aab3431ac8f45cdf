"""The loads of `trinity bench serve --routed`, and both ways to send them."""

import numpy as np
import pytest

from trinity.bench import routing
from trinity.bench.prefixes import ideal, small_model
from trinity.bench.routing import AGENTS, CHAT, IN_TURN, QUICK, ROUTED


@pytest.mark.parametrize(("load", "shared"), [(CHAT, (0.0, 0.0)), (AGENTS, (0.4, 0.8))])
def test_sessions_have_the_traces_shape(load, shared):
    given = QUICK | {"sessions": 60, "input_len": 512}
    talks = routing.sessions(load, given, 1 << 30, np.random.default_rng(0))
    asked = {f"{talk.number}.{i}": part for talk in talks for i, part in enumerate(talk.parts)}
    assert shared[0] <= ideal(asked, {name: [] for name in asked}) <= shared[1]
    assert all(talk.grows == (load == CHAT) for talk in talks)
    last = [sum(map(len, talk.parts)) if talk.grows else len(talk.parts[-1]) for talk in talks]
    assert np.mean(last) == pytest.approx(512, rel=0.25)


async def test_both_arms_answer_alike_and_the_routed_one_computes_less():
    models = [small_model("tiny") for _ in range(2)]
    routed, in_turn = [await routing._turn(AGENTS, arm, models, QUICK, 0) for arm in (ROUTED, IN_TURN)]
    assert routed.answers == in_turn.answers
    assert routed.num_computed < in_turn.num_computed
    assert (in_turn.share, len(routed.ttft_s)) == (0.5, 2 * QUICK["sessions"])
    assert routed.ideal >= routed.hit_rate > in_turn.hit_rate
    assert routing._row(AGENTS, ROUTED, [routed])[:2] == (AGENTS, ROUTED)
