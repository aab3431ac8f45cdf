"""Shards of a pool that trains and are not at the version that was decided on: caught up, emptied, or the state is lost."""

from types import SimpleNamespace

import pytest

from actors.control.health import ShardSeen, Watch
from actors.control.repair import RepairController
from trinity.errors import StateLost
from trinity.placement.table import PlacementTable
from trinity.pool.ledger import Decision
from trinity.rpc.messages import Recover

BOTH = PlacementTable(1, ("a", "b"), (0,), (((0, 1), (1, 0)),))
APART = PlacementTable(1, ("a", "b"), (0,), (((0,), (1,)),))


def checked(table, seen, answers):
    """What was asked while two shards are looked after, of which each was `seen` at a version. Decided is version 5."""
    asked = []

    def ask(shard, verb, message):
        assert verb == "recover"
        asked.append((shard, message))
        return answers[shard]

    decision = Decision(5, {"attempt": 7})
    state = SimpleNamespace(table=table, ledger=SimpleNamespace(decision=decision))
    watch = Watch(table, 10.0)
    watch.seen = {
        shard: ShardSeen(version is not None, version=-1 if version is None else version)
        for shard, version in seen.items()
    }
    RepairController(SimpleNamespace(state=state, ask=ask), watch).check_recoverable()
    return asked


@pytest.mark.parametrize("table", [BOTH, APART])
def test_who_has_the_version_staged_is_told_to_commit_it(table):
    assert checked(table, {"a": 4, "b": 5}, {"a": 5}) == [("a", Recover(5, 7))]


def test_who_has_another_is_emptied_where_another_shard_can_fill_it():
    """Two that are behind may each have it staged."""
    assert checked(BOTH, {"a": 4, "b": 5}, {"a": -1}) == [("a", Recover(5, 7))]
    assert [shard for shard, _ in checked(BOTH, {"a": 4, "b": 4}, {"a": -1, "b": 5})] == ["a", "b"]
    assert checked(BOTH, {"a": -1, "b": 5}, {}) == []


@pytest.mark.parametrize(
    ("table", "seen", "answers"),
    [
        (APART, {"a": 4, "b": 5}, {"a": -1}),
        (APART, {"a": -1, "b": 5}, {}),
        (BOTH, {"a": 4, "b": 4}, {"a": -1, "b": -1}),
        (BOTH, {"a": 4, "b": None}, {"a": -1}),
    ],
)
def test_what_is_nowhere_is_lost(table, seen, answers):
    with pytest.raises(StateLost, match="not at version 5 any more"):
        checked(table, seen, answers)
