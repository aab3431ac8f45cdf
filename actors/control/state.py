"""State of a pool and of what was decided for it: the one object that the parts of the placement service share.

Decision: one lock, which is also where those wait who want the news: the table, the version to be served.
"""

import threading
from dataclasses import dataclass, field
from pathlib import Path

from actors.control.files import PoolFiles
from actors.control.ledger import Ledger
from trinity.config import ModelConfig, OptimConfig, PlacementConfig
from trinity.errors import StepConflict
from trinity.placement.table import PlacementTable
from trinity.rpc.messages import Experts

LONGEST_WAIT_S = 30.0


@dataclass(frozen=True)
class PoolSpec:
    """Specification of a pool. `optim` None: it serves and does not train. `ends_with_server`: it was made for the
    cluster's server, by a command that may be gone before the two of them."""

    model: ModelConfig
    optim: OptimConfig | None
    num_shards: int
    device: str
    bytes_by_form: tuple[int, ...]  # of a replica with all that travels with it, on shards of each of `expert_dtype`
    expert_dtype: tuple[str, ...] = ()  # forms of inference: of several, each shard's by its number
    ends_with_server: bool = field(default=False, compare=False)

    @property
    def expert_bytes(self) -> int:
        """Bytes of a replica on the shards that need most."""
        return max(self.bytes_by_form)

    @property
    def trains(self) -> bool:
        return self.optim is not None


class PoolState:
    """Safe from any thread. The only writer of the table. `is_again`: the service crashed and is back; otherwise what an older
    pool of that name left counts for nothing but its epochs."""

    def __init__(self, folder: Path, spec: PoolSpec, settings: PlacementConfig, namespace: str, is_again: bool):
        self.spec, self.settings, self.namespace = spec, settings, namespace
        self.files, self.changed = PoolFiles(folder), threading.Condition()
        if not is_again:
            self.files.forget()
        self.ledger = Ledger(folder, self.changed, is_new=not is_again)
        self._table = self.files.newest_table()

    @property
    def known_table(self) -> PlacementTable | None:
        """None before the first."""
        return self._table

    @property
    def table(self) -> PlacementTable:
        assert self._table is not None
        return self._table

    @property
    def epoch(self) -> int:
        """0 before the first table."""
        return self._table.epoch if self._table else 0

    def publish(self, table: PlacementTable) -> int:
        """Make `table` the current one; it must be the next epoch. Publishing the current table again is harmless."""
        with self.changed:
            if table == self._table:
                return table.epoch
            if table.epoch != self.epoch + 1:
                raise StepConflict(f"placement is at epoch {self.epoch}; epoch {table.epoch} does not follow")
            self.files.add_table(table)
            self._table = table
            self.files.drop_old_tables(table.epoch)
            self.changed.notify_all()
            return table.epoch

    def newer(self, epoch: int, version: int | None, timeout_s: float) -> tuple[PlacementTable | None, int]:
        """The table as soon as it is newer than `epoch`, None if it is not within the time; and the version to serve, as soon
        as it is another than `version` (None: whatever it is)."""

        def is_news() -> bool:
            return self.epoch > epoch or (version is not None and self.ledger.serving != version)

        with self.changed:
            self.changed.wait_for(is_news, min(timeout_s, LONGEST_WAIT_S))
            return self._table if self.epoch > epoch else None, self.ledger.serving

    def experts_of(self, shard: str) -> Experts:
        """The experts that the shard holds by the present table; none of any layer if it is not in it."""
        table = self._table
        if table is not None and shard in table.shards:
            return table.experts_of(shard)
        return dict.fromkeys(self.spec.model.moe_layers, ())

    def secret(self) -> bytes:
        """The secret that callers prove to shards that they know."""
        with self.changed:
            return self.files.secret()
