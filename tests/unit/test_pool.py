"""What a pool asks of all its shards at once, while shards come and go."""

import threading
from collections import Counter
from types import SimpleNamespace

import pytest

from tests.waiting import until
from trinity.dispatch.transport import Done
from trinity.errors import StepConflict, Unavailable
from trinity.placement.table import PlacementTable
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Stage, StepReport

BEFORE, AFTER = (PlacementTable.spread((1,), 4, shards, epoch) for epoch, shards in ((1, ("a", "b")), (2, ("a", "c"))))
STAGE = Stage(1, {"muon": 0.1}, 1.0)


class Shards:
    """A transport: `away` ones do not answer; `asked` counts what was sent to whom."""

    def __init__(self, away=()):
        self.away, self.asked, self.answers = away, Counter(), {"prepare": StepReport(1, 2, 1.0), "stage": True}

    def send(self, shard, verb, message):
        self.asked[shard] += 1
        return Done(error=Unavailable(f"{shard} is away")) if shard in self.away else Done(self.answers[verb])


def waiting(call):
    """-> (thread, what it raised) of a call that is under way."""
    raised = []

    def run():
        with pytest.raises(StepConflict) as error:
            call()
        raised.append(error.value.message)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


@pytest.mark.parametrize("away", ["a", "b"])
def test_nobody_waits_for_a_shard_that_left_the_pool(away):
    """Neither for it, nor for another one that asks it for gradients and so does not answer either."""
    view, shards = SimpleNamespace(table=BEFORE), Shards(away)
    pool = ExpertPool(view, shards, timeout_s=3600)
    for call in (lambda: pool.prepare(1, Counter(a=2, b=2)), lambda: pool.stage(STAGE)()):
        view.table = BEFORE
        shards.asked.clear()
        thread, raised = waiting(call)
        until(lambda: shards.asked[away] > 2)
        assert not raised, "it may come back"
        view.table = AFTER
        thread.join(60)
        assert [said.split(" while ")[0] for said in raised] == ["b left the pool"]


def test_a_table_that_changes_while_all_answer_changes_no_answer():
    view, shards = SimpleNamespace(table=BEFORE), Shards()
    send = shards.send

    def changing(*call):
        view.table = PlacementTable.spread((1,), 4, ("c",), 3)
        return send(*call)

    shards.send = changing
    assert ExpertPool(view, shards, timeout_s=60).prepare(1, Counter(a=2, b=2)) == [StepReport(1, 2, 1.0)] * 2


def test_whoever_comes_back_in_time_is_waited_for():
    view, shards = SimpleNamespace(table=BEFORE), Shards("b")
    send = shards.send

    def back_soon(shard, *call):
        shards.away = "b" if shards.asked["b"] < 3 else ""
        return send(shard, *call)

    shards.send = back_soon
    assert ExpertPool(view, shards, timeout_s=60).stage(STAGE)() is True
    assert shards.asked["b"] == 4
