"""Ledger of what a training job has decided: the one thing about a pool that is elsewhere when its shards are."""

from __future__ import annotations  # so that those who only remember need no torch

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from trinity.dispatch.view import PlacementView
from trinity.errors import VersionGone
from trinity.rpc.messages import Load

if TYPE_CHECKING:
    from trinity.state.versioned_store import Version


class StepTicket(NamedTuple):
    """Start of an attempt at a step. `keep`: older versions that somebody still computes with."""

    epoch: int
    attempt: int
    keep: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decision:
    """The version that counts, and the job's notes on it (plain JSON values)."""

    version: int
    notes: Mapping[str, Any]

    @property
    def line(self) -> int:
        """The line that the version is a step of (trinity/utils/lines.py)."""
        line: int = self.notes.get("line", 0)
        return line


class StepLedger(Protocol):
    """A pool's memory of its training job."""

    def new_line(self) -> int:
        """Begin a line of versions, with what shards are about to load."""
        ...

    def set_source(self, message: Load) -> None:
        """Note where a shard that starts again finds the present weights."""
        ...

    def begin_attempt(self, version: int, num_updates: int) -> StepTicket:
        """Begin an attempt at the next step. Nothing is under way: the moment for experts to move. What older attempts still
        have under way is void from here on."""
        ...

    def begin(self, version: int, notes: Mapping[str, Any]) -> None:
        """A job starts from that version: the first decision, whatever there was before."""
        ...

    def decide(self, step: int, attempt: int, notes: Mapping[str, Any]) -> None:
        """Staged everywhere: that it is committed is now a fact, whatever dies. Raises StepConflict for an attempt that was
        given up. `notes` are what the job needs to go on from there."""
        ...

    def approve(self, version: int) -> None:
        """Serve the version that was decided last, whatever was said of it then: it has passed its gates."""
        ...

    def decided(self) -> Decision | None:
        """The last decision; None before the first."""
        ...

    def backbone(self, version: int) -> Version:
        """The backbone of a committed version, from wherever it is kept. Raises VersionGone."""
        ...


class LocalLedger:
    """Ledger of local shards: what they hold goes with it, so nothing need be remembered but the number of attempts."""

    def __init__(self, view: PlacementView):
        self._view, self._attempt = view, 0

    def new_line(self) -> int:
        return 0  # who computes with local shards knows when they go back

    def set_source(self, message: Load) -> None:
        pass

    def begin_attempt(self, version: int, num_updates: int) -> StepTicket:
        self._attempt += 1
        return StepTicket(self._view.table.epoch, self._attempt)

    def begin(self, version: int, notes: Mapping[str, Any]) -> None:
        pass

    def decide(self, step: int, attempt: int, notes: Mapping[str, Any]) -> None:
        pass

    def approve(self, version: int) -> None:
        pass

    def decided(self) -> Decision | None:
        return None

    def backbone(self, version: int) -> Version:
        raise VersionGone(f"version {version} of the backbone is kept nowhere else")
