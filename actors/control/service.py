"""The placement service: the only writer of the placement table, and the memory of what the pool is.

A named, detached actor with several threads: one looks after the shards (actors/control/reconciler.py), the others answer. Each
epoch is a JSON file, written and renamed before anybody hears of it, so that a restart finds the last one and epochs only
ever grow; what the pool is made from, what operators asked for and where its weights are lie beside them.
"""

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from actors.control.reconciler import Reconciler
from actors.control.state import PoolSpec, PoolState
from actors.dataplane.plane import DataPlane
from actors.sync import shm_folders
from trinity.config import AdapterSet, PlacementConfig
from trinity.placement.snapshot import Snapshot
from trinity.placement.table import PlacementTable
from trinity.pool.ledger import Decision, StepTicket
from trinity.rpc.messages import PROTOCOL, Experts, Load
from trinity.utils.hugepages import share_heaps
from trinity.utils.lines import step_of

log = logging.getLogger(__name__)


class PlacementService:
    """Questions to the service; the parts answer. `state_dir` must be the same after a restart; None is a folder that goes
    with the pool. Safe from any thread.

    A service that starts anew (not after a crash) on an old folder keeps counting epochs and forgets the rest.
    """

    def __init__(self, state_dir: str | None, spec: PoolSpec, settings: PlacementConfig, namespace: str):
        share_heaps()
        again = ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed
        folder = Path(state_dir) if state_dir else shm_folders.state_folder(settings, namespace)
        self._state = PoolState(folder, spec, settings, namespace, is_again=again)
        self._ledger, self._files = self._state.ledger, self._state.files
        self._reconciler: Reconciler | None = None
        self._is_supervised = threading.Event()
        if again and (table := self._state.known_table) is not None:
            self._state.publish(table.renewed())  # shards may have been told of the next epoch before the crash
            self.supervise(self._files.data_host())

    # -- what shards and callers ask

    def protocol(self) -> int:
        return PROTOCOL

    def secret(self) -> bytes:
        return self._state.secret()

    def spec(self) -> PoolSpec:
        return self._state.spec

    def current(self) -> PlacementTable | None:
        return self._state.known_table

    @ray.method(concurrency_group="news")  # those who wait must not keep out those who decide
    def newer(self, epoch: int, version: int | None, timeout_s: float) -> tuple[PlacementTable | None, int]:
        return self._state.newer(epoch, version, timeout_s)

    def experts_of(self, shard: str) -> Experts:
        return self._state.experts_of(shard)

    def epoch(self) -> int:
        return self._state.epoch

    def publish(self, table: PlacementTable) -> int:
        return self._state.publish(table)

    def set_source(self, source: Load) -> None:
        """The source in which a restarted shard finds the weights. Without a line it is of the present one."""
        self._files.set_source(replace(source, line=source.line or self._ledger.line))

    def source(self) -> Load | None:
        return self._files.source()

    # -- what a training job decides, and those who compute with its versions

    def begin_attempt(self, version: int, num_updates: int) -> StepTicket:
        """Begin an attempt at a step, for a trainer. Waits while experts move."""
        attempt = self._ledger.new_attempt(version)
        epoch = self._running().begin_attempt(version, num_updates)
        return StepTicket(epoch, attempt, self._ledger.keep())

    def new_line(self) -> int:
        return self._ledger.new_line()

    def next_line(self) -> int:
        return self._ledger.next_line

    def begin(self, version: int, notes: dict[str, Any]) -> None:
        self._ledger.begin(version, notes)

    def decide(self, step: int, attempt: int, notes: dict[str, Any]) -> None:
        self._ledger.decide(step, attempt, notes)

    def approve(self, version: int) -> None:
        self._ledger.approve(version)

    def decided(self) -> Decision | None:
        return self._ledger.decision

    def pin(self, version: int | None, holder: str, lease_s: float) -> int:
        return self._ledger.pin(version, holder, lease_s)

    def unpin(self, holder: str) -> None:
        self._ledger.unpin(holder)

    def quarantine(self, version: int) -> int:
        log.error("version %d is quarantined: what it computes is not finite", step_of(version))
        return self._ledger.quarantine(version)

    # -- what operators ask

    def supervise(self, data_host: str) -> None:
        """Look after the shards of the table from now on. Harmless when repeated."""
        if self._reconciler is None:
            self._files.set_data_host(data_host)
            plane = DataPlane.of(self._state.settings, data_host, self.secret())
            self._reconciler = Reconciler(self._state, plane)
            self._reconciler.start()
            self._is_supervised.set()

    def snapshot(self) -> Snapshot:
        return self._running().snapshot()

    def wait(self, epoch: int, timeout_s: float) -> Snapshot:
        self._state.newer(epoch, None, timeout_s)
        return self.snapshot()

    def scale(self, num_shards: int, reason: str) -> int:
        """Ask for so many shards; -> the epoch now. The change follows on its own, as with everything below."""
        return self._running().request(reason, lambda desired, table: desired.with_shards(num_shards, table))

    def replicate(self, layer: int, expert: int, num_replicas: int) -> int:
        asked = (layer, expert, num_replicas)
        return self._running().request("replicate", lambda desired, table: desired.with_replicas(*asked, table))

    def drain(self, shard: str) -> int:
        """Move everything off a shard, then end it: one shard fewer is asked for."""
        return self._running().request("drain", lambda desired, table: desired.without(shard, table))

    def rebalance(self) -> int:
        return self._running().request("balance", lambda desired, table: desired, balance=True)

    def add_adapter(self, name: str, source: str) -> AdapterSet:
        """Serve an adapter beside the weights under that name. Waits until the shards have taken it up."""
        return self._running().adapters.add(name, source)

    def remove_adapter(self, name: str) -> AdapterSet:
        return self._running().adapters.remove(name)

    def _running(self) -> Reconciler:
        self._is_supervised.wait(self._state.settings.call_timeout_s)
        assert self._reconciler is not None, "the pool is not complete"
        return self._reconciler


def placement_actor(settings: PlacementConfig) -> Any:
    """-> its class, as an actor. Ray makes a thread for each caller that may wait for news, at once, and uses them in turn, so
    that after so many calls each holds 60 KB. Callers beyond them wait for a place."""
    groups = {"news": 64 + 2 * max(settings.num_shards, settings.autoscale.max_shards)}
    return ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0, max_concurrency=64, concurrency_groups=groups)(
        PlacementService
    )
