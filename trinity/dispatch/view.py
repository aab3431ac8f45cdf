"""Knowledge of a caller about the placement."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from trinity.placement.table import PlacementTable


class PlacementView(Protocol):
    """Knowledge of a caller about the placement. Somebody else keeps it fresh; reading it costs nothing."""

    @property
    def table(self) -> PlacementTable:
        """The newest known."""
        ...

    @property
    def unreachable(self) -> frozenset[str]:
        """Shards that did not answer and have not been seen since."""
        ...

    @property
    def distances(self) -> Mapping[str, int]:
        """Distance of each shard from this process: 0 on its node, 1 in its rack, 2 elsewhere. One not named is near."""
        ...

    def mark_unreachable(self, shard: str) -> None:
        """It did not answer."""
        ...

    def refresh(self) -> None:
        """Ask for the newest table, and wait for it for a moment."""
        ...


class StaticView(NamedTuple):
    """A PlacementView of shards that never move and never die."""

    table: PlacementTable
    unreachable: frozenset[str] = frozenset()
    distances: Mapping[str, int] = MappingProxyType({})

    def mark_unreachable(self, shard: str) -> None:
        pass

    def refresh(self) -> None:
        pass
