"""The placement service: the only writer of the placement table, and the memory of what the pool is.

A named, detached actor. Each epoch is a JSON file, written and renamed before anybody hears of it, so that a restart
finds the last one and epochs only ever grow; what the pool is made from and where its weights are lies beside them.
"""

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

import ray

from trinity.config import ModelConfig, OptimConfig
from trinity.errors import StepConflict
from trinity.messages import Load
from trinity.placement.table import PlacementTable


@dataclass(frozen=True)
class PoolSpec:
    """What a pool is made from. `optim` None: it serves and does not train."""

    model: ModelConfig
    optim: OptimConfig | None
    num_shards: int
    device: str


class PlacementService:
    """`state_dir` must be the same after a restart. Not thread-safe: the actor runs one call at a time.

    A service that starts anew (not after a crash) on an old folder keeps counting epochs and forgets the rest.
    """

    def __init__(self, state_dir: str, spec: PoolSpec):
        self.folder, self._spec = Path(state_dir), spec
        self.folder.mkdir(parents=True, exist_ok=True)
        epochs = sorted(self.folder.glob("epoch-*.json"))
        self.table = PlacementTable.from_json(epochs[-1].read_text()) if epochs else None
        if not ray.is_initialized() or not ray.get_runtime_context().was_current_actor_reconstructed:
            self._source_file.unlink(missing_ok=True)

    def secret(self) -> bytes:
        """What callers prove to shards that they know. Kept in a file that only its owner reads."""
        if not self._secret_file.is_file():
            self._secret_file.touch(mode=0o600)
            self._secret_file.write_bytes(secrets.token_bytes(32))
        return self._secret_file.read_bytes()

    def spec(self) -> PoolSpec:
        return self._spec

    def current(self) -> PlacementTable | None:
        return self.table

    def epoch(self) -> int:
        """0 before the first table."""
        return self.table.epoch if self.table else 0

    def publish(self, table: PlacementTable) -> int:
        """Make `table` the current one; it must be the next epoch. Publishing the current table again is harmless."""
        if table == self.table:
            return table.epoch
        if table.epoch != self.epoch() + 1:
            raise StepConflict(f"placement is at epoch {self.epoch()}; epoch {table.epoch} does not follow")
        _write(self.folder / f"epoch-{table.epoch:08d}.json", table.to_json())
        self.table = table
        return table.epoch

    def set_source(self, source: Load) -> None:
        """Where a restarted shard finds the weights."""
        _write(self._source_file, json.dumps(asdict(source)))

    def source(self) -> Load | None:
        return Load(**json.loads(self._source_file.read_text())) if self._source_file.is_file() else None

    @property
    def _secret_file(self) -> Path:
        return self.folder / "secret"

    @property
    def _source_file(self) -> Path:
        return self.folder / "source.json"


def _write(path: Path, text: str) -> None:
    """All of it or nothing, even if the machine stops now."""
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


PlacementActor = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0)(PlacementService)
