"""The placement service: the only writer of the placement table, and the memory of where the weights come from.

A named, detached actor. Each epoch is a JSON file, written and renamed before anybody hears of it, so that a restart
finds the last one and epochs only ever grow.
"""

import os
from pathlib import Path

import ray

from trinity.errors import StepConflict
from trinity.messages import Load
from trinity.placement.table import PlacementTable


class PlacementService:
    """`state_dir` must be the same after a restart. Not thread-safe: the actor runs one call at a time."""

    def __init__(self, state_dir: str):
        self.folder = Path(state_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        epochs = sorted(self.folder.glob("epoch-*.json"))
        self.table = PlacementTable.from_json(epochs[-1].read_text()) if epochs else None
        self._source: Load | None = None

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
        self._persist(table)
        self.table = table
        return table.epoch

    def set_source(self, source: Load) -> None:
        """Where a restarted shard finds the weights."""
        self._source = source

    def source(self) -> Load | None:
        return self._source

    def _persist(self, table: PlacementTable) -> None:
        path = self.folder / f"epoch-{table.epoch:08d}.json"
        partial = path.with_suffix(".partial")
        with partial.open("w") as file:
            file.write(table.to_json())
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)


PlacementActor = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0)(PlacementService)
