"""One change of the placement: (start ->) prepare -> publish -> drain -> retire.

Decisions: new shards start before it (actors/control/spares.py), and copies are made while the old replicas serve; publishing
the next epoch is the only step that counts. Whatever dies in between, the published table is the truth: what it does not name
is dropped, what a shard lacks of it is copied again. A change that fails before it is published is taken back, under an epoch
of its own: none is used twice.
"""

import logging
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from actors.control.desired import Change
from actors.control.health import Watch
from actors.control.shards import Shards
from trinity.errors import VersionGone
from trinity.placement.planner import Moves, moves
from trinity.placement.snapshot import ChangeView
from trinity.placement.table import PlacementTable
from trinity.rpc.messages import Copy
from trinity.utils.trying import tried

log = logging.getLogger(__name__)
KEPT_CHANGES = 50
START = "start"  # of a change whose shards are starting
Batches = dict[str, dict[int, list[tuple[int, str]]]]  # target -> layer -> (expert, source)


class At(NamedTuple):
    """Which weights are copied: of that version, whose optimizer has made so many updates."""

    version: int
    num_updates: int = 0


class History:
    """The latest changes, as operators see them. Written by one thread; any may read."""

    def __init__(self) -> None:
        self.views: tuple[ChangeView, ...] = ()
        self._began_s = 0.0

    def expect(self, change: Change) -> None:
        """Shards that a change needs are starting."""
        self._add(ChangeView(change.table.epoch, time.time(), 0.0, change.reason, START, 0, 0, 0))

    def begin(self, change: Change, previous: PlacementTable, num_copies: int) -> None:
        """A change is made now, with the shards that were expected, if any were."""
        drops = num_drops(previous, change.table)
        if not self._is_expected:
            self.expect(change)
        *before, last = self.views
        last = replace(last, epoch=change.table.epoch, num_copies=num_copies, num_drops=drops, phase="prepare")
        self.views = (*before, last)

    def give_up(self) -> None:
        """Close what was expected, if anything was: it is not made."""
        if self._is_expected:
            self.phase("rolled back")

    @property
    def _is_expected(self) -> bool:
        return bool(self.views) and self.views[-1].phase == START

    def _add(self, view: ChangeView) -> None:
        self.give_up()
        self._began_s, self.views = time.monotonic(), (*self.views[1 - KEPT_CHANGES :], view)

    def phase(self, phase: str, copied_bytes: int = 0) -> None:
        """The change under way has come so far."""
        *before, last = self.views
        seconds = time.monotonic() - self._began_s
        self.views = (*before, replace(last, phase=phase, seconds=seconds, copied_bytes=copied_bytes))


class Migration:
    """A change under way, between shards that `watch` sees. Each phase may be killed: the next one who looks finds the
    table, and completes it."""

    def __init__(self, shards: Shards, watch: Watch, change: Change, at: At, history: History):
        self.shards, self.watch, self.state, self.change, self.at = shards, watch, shards.state, change, at
        self.history, self.previous = history, shards.state.table
        self.moves = moves(self.previous, change.table, self.state.spec.expert_bytes)
        self.copied_bytes = 0

    @property
    def is_published(self) -> bool:
        return self.state.table is not self.previous

    def run(self) -> None:
        """Raises what prevented it; unless it was published, nothing has changed then."""
        self.history.begin(self.change, self.previous, len(self.moves.copies))
        try:
            self.prepare()
            self.publish()
        except Exception:
            if not self.is_published:
                self.roll_back()
            raise
        self.drain()
        self.retire()
        log.info("epoch %d (%s): %d copies", self.change.table.epoch, self.change.reason, len(self.moves.copies))

    def prepare(self) -> None:
        """Spares become shards, and copies go from shard to shard, while the old replicas serve."""
        self.shards.take(self.change.fresh)
        self.shards.drop_leftovers(self.previous, {copy.shard for copy in self.moves.copies})
        self.copied_bytes = self._copy_all(self.at)
        self.copied_bytes += self._copy_older()

    def publish(self) -> None:
        self.history.phase("drain", self.copied_bytes)
        self.state.publish(self.change.table)

    def drain(self) -> None:
        """Rows that were sent by the table before are still on their way."""
        time.sleep(0 if self.state.spec.trains else self.state.settings.drain_s)

    def retire(self) -> None:
        self.history.phase("retire", self.copied_bytes)
        self.shards.tidy(self.state.table)
        # who waits for the end of a change looks at the shards then
        self.watch.look(self.state.table, self.shards.handles, self.state.settings.watch_every_s)
        self.history.phase("done", self.copied_bytes)

    def roll_back(self) -> None:
        """Drop what was copied for the epoch that failed, under the next one, which is the table before."""
        self.history.phase("rolled back")
        self.state.publish(self.previous.renewed())
        self.shards.tidy(self.state.table)

    # -- copies

    def _copy_older(self) -> int:
        """Weights of the versions that engines may still compute with, where they are kept; -> bytes."""
        version, copied = self.at.version, 0
        for older in {version - 1, *self.state.ledger.keep()} if self.state.spec.trains and version > 0 else ():
            found = tried(partial(self._copy_all, At(older)), VersionGone)
            if isinstance(found, VersionGone):
                log.info("version %d is not copied: %s", older, found)
            else:
                copied += found
        return copied

    def _copy_all(self, at: At) -> int:
        """-> bytes. The targets side by side, each a layer at a time, so that no shard holds more than a layer twice."""
        todo, done, errors = batches(self.moves, self.watch.there), Counter[str](), []

        def fill(shard: str, layers: dict[int, list[tuple[int, str]]]) -> None:
            for layer, pairs in layers.items():
                done[shard] += self._copy_layer(shard, layer, pairs, at)

        def run(shard: str, layers: dict[int, list[tuple[int, str]]]) -> None:
            found = tried(partial(fill, shard, layers), Exception)  # told to the thread that waits
            errors.extend([found] if isinstance(found, Exception) else [])

        threads = [threading.Thread(target=run, args=each, daemon=True) for each in todo.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return done.total()

    def _copy_layer(self, shard: str, layer: int, pairs: list[tuple[int, str]], at: At) -> int:
        experts, sources = zip(*pairs, strict=True)
        about = self.shards.deadline(), at.num_updates, self.change.table.epoch, self.state.ledger.line
        return self.shards.ask(shard, "copy", Copy(layer, experts, sources, at.version, *about))


def batches(todo: Moves, there: frozenset[str]) -> Batches:
    """Copies of each target, from a shard that is there; "" where no such shard has it."""
    found: Batches = {}
    for copy in todo.copies:
        layer, expert = copy.expert
        source = next((s for s in copy.sources if s in there), "")
        found.setdefault(copy.shard, {}).setdefault(layer, []).append((expert, source))
    return found


def num_drops(previous: PlacementTable, table: PlacementTable) -> int:
    """Replicas that the new table leaves out."""

    def held(t: PlacementTable) -> set[tuple[int, int, str]]:
        return {
            (layer, expert, t.shards[at])
            for layer, row in zip(t.layers, t.replicas, strict=True)
            for expert, positions in enumerate(row)
            for at in positions
        }

    return len(held(previous) - held(table))
