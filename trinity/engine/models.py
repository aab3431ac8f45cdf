"""An engine's models of a run that trains: those of held versions, the one in use, and the next one, made beside it.

Decisions: two models take turns, so that passes go on with one while a newer version is copied into the other; who has no room
for two copies into the only one. Values are copied, not shared: the trainer's memory is written to again.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from trinity.errors import TrinityError

if TYPE_CHECKING:
    from trinity.model.afmoe import Afmoe


class Models:
    """Owns them. `make` gives an empty one; `load` fills one with a version, or raises VersionGone.

    For two threads: the engine's, which calls all but `prepare`, and one that prepares.
    """

    def __init__(self, make: "Callable[[], Afmoe]", load: "Callable[[Afmoe, int], None]", beside: bool = True):
        self._make, self._load, self._beside = make, load, beside
        self._guard = threading.Lock()  # of the four below
        self._held: dict[int, Afmoe] = {}
        self._latest: tuple[int, Afmoe] | None = None
        self._next: tuple[int, Afmoe] | None = None
        self._spare: Afmoe | None = None

    def get(self, version: int, hold: bool = False) -> "Afmoe":
        """Good until the next call; a held version's until it is released. Raises VersionGone."""
        with self._guard:
            if self._next is not None and self._next[0] == version:
                self._use(*self._next)
                self._next = None
            if (found := self._found(version)) is not None:
                return found
            if not self._beside and not hold:
                self._spare, self._latest = self._latest and self._latest[1], None
        model = self._loaded(version)
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
        with self._guard:
            if self._found(version) is not None:
                return
            if self._next is not None:
                self._spare, self._next = self._next[1], None
        model = self._loaded(version)
        with self._guard:
            self._next = version, model

    def hold(self, version: int) -> None:
        """What there is of that version stays as it is until `release`."""
        with self._guard:
            if self._latest is not None and self._latest[0] == version:
                self._held[version], self._latest = self._latest[1], None
            elif self._next is not None and self._next[0] == version:
                self._held[version], self._next = self._next[1], None

    def release(self, version: int) -> None:
        with self._guard:
            model = self._held.pop(version, None)
            if model is not None:
                if self._latest is None:
                    self._latest = version, model
                else:
                    self._spare = model

    # -- inside

    def _found(self, version: int) -> "Afmoe | None":
        pairs = [pair for pair in (self._latest, self._next) if pair is not None]
        return {**dict(pairs), **self._held}.get(version)

    def _use(self, version: int, model: "Afmoe") -> None:
        if self._latest is not None:
            self._spare = self._latest[1]
        self._latest = version, model

    def _loaded(self, version: int) -> "Afmoe":
        with self._guard:
            model, self._spare = self._spare, None
        model = model or self._make()
        try:
            self._load(model, version)
        except TrinityError:
            with self._guard:
                self._spare = model  # half of it may be new
            raise
        return model
