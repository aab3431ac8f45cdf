"""A migration is whole or taken back: what it copies, publishes and retires, and in which order."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from actors.control import shards
from actors.control.desired import Change
from actors.control.migration import KEPT_CHANGES, At, History, Migration
from trinity.config import PlacementConfig, preset
from trinity.errors import StepConflict, Unavailable, VersionGone
from trinity.placement.table import PlacementTable
from trinity.rpc.messages import Copy

LAYERS, NUM_EXPERTS = (1, 3), 6
TWO = PlacementTable.spread(LAYERS, NUM_EXPERTS, ["shard-0", "shard-1"])


class World:
    """Shards that note what is asked of them, and a table that counts its epochs. `fails` raises at the n-th call of a name."""

    def __init__(self, trains=False, keep=(), fails=None):
        self.calls, self.fails, self.lock = [], fails or {}, threading.Lock()
        self.state, self.table = self, TWO
        self.spec = SimpleNamespace(trains=trains, expert_bytes=1, model=preset("tiny"))
        self.settings, self.handles = SimpleNamespace(drain_s=0.0, watch_every_s=0.0), {}
        self.ledger = SimpleNamespace(keep=lambda: keep, line=0)
        self.there = frozenset({"shard-0"})
        self.tables = [TWO]

    def _called(self, name, what):
        with self.lock:
            self.calls.append((name, what))
            num = sum(called == name for called, _ in self.calls)
        error = self.fails.get((name, num))
        if error is not None:
            raise error

    def take(self, names):
        self._called("take", names)

    def drop_leftovers(self, table, shards):
        self._called("drop_leftovers", (table.epoch, frozenset(shards)))

    def ask(self, shard, verb, message):
        self._called(verb, (shard, message))
        return 10 * len(message.experts)

    def deadline(self):
        return 0.0

    def publish(self, table):
        self._called("publish", table)
        assert table.epoch == self.table.epoch + 1
        self.table = table
        self.tables.append(table)

    def tidy(self, table):
        self._called("tidy", table.epoch)

    def look(self, table, handles, timeout_s):
        self._called("look", table.epoch)


GROWN = Change(
    PlacementTable.spread(LAYERS, NUM_EXPERTS, ("shard-0", "shard-1", "shard-2"), TWO.epoch + 1), ("shard-2",), "more"
)


def test_shards_are_told_how_much_time_is_left(monkeypatch):
    """Not until when: their clock is another."""
    monkeypatch.setattr(shards, "ask", lambda ref, timeout_s, who: ref)
    asking = shards.Shards(SimpleNamespace(settings=PlacementConfig(), namespace="any"), None)
    asking.handles["shard-0"] = SimpleNamespace(handle=SimpleNamespace(remote=lambda verb, message: message))
    told = asking.ask("shard-0", "copy", Copy(1, (0,), ("shard-1",), 0, asking.deadline(), 0, 2))
    assert 0 < told.deadline_s <= PlacementConfig().call_timeout_s


def migrated(world, at):
    history = History()
    migration = Migration(world, world, GROWN, at, history)
    error = None
    try:
        migration.run()
    except Exception as found:
        error = found
    return migration, history.views[-1], error


def test_a_migration_copies_then_publishes_then_retires():
    world = World()
    migration, view, error = migrated(world, At(0))
    assert error is None
    assert migration.is_published
    names = [name for name, _ in world.calls]
    assert names == ["take", "drop_leftovers", *["copy"] * names.count("copy"), "publish", "tidy", "look"]
    copied = [
        (shard, m.layer, e, s) for _, (shard, m) in world.calls[2:-3] for e, s in zip(m.experts, m.sources, strict=True)
    ]
    assert {(shard, layer, e) for shard, layer, e, _ in copied} == {
        (copy.shard, *copy.expert) for copy in migration.moves.copies
    }
    assert {source for _, _, e, source in copied if TWO.holders((1, e)) == (1,)} == {""}, "shard-1 is not there"
    assert (view.phase, view.num_copies, view.copied_bytes) == ("done", len(copied), 10 * len(copied))
    assert world.tables == [TWO, GROWN.table]


@pytest.mark.parametrize("name", ["take", "drop_leftovers", "copy", "publish"])
@pytest.mark.parametrize("error", [Unavailable("away"), RuntimeError("a bug")])
def test_what_fails_before_it_is_published_is_taken_back_under_an_epoch_of_its_own(name, error):
    world = World(fails={(name, 1): error})
    _, view, found = migrated(world, At(0))
    assert found is error
    assert view.phase == "rolled back"
    assert world.tables == [TWO, TWO.renewed()], "the epoch that failed is not used again for another table"
    assert world.calls[-1] == ("tidy", TWO.epoch + 1)


def test_what_fails_after_it_was_published_stays():
    error = Unavailable("away")
    world = World(fails={("tidy", 1): error})
    migration, view, found = migrated(world, At(0))
    assert found is error
    assert migration.is_published
    assert view.phase == "retire"
    assert world.tables == [TWO, GROWN.table]


def test_older_versions_are_copied_where_they_are_kept():
    world = World(trains=True, keep=(3,))
    _, _, error = migrated(world, At(9, 5))
    assert error is None
    messages = [what[1] for name, what in world.calls if name == "copy"]
    copies = [(message.version, message.num_updates) for message in messages]
    assert set(copies) == {(9, 5), (8, 0), (3, 0)}
    num = copies.count((9, 5))
    gone = World(trains=True, keep=(3,), fails={("copy", num + 1): VersionGone("gone")})
    assert migrated(gone, At(9, 5))[2] is None
    refused = World(trains=True, keep=(3,), fails={("copy", num + 1): StepConflict("no")})
    assert isinstance(migrated(refused, At(9, 5))[2], StepConflict)


def test_history_keeps_the_latest():
    history = History()
    for n in range(KEPT_CHANGES + 7):
        history.begin(replace(GROWN, reason=str(n)), TWO, n)
        history.phase("done", n)
    assert [view.reason for view in history.views] == [str(n) for n in range(7, KEPT_CHANGES + 7)]
    assert {view.phase for view in history.views} == {"done"}
