"""An engine's models of a run that trains: those of held versions, the one in use, and the next one, made beside it.

Decisions: two models take turns, so that passes go on with one while a newer version is copied into the other; who has no room
for two copies into the only one. Values are copied, not shared: the trainer's memory is written to again.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from trinity.errors import TrinityError

if TYPE_CHECKING:
    from trinity.models.common.decoder import CausalLM


class ModelDoubleBuffer:
    """Owns them. `make` gives an empty one; `load` fills one with a version, or raises VersionGone.

    For two threads: the engine's, which calls all but `prepare`, and one that prepares. There are never more of them than two
    and the most that were held at once: who needs another one waits for the load that is under way, and takes what is left.
    """

    def __init__(self, make: "Callable[[], CausalLM]", load: "Callable[[CausalLM, int], None]", beside: bool = True):
        self._make, self._load, self._beside = make, load, beside
        self._loading, self._guard = threading.Lock(), threading.Lock()  # the second of the four below
        self._held: dict[int, CausalLM] = {}
        self._latest: tuple[int, CausalLM] | None = None
        self._next: tuple[int, CausalLM] | None = None
        self._spare: list[CausalLM] = []

    def get(self, version: int, hold: bool = False) -> "CausalLM":
        """Good until the next call; a held version's until it is released. Raises VersionGone."""
        if (found := self._taken(version)) is not None:
            return found
        with self._loading:
            if (found := self._taken(version)) is not None:
                return found
            model = self._loaded(version, instead_of_latest=not (self._beside or hold))
            with self._guard:
                if hold:
                    self._held[version] = model
                else:
                    self._use(version, model)
        return model

    def prepare(self, version: int) -> None:
        """Make that version's ready, while passes use another. Raises VersionGone."""
        if not self._beside:
            return
        with self._loading:
            with self._guard:
                if self._found(version) is not None:
                    return
            model = self._loaded(version)
            with self._guard:
                self._next = version, model

    def hold(self, version: int) -> None:
        """Keep what there is of that version as it is until `release`."""
        with self._guard:
            if self._latest is not None and self._latest[0] == version:
                self._held[version], self._latest = self._latest[1], None
            elif self._next is not None and self._next[0] == version:
                self._held[version], self._next = self._next[1], None

    def release(self, version: int) -> None:
        with self._guard:
            if (model := self._held.pop(version, None)) is None:
                return
            if self._latest is None:
                self._latest = version, model
            else:
                self._spare.append(model)

    # -- inside

    def _taken(self, version: int) -> "CausalLM | None":
        """Take it for a pass, where it is there."""
        with self._guard:
            if self._next is not None and self._next[0] == version:
                self._use(*self._next)
                self._next = None
            return self._found(version)

    def _found(self, version: int) -> "CausalLM | None":
        pairs = [pair for pair in (self._latest, self._next) if pair is not None]
        return {**dict(pairs), **self._held}.get(version)

    def _use(self, version: int, model: "CausalLM") -> None:
        if self._latest is not None:
            self._spare.append(self._latest[1])
        self._latest = version, model

    def _loaded(self, version: int, instead_of_latest: bool = False) -> "CausalLM":
        model = self._free(instead_of_latest) or self._make()
        try:
            self._load(model, version)
        except TrinityError:
            with self._guard:
                self._spare.append(model)  # half of it may be new
            raise
        return model

    def _free(self, instead_of_latest: bool) -> "CausalLM | None":
        """One that nobody uses: a version that was ready and that no pass has asked for comes last."""
        with self._guard:
            if instead_of_latest and self._latest is not None:
                self._spare, self._latest = [*self._spare, self._latest[1]], None
            if not self._spare and self._next is not None:
                self._spare, self._next = [self._next[1]], None
            return self._spare.pop() if self._spare else None
