"""Which engine computes prompts and which answers: a rule over the engines that are there, which every gateway applies alike.

Decisions: a role is only where requests are sent; every engine can do all, so a change of roles moves no weights and starts
nothing. The n-th role is that of the n-th engine in the order of their start, the last one that of all others: a lost prefill
engine is replaced by the next. Roles that are set while it runs have a number, and the highest counts; engines and gateways
tell each other with what they ask and say anyhow, so that those that come later know it within a second or two.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from trinity.config import Role


class Started(Protocol):
    @property
    def started(self) -> int: ...

    @property
    def engine_id(self) -> str: ...


class Roles(NamedTuple):
    """Roles of engines in the order of their start. `number` 0: as the settings have it."""

    number: int
    names: tuple[Role, ...]

    def after(self, names: Sequence[Role]) -> "Roles":
        """Roles that replace these."""
        return Roles(self.number + 1, tuple(names))

    def of(self, engines: Iterable[Started]) -> Mapping[str, Role]:
        """The role of each engine, by its id."""
        ordered = sorted(engines, key=lambda engine: (engine.started, engine.engine_id))
        last = len(self.names) - 1
        return {engine.engine_id: self.names[min(place, last)] for place, engine in enumerate(ordered)}


def newest(own: Roles | None, heard: Roles | None) -> Roles | None:
    """Those of the higher number; of equal ones, which two gateways set at once, the same for all."""
    return max((roles for roles in (own, heard) if roles is not None), default=None)
