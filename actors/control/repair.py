"""Gives shards what the table says they hold and they lack, because they died or hung in the middle of something."""

import logging
from collections.abc import Iterator, Mapping

from actors.control.health import ShardSeen, Watch
from actors.control.shards import Shards
from trinity.errors import StateLost
from trinity.placement.table import Expert, PlacementTable
from trinity.pool.ledger import Decision
from trinity.rpc.messages import Copy, PruneTo, Recover

log = logging.getLogger(__name__)


class RepairController:
    """Part of the control loop, which sees with `watch`. Raises what the shards do."""

    def __init__(self, shards: Shards, watch: Watch):
        self.shards, self.state, self.watch = shards, shards.state, watch

    def repair(self) -> None:
        """Make a pool that serves whole: drop what the table gives to others, copy what is missing."""
        for shard, seen in self._there():
            wanted = self._table.experts_of(shard)
            if any(seen.held.get(layer, frozenset()) - set(experts) for layer, experts in wanted.items()):
                self.shards.ask(shard, "prune_to", PruneTo(wanted, self._table.epoch))
            if self.watch.version >= 0:
                self._fill(shard, seen, self.watch.version, 0)

    def restore(self) -> None:
        """Restore a pool that trains: a shard that started again with nothing (its host has gone) gets its experts from other
        replicas. The step under way cannot be prepared without it, so their version does not change meanwhile."""
        decision = self.state.ledger.decision
        if decision is None:
            return
        for shard, seen in self._there():
            if seen.version < 0 or seen.version == decision.version:
                self._fill(shard, seen, decision.version, decision.notes.get("num_updates", 0))

    def check_recoverable(self) -> None:
        """Have shards of a pool that trains be at the version that was decided on, or empty, to be filled by others that are.
        Raises StateLost when an expert is at that version nowhere any more."""
        decision = self.state.ledger.decision
        if decision is None:
            return
        at = {shard: self._recovered(shard, seen, decision) for shard, seen in self._there()}
        for shard, version in at.items():
            alone = [] if version >= decision.version else self._alone(shard, at, decision.version)
            if alone:
                raise StateLost(
                    f"shard {shard} is not at version {decision.version} any more, and {len(alone)} of its experts are on no "
                    "other shard; going back to the last checkpoint (placement.redundancy 1 spares that)"
                )

    def source(self, expert: Expert, target: str) -> str:
        """Another shard that has it now; "" if none."""
        held = (self._table.shards[at] for at in self._table.holders(expert))
        return next((s for s in held if s != target and s in self.watch.there and self.watch.seen[s].version >= 0), "")

    # -- inside

    @property
    def _table(self) -> PlacementTable:
        return self.state.table

    def _there(self) -> Iterator[tuple[str, ShardSeen]]:
        """Shards of the table that answered the last time; what others held then is old news."""
        for shard, seen in self.watch.seen.items():
            if shard in self._table.shards and seen.is_there and not seen.missed:
                yield shard, seen

    def _fill(self, shard: str, seen: ShardSeen, version: int, num_updates: int) -> None:
        """Copy to the shard what it lacks of the table."""
        for layer, experts in self._table.experts_of(shard).items():
            missing = tuple(sorted(set(experts) - seen.held.get(layer, frozenset())))
            sources = tuple(self.source((layer, expert), shard) for expert in missing)
            if missing and (all(sources) or not self.state.spec.trains):
                log.warning("shard %s lacks %d experts of layer %d: copying", shard, len(missing), layer)
                about = self.shards.deadline(), num_updates, self._table.epoch, self.state.ledger.line
                self.shards.ask(shard, "copy", Copy(layer, missing, sources, version, *about))

    def _recovered(self, shard: str, seen: ShardSeen, decision: Decision) -> int:
        """The shard's version after it was asked to be at the decided one; -1: it is empty."""
        if not 0 <= seen.version < decision.version:
            return seen.version
        wanted = Recover(decision.version, decision.notes.get("attempt"), decision.line)
        version: int = self.shards.ask(shard, "recover", wanted)
        return version

    def _alone(self, shard: str, at: Mapping[str, int], version: int) -> list[Expert]:
        """Experts of the shard that no other has at that version. Who did not answer just now may have them."""
        has = {
            s
            for s, seen in self.watch.seen.items()
            if seen.is_there and seen.version >= 0 and at.get(s, version) >= version
        }
        table = self._table
        return [e for e in self._experts_of(shard) if not has & {table.shards[i] for i in table.holders(e)} - {shard}]

    def _experts_of(self, shard: str) -> list[Expert]:
        return [(layer, expert) for layer, experts in self._table.experts_of(shard).items() for expert in experts]
