"""Looks after a pool's shards: sees how they are and what they compute, and moves experts when somebody asks or it pays.

Legend: L layers, E experts of a layer.
Decisions: one thread, one change at a time. A change is: prepare (new shards, copies from shard to shard, while the old
replicas serve) -> publish the next epoch, which is the only step that counts -> drain -> retire. Whatever dies in between,
the published table is the truth: what it does not name is dropped, what a shard lacks of it is copied again.
"""

import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayError

from actors.control.health import Seen, Watch, draining_nodes
from actors.control.repair import RepairController
from actors.names import Handles, ask, name_of
from actors.shard import DataPlane, start_shard
from trinity.errors import ConfigError, TrinityError, VersionGone
from trinity.experts.shard import ShardSpec
from trinity.placement.autoscaler import Scale, ScaleLimits, Window, decide
from trinity.placement.planner import PlanGoal, balance, moves, plan, with_floor
from trinity.placement.snapshot import ChangeView, ShardView, Snapshot
from trinity.placement.table import PlacementTable
from trinity.placement.topology import Shard, Topology
from trinity.rpc.messages import Copy, PruneTo

if TYPE_CHECKING:
    from actors.control.service import PlacementService

log = logging.getLogger(__name__)
KEPT_CHANGES = 50
RETIRE_S = 5.0
ROOM = 1.25
AGAIN_S = 10.0  # after a change that failed
MIN_ROWS = 1000.0  # per layer, in the window: with fewer, balance is chance


@dataclass(frozen=True)
class DesiredState:
    """What operators asked for; it outlives the service. Replicas beyond what the settings' redundancy asks for."""

    num_shards: int
    drained: tuple[str, ...] = ()
    replicas: tuple[tuple[int, int, int], ...] = ()  # layer, expert, how many
    next_name: int = 0
    reason: str = "start"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "DesiredState":
        tree = json.loads(text)
        pairs = {"drained": tuple(tree["drained"]), "replicas": tuple(tuple(each) for each in tree["replicas"])}
        return cls(**{**tree, **pairs})


