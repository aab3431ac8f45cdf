"""Versions of a shard's weights: those of its store, and which of them rows are computed with.

Decisions: `lock` guards everything, `making` the memory of versions that are not there yet. Whatever changes in the store is
published at once; who only computes with a version needs no lock, because nobody writes to it: memory is used again when its
readers have left.
"""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from trinity.errors import DeadlineExceeded, StepConflict, TrinityError
from trinity.experts.base import LayerWeights
from trinity.experts.derived import form_of
from trinity.experts.layer import ReadyLayer
from trinity.experts.native_layers import NativeLayers
from trinity.experts.published import PublishedVersions, line_noted
from trinity.experts.spec import ShardSpec
from trinity.experts.stacked import (
    empty_forms,
    empty_optimizer,
    experts_of,
    is_weight,
    kinds_of,
    optimizer_of,
    stacks_of,
    version_after,
    with_notes,
)
from trinity.optim.optimizer import Optimizer
from trinity.rpc.messages import WEIGHT, Forward
from trinity.state.versioned_store import Store, Version


class WeightVersions:
    """Owns the store's versions; whoever calls holds `lock`, except for `reading`, `number` and `present`.

    `on_change` is called when the present version becomes another one: what was made of it is void.
    """

    def __init__(self, spec: ShardSpec, store: Store, on_change: Callable[[], None]):
        self.spec, self.store, self.on_change = spec, store, on_change
        self.lock = threading.RLock()
        self.making = threading.Lock()  # held, before `lock`, by whoever fills memory of a version; it may take long
        self._published = PublishedVersions(spec.name, spec.model, spec.optim)
        self._publish()

    @property
    def number(self) -> int:
        """Number of the present version, whose weights count; -1 without any."""
        return self.store.committed

    @property
    def line(self) -> int:
        """The line that all versions are of."""
        return self._published.line

    @property
    def ready(self) -> Mapping[int, ReadyLayer]:
        """Layers of the present version, as rows are computed with them."""
        return self._published.layers()

    @property
    def present(self) -> dict[int, LayerWeights]:
        """Weights of the present version, by layer, where they are here as they are."""
        ready = self._published.layers().items()
        return {layer: each.weights for layer, each in ready if each.weights is not None}

    @property
    def num_bytes(self) -> int:
        """Bytes of the present version's weights, in all forms that are here; adapters are not counted."""
        if self.number < 0:
            return 0
        kinds = [kind for kind in kinds_of(self.store.current) if kind == WEIGHT or form_of(kind) is not None]
        layers = experts_of(self.store.current)
        return sum(s.nbytes for kind in kinds for layer in layers for s in stacks_of(self.store.current, layer, kind))

    @property
    def trained(self) -> dict[int, Mapping[str, Tensor]]:
        """Stacks of the present version that take steps, by layer and name."""
        return {layer: ready.trained for layer, ready in self._published.layers().items()}

    # -- computing with them

    def reading(self, call: Forward) -> AbstractContextManager[ReadyLayer]:
        """The layer that a call is for, unchanged inside the block. Nobody waits for `lock`, which training may hold for as
        long as it computes, unless the version is not committed yet."""
        if self._published.is_to_come(call.version):
            with self.lock:
                self.find(call.layer, call.version, call.deadline_s)
        self._check_time(call.deadline_s)
        return self._published.lent(call.version, call.layer)

    def reading_whole(self, version: int) -> AbstractContextManager[Mapping[int, ReadyLayer]]:
        """All layers of a version, unchanged inside the block; none of one that is not committed, or has gone."""
        return self._published.lent_whole(version)

    def find(self, layer: int, version: int, deadline_s: float) -> ReadyLayer:
        """A layer at a version. A caller that names the staged version knows that it was decided on: it is committed first.
        Raises what PublishedVersions raises."""
        self._check_time(deadline_s)
        if self._published.number(version) == self.number + 1 and self.store.staged is not None:
            self._commit()
        return self._published.find(version, layer)

    def missing(self, version: int, layer: int, epoch: int, expert: int) -> TrinityError:
        """The error for a caller that wants an expert which is not here at that version."""
        return self._published.missing(version, layer, epoch, expert)

    def withdraw(self, numbers: list[int]) -> None:
        """Wait until nobody computes with these versions; nobody begins to."""
        self._published.withdraw(numbers)

    def compute_natively(self, native: NativeLayers) -> None:
        """Let callers in C++ compute with these versions, too, from now on."""
        self._published.native = native
        self._published.publish_natively()

    # -- the next one

    def staged_by(self, attempt: int, step: int) -> Version | None:
        """The version that the attempt made of that step, committed or not, if it did."""
        found = self.store.current if step == self.number else self.store.staged
        return found if found is not None and found.notes.get("attempt") == attempt else None

    def expect_next(self, step: int) -> None:
        """Raise StepConflict unless that step follows the present version, or the staged one, which is then committed: whoever
        goes on from it knows that it was decided."""
        if self.store.staged is not None and step == self.number + 2:
            self._commit()
        if step != self.number + 1:
            raise StepConflict(f"shard {self.spec.name} is at version {self.number}; step {step} does not follow")

    def begin_next(self, keep: tuple[int, ...]) -> tuple[Optimizer, Optimizer, dict[str, Tensor]]:
        """Optimizers over the present version and over memory for the next, and memory for other forms of what it makes;
        `making` is held too. Older versions are gone, except for the weights of those to `keep`."""
        if self.spec.optim is None:
            raise StepConflict(f"shard {self.spec.name} serves; it takes no steps")
        self.store.discard_staged()
        self.withdraw(self.store.unwanted(keep))
        self.store.retire(keep, is_weight)
        self._publish()
        present = optimizer_of(self.store.current, self.spec.model, self.spec.optim)
        return present, empty_optimizer(self.store, present), empty_forms(self.store, self.store.current, present)

    def stage(self, made: Optimizer, derived: Mapping[str, Tensor], **notes: Any) -> None:
        """Take in what was made in the memory for the next version: it is there to be committed."""
        made_of = version_after(self.store.current, made, derived)
        self.store.put(with_notes(made_of, line=self.line, **notes))
        self._publish()

    def commit(self, step: int) -> None:
        """Make the staged version the present one; harmless when it is already. Raises StepConflict without one."""
        if step != self.number:
            self.expect_next(step)
            self._commit()

    def discard_staged(self) -> None:
        """Let go of the version that was to come, staged or being made."""
        self.store.discard_staged()
        self._publish()

    # -- other contents

    def put(self, version: Version, commit: bool = False) -> None:
        """Take in a version whose stacks have other sizes than those before; with `commit` it is the present one."""
        self.store.put(version)
        self.store.trim()
        if commit:
            self.store.commit(version.number)
        self._publish()

    def clear(self) -> None:
        """Let go of all versions, when nobody computes with them any more."""
        self.withdraw(list(self.store.versions))
        self.store.clear()
        self._publish()

    def recover_to(self, committed: int, attempt: int | None, line: int) -> None:
        """Be at the version that the pool has decided on, of that line and made by that attempt, if a process before this one
        left it here. Otherwise hold nothing."""
        found = self.store.versions.get(committed)
        is_made = found is not None and found.notes.get("attempt") in (None, attempt)  # None: copied from others
        if is_made and line_noted(found) == line:
            self.store.roll_back(committed) if committed < self.number else self.store.commit(committed)
            self._publish()
        else:
            self.clear()

    # -- inside

    def _check_time(self, deadline_s: float) -> None:
        if time.monotonic() > deadline_s:
            raise DeadlineExceeded(
                f"shard {self.spec.name}: the call's deadline passed {time.monotonic() - deadline_s:.2f} s ago"
            )

    def _commit(self) -> None:
        if self.store.staged is None:
            raise StepConflict(f"shard {self.spec.name} has nothing staged after version {self.number}")
        self.store.commit(self.number + 1)
        self.on_change()
        self._publish()

    def _publish(self) -> None:
        self._published.publish(self.store.versions, self.store.committed)
