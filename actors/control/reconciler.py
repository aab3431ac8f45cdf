"""The control loop of a pool: look, compare with what is desired, change one thing, and again.

Decisions: one thread, one change at a time; what to change is a pure function (actors/control/desired.py), making the change is
a Migration (actors/control/migration.py). While a pool trains, weights change and gradients gather: then shards are only
repaired, and a change waits for the moment between two steps, `begin_attempt`.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeGuard

import numpy as np
from ray.exceptions import RayError

from actors.control.adapters import Adapters
from actors.control.desired import Change, DesiredState, Rules, Seen, desired_change
from actors.control.health import Watch, draining_nodes, roomy_nodes, shard_view
from actors.control.migration import At, History, Migration
from actors.control.repair import RepairController
from actors.control.scaling import LoadScaling
from actors.control.shards import Shards
from actors.control.state import PoolState
from actors.dataplane.plane import DataPlane
from trinity.errors import TrinityError
from trinity.placement.snapshot import Snapshot
from trinity.placement.table import PlacementTable
from trinity.utils.trying import tried

log = logging.getLogger(__name__)
AGAIN_S = 10.0  # after a change that failed
STARTING_S = 0.5  # between two looks for shards that are starting
# Between two looks for nodes that replicas do not share; after a change that failed.
SPREAD_S, SPREAD_AGAIN_S = 5.0, 60.0


class Reconciler:
    """Makes the pool what it should be. Owns the thread that does; any other may ask."""

    def __init__(self, state: PoolState, plane: DataPlane):
        self.state, self.settings = state, state.settings
        self.shards, self.watch = Shards(state, plane), Watch(state.table, self.settings.window_s)
        self.adapters = Adapters(self.shards)
        self.repair, self.history = RepairController(self.shards, self.watch), History()
        self.desired = Desired(state)
        self.scaling = LoadScaling(self.settings, self.desired.now.num_shards, state.table.num_replicas_LE)
        self.rules = _rules(state)
        self._wake, self._balance_asked, self._changing = threading.Event(), threading.Event(), threading.Lock()
        self._balanced_s, self._again_s, self._spread_s = time.monotonic(), 0.0, 0.0
        self._tried = -1  # the version that the last attempt at a step started from
        self._num_told = 0  # recoveries that callers know of

    def start(self) -> None:
        threading.Thread(target=self._run, name="trinity-reconciler", daemon=True).start()

    # -- the loop

    def _run(self) -> None:
        self.shards.tidy(self.state.table)
        while True:
            self._wake.wait(self.settings.watch_every_s)
            self._wake.clear()
            error = tried(self._tick, TrinityError, RayError)  # the edge of this thread: the next look may find better
            if error is not None:
                log.warning("looking after pool %s failed: %s", self.settings.pool, error)

    def _tick(self) -> None:
        self._look()
        if self._changing.acquire(blocking=False):  # else experts move, and another epoch is next
            try:
                self._tell_of_recoveries()
            finally:
                self._changing.release()
        if self.state.spec.trains:
            self.repair.restore()
            return
        self.repair.repair()
        self._scale()
        self._change(At(self.watch.version))

    def _look(self) -> None:
        self.watch.look(self.state.table, self.shards.handles, self.settings.watch_every_s)

    def _tell_of_recoveries(self) -> None:
        """Have callers locate shards anew, by a new epoch: one that started again elsewhere may have left a process behind that
        is cut off here, and answers them."""
        found = self.watch.num_recoveries
        if found > self._num_told:
            self.state.publish(self.state.table.renewed())
            self._num_told = found

    def _change(self, at: At) -> None:
        """The change that is most wanted, if any is, and the shards that are new in it have started."""
        if time.monotonic() < self._again_s:
            return
        change = self._wanted()
        try:
            if self._has_started(change):
                Migration(self.shards, self.watch, change, at, self.history).run()
        except Exception:
            self._try_later()
            raise

    def _has_started(self, change: Change | None) -> TypeGuard[Change]:
        """Say whether there is a change and all that it needs. What it lacks begins to start; a later look finds it there."""
        spares = self.shards.spares
        spares.keep_only(change.fresh if change else ())
        if change is None:
            self.history.give_up()
            return False
        if missing := set(change.fresh) - set(spares.names):
            self.desired.use_names(len(missing))
            spares.start(sorted(missing), change.node)
            self.history.expect(change)
        if spares.are_there(change.fresh):
            return True
        self._again_s, self._spread_s = time.monotonic() + STARTING_S, 0.0
        return False

    def _try_later(self) -> None:
        self.shards.spares.keep_only(())
        self.history.give_up()
        self._again_s = time.monotonic() + AGAIN_S
        self._spread_s = time.monotonic() + SPREAD_AGAIN_S

    def _wanted(self) -> Change | None:
        seen = self._seen()
        self._balance_asked.clear()
        change = desired_change(self.state.table, seen, self.desired.now, self.rules)
        if (seen.may_balance or seen.must_balance) and (change is None or change.reason == "balance"):
            self._balanced_s = time.monotonic()
        return change

    def _seen(self) -> Seen:
        may_spread, spares = self._may_spread(), self.shards.spares
        every_s, scales = self.settings.balance_every_s, self.settings.autoscale.enabled and not self.state.spec.trains
        return Seen(
            load_LE=self.watch.load_LE,
            rows_in_window=self.watch.rows_in_window(),
            node_of=self.watch.node_of,
            lost=self.watch.lost(self.settings.lost_after_s),
            leaving_nodes=draining_nodes(),
            scaled_LE=self.scaling.replicas_LE if scales else None,
            may_balance=bool(every_s) and time.monotonic() - self._balanced_s >= every_s,
            must_balance=self._balance_asked.is_set(),
            may_spread=may_spread,
            roomy_nodes=(spares.nodes or roomy_nodes(self.settings)) if may_spread else frozenset(),
            spares=spares.names,
        )

    def _may_spread(self) -> bool:
        """Now and then, when all shards are there and some expert is on fewer nodes than redundancy asks for: a node that comes
        back has room again."""
        table, now_s = self.state.table, time.monotonic()
        if now_s < self._spread_s or not self.settings.redundancy or not self.watch.there >= set(table.shards):
            return False
        self._spread_s = now_s + SPREAD_S
        return bool(table.num_hosts_LE(self.watch.node_of).min() <= self.settings.redundancy)

    def _scale(self) -> None:
        """Make what the load wants desired, as an operator's wish would be."""
        num_shards = self.scaling.decide(self.watch.load_LE, self.desired.now.num_shards, time.monotonic())
        if num_shards is not None:
            self.desired.edit(lambda desired: replace(desired, num_shards=num_shards, reason="load"))

    # -- what others ask

    def request(
        self, reason: str, edit: Callable[[DesiredState, PlacementTable], DesiredState], balance: bool = False
    ) -> int:
        """Note what is wanted; -> the epoch now. Raises ConfigError for what can never be."""
        self.desired.edit(lambda desired: replace(edit(desired, self.state.table), reason=reason))
        if balance:
            self._balance_asked.set()
        self._wake.set()
        return self.state.epoch

    def begin_attempt(self, version: int, num_updates: int) -> int:
        """Make the change that is wanted, if any, between two steps, where nothing is under way; -> the epoch.

        Raises StateLost when an attempt at this step has failed and a shard can never be at that version again."""
        with self._changing:
            is_again, self._tried = self._tried == version, version
            if is_again:
                self._look()
                self._tell_of_recoveries()
                self.repair.check_recoverable()
            error = tried(lambda: self._change(At(version, num_updates)), TrinityError, RayError)
            if error is not None:  # training goes on where its experts are
                log.warning("pool %s stays as it is: %s", self.settings.pool, error)
        return self.state.epoch

    def snapshot(self) -> Snapshot:
        # in this order: a change that is done has been seen, and who leaves meanwhile is not taken for one that starts
        changes, seen = self.history.views, self.watch.seen
        table, load_LE, drained = self.state.table, self.watch.load_LE, self.desired.now.drained
        shards = tuple(shard_view(name, seen.get(name), name in drained) for name in table.shards)
        rows = np.array([shard.rows_per_s for shard in shards])
        return Snapshot(
            pool=self.settings.pool,
            time_s=time.time(),
            table=table,
            shards=shards,
            load_LE=tuple(tuple(map(float, row)) for row in load_LE),
            imbalance=float(rows.max() / rows.mean()) if rows.any() else 0.0,
            changes=tuple(reversed(changes)),
            num_recoveries=self.watch.num_recoveries,
            adapters=self.adapters.now,
        )


def _rules(state: PoolState) -> Rules:
    settings, sizes = state.settings, state.spec.bytes_by_form
    return Rules(settings.redundancy, settings.experts_per_layer, settings.balance_goal, sizes)


class Desired:
    """The desired state: on disk before anybody acts on it. Safe from any thread."""

    def __init__(self, state: PoolState):
        self._files, self._guard = state.files, threading.Lock()
        found = self._files.desired()
        if found is None:
            self._files.set_desired(found := DesiredState.of(state.table))
        self.now = found

    def edit(self, edited: Callable[[DesiredState], DesiredState]) -> None:
        """Raises what `edited` does; then it is as it was."""
        with self._guard:
            desired = edited(self.now)
            self._files.set_desired(desired)
            self.now = desired

    def use_names(self, num: int) -> None:
        """Use up the names of so many shards that are about to be made: they are never used again."""
        if num:
            self.edit(lambda desired: replace(desired, next_name=desired.next_name + num))