class Reconciler:
    """Owned by the placement service, which persists what it decides."""

    def __init__(self, service: "PlacementService", plane: DataPlane):
        self.service, self.plane, self.settings = service, plane, service.settings
        self.handles = Handles(service.settings.pool, service.namespace)
        assert service.table is not None
        self.watch = Watch(service.table, self.settings.window_s)
        found = service.wish()
        if found is None:
            found = DesiredState(len(service.table.shards), next_name=len(service.table.shards))
            service.set_wish(found)
        self.mender = RepairController(service, self.watch, self._ask)
        self._wish, self._wake, self._guard = found, threading.Event(), threading.Lock()
        self._changing, self._again_s = threading.Lock(), 0.0
        self._balance_now, self._balanced_s = False, time.monotonic()
        self._scale = Scale(found.num_shards, service.table.num_replicas_LE)
        self._decided_s = time.monotonic()
        self._changes: list[ChangeView] = []

    def start(self) -> None:
        threading.Thread(target=self._run, name="trinity-supervisor", daemon=True).start()

    def ask(
        self,
        reason: str,
        num_shards: int | None = None,
        replicas: tuple[int, int, int] | None = None,
        drained: str | None = None,
        balance: bool = False,
    ) -> int:
        """Note what is wanted; -> the epoch now. Raises ConfigError for what can never be."""
        with self._guard:
            wish = replace(self._wish, reason=reason)
            if num_shards is not None:
                wish = replace(wish, num_shards=self._checked_shards(num_shards))
            if drained is not None and drained not in wish.drained:
                wish = self._without(wish, drained)
            if replicas is not None:
                wish = replace(wish, replicas=self._with_replicas(wish, replicas))
            self.service.set_wish(wish)
            self._wish, self._balance_now = wish, self._balance_now or balance
        self._wake.set()
        return self.service.epoch()

    def snapshot(self) -> Snapshot:
        table, seen = self._table, self.watch.seen
        load_LE = self.watch.load_LE
        shares = [self._view(name, seen.get(name)) for name in table.shards]
        rows = np.array([shard.rows_per_s for shard in shares])
        return Snapshot(
            pool=self.settings.pool,
            time_s=time.time(),
            table=table,
            shards=tuple(shares),
            load_LE=tuple(tuple(map(float, row)) for row in load_LE),
            imbalance=float(rows.max() / rows.mean()) if rows.any() else 0.0,
            changes=tuple(reversed(self._changes[-KEPT_CHANGES:])),
            num_recoveries=self.watch.num_recoveries,
        )

    # -- the loop

    def _run(self) -> None:
        self._tidy()
        while True:
            self._wake.wait(self.settings.watch_every_s)
            self._wake.clear()
            try:
                self._tick()
            except (TrinityError, RayError) as error:  # the edge of this thread: the next look may find better
                log.warning("looking after pool %s failed: %s", self.settings.pool, error)

    def _tick(self) -> None:
        self.watch.look(self._table, self.handles, self.settings.watch_every_s)
        if self._trains:  # weights change, and gradients gather: what else is wanted waits for `begin_attempt`
            self.mender.restore()
            return
        self.mender.repair()
        self._autoscale()
        if time.monotonic() >= self._again_s and (wanted := self._wanted()) is not None:
            self._change(*wanted, self.watch.version, 0)

    def begin_attempt(self, version: int, num_updates: int, is_again: bool) -> int:
        """Between two steps of training nothing is under way: make the change that is wanted, if any; -> the epoch.

        `is_again`: an attempt at this step has failed. Raises StateLost when a shard can never be at that version again."""
        with self._changing:
            if is_again:
                self.watch.look(self._table, self.handles, self.settings.watch_every_s)
                self.mender.check_recoverable()
            try:
                if time.monotonic() >= self._again_s and (wanted := self._wanted()) is not None:
                    self._change(*wanted, version, num_updates)
            except (TrinityError, RayError) as error:  # training goes on where its experts are
                log.warning("pool %s stays as it is: %s", self.settings.pool, error)
        return self.service.epoch()

    # -- deciding

    def _wanted(self) -> tuple[PlacementTable, tuple[str, ...], str] | None:
        """The table that is wanted, the shards to be made for it, and why; None: all is well."""
        with self._guard:
            wish, asked, self._balance_now = self._wish, self._balance_now, False
        table = self._table
        leaving = self._leaving(wish, table)
        fresh = self._fresh(wish, [name for name in table.shards if name not in leaving])
        replicas_LE = self._replicas_LE(wish, len(table.shards) - len(leaving) + len(fresh))
        same = not leaving and not fresh and bool((replicas_LE == table.num_replicas_LE).all())
        if same and not self._is_worth_balancing(table, asked):
            return None
        found = plan(
            with_floor(self.watch.load_LE * (same or self._has_seen_enough())),
            self._topology(
                table, leaving, fresh, self._room(replicas_LE, len(table.shards) - len(leaving) + len(fresh))
            ),
            table,
            PlanGoal(goal=self.settings.balance_goal if same else 0.985),
            replicas_LE=replicas_LE,
        )
        reason = "balance" if same else wish.reason
        return None if found is table else (found, fresh, reason)

    def _autoscale(self) -> None:
        """One decision for each window; what it wants becomes the wish, as an operator's would."""
        limits, now_s = self.settings.autoscale, time.monotonic()
        if not limits.enabled or now_s - self._decided_s < limits.every_s:
            return
        window = Window(self.watch.load_LE * limits.every_s, limits.every_s)
        self._decided_s = now_s
        own = {"min_replicas": 1 + self.settings.redundancy}
        named = ("rows_per_s", "min_shards", "max_shards", "max_spare", "cooldown_s", "settle_s")
        bounds = ScaleLimits(**own, **{name: getattr(limits, name) for name in named})
        self._scale = decide(window, replace(self._scale, num_shards=self._wish.num_shards), bounds, now_s)
        if self._scale.changed_s == now_s:
            with self._guard:
                self._wish = replace(self._wish, num_shards=self._scale.num_shards, reason="load")
                self.service.set_wish(self._wish)

    def _leaving(self, wish: DesiredState, table: PlacementTable) -> tuple[str, ...]:
        """Shards to be emptied: those asked for, those on nodes that will go, those that do not come back, and the newest of
        what is too many."""
        nodes, lost = draining_nodes(), self.watch.lost(self.settings.lost_after_s)
        gone = {s for s in table.shards if s in wish.drained or s in lost or self.watch.node_of(s) in nodes}
        left = [name for name in table.shards if name not in gone]
        return (*sorted(gone), *left[wish.num_shards :])

    def _fresh(self, wish: DesiredState, staying: list[str]) -> tuple[str, ...]:
        """Names of the shards to be made; never one that was used before."""
        num = max(0, wish.num_shards - len(staying))
        if num:
            with self._guard:
                self._wish = replace(self._wish, next_name=wish.next_name + num)
                self.service.set_wish(self._wish)
        return tuple(f"shard-{wish.next_name + i}" for i in range(num))

    def _replicas_LE(self, wish: DesiredState, num_shards: int) -> np.ndarray:
        table = self._table
        counts_LE = np.full((len(table.layers), table.num_experts), 1 + self.settings.redundancy)
        if self.settings.autoscale.enabled and not self._trains:
            counts_LE = np.maximum(counts_LE, self._scale.replicas_LE)
        for layer, expert, num in wish.replicas:
            counts_LE[table.layers.index(layer), expert] = max(num, 1 + self.settings.redundancy)
        return np.minimum(counts_LE, num_shards)

    def _is_worth_balancing(self, table: PlacementTable, asked: bool) -> bool:
        every_s = self.settings.balance_every_s
        if not asked and (not every_s or time.monotonic() - self._balanced_s < every_s):
            return False
        self._balanced_s = time.monotonic()
        return asked or (
            self._has_seen_enough()
            and balance(with_floor(self.watch.load_LE), table).overall < self.settings.balance_goal
        )

    def _has_seen_enough(self) -> bool:
        """With fewer rows their shares are chance: then all experts count the same."""
        return self.watch.rows_in_window() >= MIN_ROWS * len(self._table.layers)

    def _room(self, replicas_LE: np.ndarray, num_shards: int) -> int:
        """Experts of a layer that one shard may hold: rows are not all that is to be even, memory is bounded."""
        even = math.ceil(int(replicas_LE.sum(axis=1).max(initial=0)) / num_shards)
        return self.settings.experts_per_layer or min(replicas_LE.shape[1], math.ceil(ROOM * even))

    def _topology(self, table: PlacementTable, leaving: tuple[str, ...], fresh: tuple[str, ...], room: int) -> Topology:
        """New shards are taken to be on hosts of their own until they are seen."""
        known = [Shard(s, self.watch.node_of(s) or s, slots=room, draining=s in leaving) for s in table.shards]
        return Topology((*known, *(Shard(name, name, slots=room) for name in fresh)), expert_bytes=self._expert_bytes())

    # -- changing

    def _change(
        self, table: PlacementTable, fresh: tuple[str, ...], reason: str, version: int, num_updates: int
    ) -> None:
        """Raises what prevented it; then nothing has changed."""
        previous, started_s = self._table, time.time()
        todo = moves(previous, table, self._expert_bytes())
        view = ChangeView(table.epoch, started_s, 0.0, reason, "prepare", len(todo.copies), _drops(previous, table), 0)
        self._changes.append(view)
        try:
            self._make(fresh)
            self._drop_leftovers(previous, {copy.shard for copy in todo.copies})
            copied = self._copy_all(todo, version, num_updates, table.epoch)
            copied += self._copy_older(todo, version, table.epoch)
            self._step(started_s, "drain", copied)
            self.service.publish(table)
            time.sleep(0 if self._trains else self.settings.drain_s)
            self._step(started_s, "retire", copied)
            self._tidy()
            self._step(started_s, "done", copied)
            log.info("pool %s: epoch %d (%s), %d copies", self.settings.pool, table.epoch, reason, len(todo.copies))
        except Exception:
            if self._table is previous:
                self._again_s = time.monotonic() + AGAIN_S
                self._step(started_s, "rolled back")
                self.service.publish(
                    previous.renewed()
                )  # what was copied for the epoch that failed is dropped under this one
                self._tidy()
            raise

    def _make(self, fresh: tuple[str, ...]) -> None:
        """New shards, without experts, that know the version of the weights."""
        spec = self.service.spec()
        for name in fresh:
            made = ShardSpec(
                name, spec.model, self.service.holdings(name), spec.optim, self.settings.backend, spec.device
            )
            self.handles[name] = start_shard(made, self.plane, self.settings, self.service.namespace, "SPREAD")
        for name in fresh:
            ask(self.handles[name].where.remote(), self.settings.ready_timeout_s, f"the new shard {name}")
            source = self.service.source()
            if source is not None:
                self._ask(name, "load", source)

    def _drop_leftovers(self, table: PlacementTable, shards: set[str]) -> None:
        """What a shard still holds from before the present table is old: it must not pass for a copy."""
        for shard in shards & set(table.shards):
            self._ask(shard, "prune_to", PruneTo(table.experts_of(shard), table.epoch))

    def _copy_older(self, todo: Any, version: int, epoch: int) -> int:
        """Weights of the versions that engines may still compute with, where they are kept."""
        copied = 0
        for older in {version - 1, *self.service.keep()} if self._trains and version > 0 else ():
            try:
                copied += self._copy_all(todo, older, 0, epoch)
            except VersionGone as error:
                log.info("version %d is not copied: %s", older, error)
        return copied

    def _copy_all(self, todo: Any, version: int, num_updates: int, epoch: int) -> int:
        """-> bytes. The targets side by side, each a layer at a time, so that no shard holds more than a layer twice."""
        batches: dict[str, dict[int, list[tuple[int, str]]]] = {}
        for copy in todo.copies:
            layer, expert = copy.expert
            source = next((s for s in copy.sources if s in self.watch.there), "")
            batches.setdefault(copy.shard, {}).setdefault(layer, []).append((expert, source))
        threads, done, errors = [], Counter[str](), []

        def fill(shard: str, layers: Mapping[int, list[tuple[int, str]]]) -> None:
            try:
                for layer, pairs in layers.items():
                    experts, sources = zip(*pairs, strict=True)
                    message = Copy(layer, experts, sources, version, self._deadline(), num_updates, epoch)
                    done[shard] += self._ask(shard, "copy", message)
            except (TrinityError, RayError) as error:  # told to the thread that waits
                errors.append(error)

        for shard, layers in batches.items():
            threads.append(threading.Thread(target=fill, args=(shard, layers), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return done.total()

    def _tidy(self) -> None:
        """Make the shards what the table says: end those it does not name, drop what it gives to others."""
        table = self._table
        prefix = name_of(self.settings.pool, "shard-")
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == self.service.namespace and entry["name"].startswith(prefix):
                name = entry["name"].rsplit("/", 1)[1]
                if name not in table.shards:
                    ray.kill(ray.get_actor(entry["name"], namespace=entry["namespace"]))
                    self.handles.pop(name, None)
        refs = {
            s: self.handles[s].handle.remote("prune_to", PruneTo(table.experts_of(s), table.epoch))
            for s in table.shards
        }
        for shard, ref in refs.items():
            try:
                ask(ref, RETIRE_S, f"shard {shard}")
            except (TrinityError, RayError) as error:
                log.warning("shard %s keeps more than its own for now: %s", shard, error)

    # -- small things

    @property
    def _table(self) -> PlacementTable:
        assert self.service.table is not None
        return self.service.table

    @property
    def _trains(self) -> bool:
        return self.service.spec().optim is not None

    def _deadline(self) -> float:
        return time.time() + self.settings.call_timeout_s

    def _ask(self, shard: str, verb: str, message: Any) -> Any:
        timeout_s = self.settings.checkpoint_timeout_s if verb == "load" else self.settings.call_timeout_s
        return ask(self.handles[shard].handle.remote(verb, message), timeout_s, f"shard {shard}")

    def _expert_bytes(self) -> int:
        model = self.service.spec().model
        return 3 * model.hidden_size * model.moe_intermediate_size * (2 if model.dtype == "bfloat16" else 4)

    def _step(self, started_s: float, phase: str, copied: int = 0) -> None:
        self._changes[-1] = replace(
            self._changes[-1], phase=phase, seconds=time.time() - started_s, copied_bytes=copied
        )

    def _view(self, name: str, seen: Seen | None) -> ShardView:
        if seen is None:
            return ShardView(name, "", "starting", -1, 0, 0, 0.0)
        state = "away" if not seen.is_there else "draining" if name in self._wish.drained else "ready"
        return ShardView(name, seen.node, state, seen.version, seen.num_experts, seen.weight_bytes, seen.rows_per_s)

    def _checked_shards(self, num_shards: int) -> int:
        if not 1 <= num_shards <= self._table.num_experts:
            raise ConfigError(
                f"{num_shards} shards for {self._table.num_experts} experts a layer; ask for 1 to that many"
            )
        return num_shards

    def _without(self, wish: DesiredState, shard: str) -> DesiredState:
        if shard not in self._table.shards:
            raise ConfigError(f"there is no shard {shard!r}; there are: {', '.join(self._table.shards)}")
        if wish.num_shards < 2:
            raise ConfigError(f"{shard} is the last shard; add another one before it is drained")
        return replace(wish, drained=(*wish.drained, shard), num_shards=wish.num_shards - 1)

    def _with_replicas(self, wish: DesiredState, asked: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
        layer, expert, num = asked
        table = self._table
        if layer not in table.layers or not 0 <= expert < table.num_experts:
            raise ConfigError(
                f"there is no expert ({layer}, {expert}); layers {table.layers}, experts 0 to {table.num_experts - 1}"
            )
        if not 1 <= num <= len(table.shards):
            raise ConfigError(
                f"{num} replicas on {len(table.shards)} shards; ask for 1 to that many, or add shards first"
            )
        return (*(each for each in wish.replicas if each[:2] != (layer, expert)), asked)


def _drops(previous: PlacementTable, table: PlacementTable) -> int:
    """Replicas that the new table leaves out."""

    def held(t: PlacementTable) -> set[tuple[int, int, str]]:
        return {
            (layer, expert, t.shards[at])
            for layer, row in zip(t.layers, t.replicas, strict=True)
            for expert, positions in enumerate(row)
            for at in positions
        }

    return len(held(previous) - held(table))
