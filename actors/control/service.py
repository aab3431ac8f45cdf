"""The placement service: the only writer of the placement table, and the memory of what the pool is.

A named, detached actor with several threads: one looks after the shards (actors/control/reconciler.py), the others answer. Each
epoch is a JSON file, written and renamed before anybody hears of it, so that a restart finds the last one and epochs only
ever grow; what the pool is made from, what operators asked for and where its weights are lie beside them.
"""

import json
import logging
import os
import secrets
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from actors.control.ledger import Record
from actors.control.reconciler import DesiredState, Reconciler
from actors.shard import DataPlane
from trinity.config import ModelConfig, OptimConfig, PlacementConfig
from trinity.errors import StepConflict
from trinity.placement.snapshot import Snapshot
from trinity.placement.table import PlacementTable
from trinity.pool.pool import Decision, StepTicket
from trinity.rpc.messages import Experts, Load

log = logging.getLogger(__name__)
LONGEST_WAIT_S = 30.0
KEPT_EPOCHS = 100


@dataclass(frozen=True)
class PoolSpec:
    """What a pool is made from. `optim` None: it serves and does not train."""

    model: ModelConfig
    optim: OptimConfig | None
    num_shards: int
    device: str


class PlacementService:
    """`state_dir` must be the same after a restart. Safe from any thread.

    A service that starts anew (not after a crash) on an old folder keeps counting epochs and forgets the rest.
    """

    def __init__(self, state_dir: str, spec: PoolSpec, settings: PlacementConfig, namespace: str):
        self.folder, self._spec, self.settings, self.namespace = Path(state_dir), spec, settings, namespace
        self.folder.mkdir(parents=True, exist_ok=True)
        self._changed = threading.Condition()
        epochs = sorted(self.folder.glob("epoch-*.json"))
        self.table = PlacementTable.from_json(epochs[-1].read_text()) if epochs else None
        again = ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed
        self.record = Record(self.folder, is_new=not again)
        if not again:
            self._source_file.unlink(missing_ok=True)
            self._wish_file.unlink(missing_ok=True)
        self._supervisor: Reconciler | None = None
        self._tried = -1  # the version that the last attempt at a step started from
        if again and self.table is not None:
            self.publish(self.table.renewed())  # shards may have been told of the next epoch before the crash
            self.supervise(self._data_host_file.read_text())

    # -- what shards and callers ask

    def secret(self) -> bytes:
        """What callers prove to shards that they know. Kept in a file that only its owner reads."""
        with self._changed:
            if not self._secret_file.is_file():
                self._secret_file.touch(mode=0o600)
                self._secret_file.write_bytes(secrets.token_bytes(32))
            return self._secret_file.read_bytes()

    def spec(self) -> PoolSpec:
        return self._spec

    def current(self) -> PlacementTable | None:
        return self.table

    @ray.method(concurrency_group="news")  # those who wait must not keep out those who decide
    def newer(self, epoch: int, version: int | None, timeout_s: float) -> tuple[PlacementTable | None, int]:
        """The table as soon as it is newer than `epoch`, None if it is not within the time; and the version to serve, as soon
        as it is another than `version` (None: whatever it is)."""

        def is_news() -> bool:
            return self.epoch() > epoch or (version is not None and self.record.serving != version)

        with self._changed:
            self._changed.wait_for(is_news, min(timeout_s, LONGEST_WAIT_S))
            return self.table if self.epoch() > epoch else None, self.record.serving

    def holdings(self, shard: str) -> Experts:
        """What the shard holds by the present table; nothing of any layer if it is not in it."""
        table = self.table
        if table is not None and shard in table.shards:
            return table.experts_of(shard)
        return dict.fromkeys(self._spec.model.moe_layers, ())

    def epoch(self) -> int:
        """0 before the first table."""
        return self.table.epoch if self.table else 0

    def publish(self, table: PlacementTable) -> int:
        """Make `table` the current one; it must be the next epoch. Publishing the current table again is harmless."""
        with self._changed:
            if table == self.table:
                return table.epoch
            if table.epoch != self.epoch() + 1:
                raise StepConflict(f"placement is at epoch {self.epoch()}; epoch {table.epoch} does not follow")
            _write(self.folder / f"epoch-{table.epoch:08d}.json", table.to_json())
            self.table = table
            (self.folder / f"epoch-{table.epoch - KEPT_EPOCHS:08d}.json").unlink(missing_ok=True)
            self._changed.notify_all()
            return table.epoch

    def set_source(self, source: Load) -> None:
        """Where a restarted shard finds the weights."""
        _write(self._source_file, json.dumps(asdict(source)))

    def source(self) -> Load | None:
        return Load(**json.loads(self._source_file.read_text())) if self._source_file.is_file() else None

    # -- what a training job decides, and those who compute with its versions

    def begin(self, version: int, notes: dict[str, Any]) -> None:
        with self._changed:
            self.record.begin(version, notes)
            self._changed.notify_all()

    def decide(self, step: int, attempt: int, notes: dict[str, Any]) -> None:
        with self._changed:
            self.record.decide(step, attempt, notes)
            self._changed.notify_all()

    def keep(self) -> tuple[int, ...]:
        """Versions before the present one that somebody computes with."""
        with self._changed:
            return self.record.keep()

    def decided(self) -> Decision | None:
        with self._changed:
            return self.record.decision

    def pin(self, version: int | None, holder: str, lease_s: float) -> int:
        """None: the version that is served now. -> the version."""
        with self._changed:
            wanted = self.record.serving if version is None else version
            self.record.pin(wanted, holder, lease_s)
            return wanted

    def unpin(self, holder: str) -> None:
        with self._changed:
            self.record.unpin(holder)

    def quarantine(self, version: int) -> int:
        with self._changed:
            log.error("version %d is quarantined: what it computes is not finite", version)
            found = self.record.quarantine(version)
            self._changed.notify_all()
            return found

    # -- what operators ask

    def supervise(self, data_host: str) -> None:
        """Look after the shards of the table from now on. Harmless when repeated."""
        if self._supervisor is None:
            _write(self._data_host_file, data_host)
            plane = DataPlane(data_host, self.secret(), self.settings.num_threads_per_shard)
            self._supervisor = Reconciler(self, plane)
            self._supervisor.start()

    def snapshot(self) -> Snapshot:
        return self._running().snapshot()

    def wait(self, epoch: int, timeout_s: float) -> Snapshot:
        self.newer(epoch, None, timeout_s)
        return self.snapshot()

    def scale(self, num_shards: int, reason: str) -> int:
        """Ask for so many shards; -> the epoch now. The change follows on its own, as with everything below."""
        return self._running().ask(reason, num_shards=num_shards)

    def replicate(self, layer: int, expert: int, num_replicas: int) -> int:
        return self._running().ask("replicate", replicas=(layer, expert, num_replicas))

    def drain(self, shard: str) -> int:
        """Move everything off a shard, then end it: one shard fewer is asked for."""
        return self._running().ask("drain", drained=shard)

    def begin_attempt(self, version: int, num_updates: int) -> StepTicket:
        """For a trainer, before each attempt at a step. Waits while experts move."""
        with self._changed:
            attempt, is_again = self.record.new_attempt(), self._tried == version
            self._tried = version
        epoch = self._running().begin_attempt(version, num_updates, is_again)
        with self._changed:
            return StepTicket(epoch, attempt, self.record.keep())

    def rebalance(self) -> int:
        return self._running().ask("balance", balance=True)

    def wish(self) -> DesiredState | None:
        return DesiredState.from_json(self._wish_file.read_text()) if self._wish_file.is_file() else None

    def set_wish(self, wish: DesiredState) -> None:
        _write(self._wish_file, wish.to_json())

    def _running(self) -> Reconciler:
        deadline_s = time.monotonic() + self.settings.call_timeout_s
        while self._supervisor is None and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert self._supervisor is not None, "the pool is not complete"
        return self._supervisor

    @property
    def _secret_file(self) -> Path:
        return self.folder / "secret"

    @property
    def _source_file(self) -> Path:
        return self.folder / "source.json"

    @property
    def _wish_file(self) -> Path:
        return self.folder / "wish.json"

    @property
    def _data_host_file(self) -> Path:
        return self.folder / "data_host"


def _write(path: Path, text: str) -> None:
    """All of it or nothing, even if the machine stops now."""
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


PlacementActor = ray.remote(
    max_restarts=-1, max_task_retries=-1, num_cpus=0, max_concurrency=64, concurrency_groups={"news": 1024}
)(PlacementService)
