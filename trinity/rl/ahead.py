"""Answers drawn ahead of the steps that learn from them, by a thread beside training, from weights that are pinned.

Legend: a step's position is the number of batches consumed before it; k is `rl.max_staleness`.
Decisions. Answers for the step at position p + k come from the weights at position p, exactly, those for the first k steps from
what the run begins with: no answer is more than k steps old, and which weights drew it depends on nobody's speed. So a run that
is killed and resumed learns from the same answers: those that are drawn are on the disk (kept_answers.py), of the others the
version is noted that was promised, which shards and workers keep (`versions`) until they are drawn. A version is decided on
when the answers of the step that begins with it are there, and a checkpoint begun when all are that were begun before.
Where a promised version has gone all the same (other hosts, an older checkpoint of another run) answers come from the present
one, which is said.
"""

import logging
import queue
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from trinity.errors import VersionGone
from trinity.rl.judges import Verdict
from trinity.rl.kept_answers import KeptAnswers
from trinity.rl.rollout import PinnedWeights
from trinity.utils.trying import tried

log = logging.getLogger(__name__)
T = TypeVar("T")


class Ahead:
    """Owned by the trainer's thread. `draw`: the answers of the step at a position, by what `weights` aim at."""

    def __init__(
        self, draw: Callable[[int], Verdict], weights: PinnedWeights, kept: KeptAnswers, bound: int, num_steps: int
    ):
        self._draw, self._weights, self._kept, self._bound, self._num_steps = draw, weights, kept, bound, num_steps
        self._jobs = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]()
        threading.Thread(
            target=self._work, name="trinity-rollout", daemon=True
        ).start()  # nobody waits for it at the end
        self._pending: dict[int, Future[Verdict]] = {}
        self._promised: dict[int, int] = {}

    @property
    def versions(self) -> tuple[int, ...]:
        """Weights that must stay, because they draw for steps to come. The same on all workers, at any time of a step."""
        return tuple(sorted({self._promised[position] for position in self._pending}))

    def restore(self, position: int) -> None:
        """Take up what was drawn or promised for the next steps, where a run goes on from there."""
        promised = self._kept.promised()
        for at in range(position, min(position + self._bound, self._num_steps)) if position else ():
            if (found := self._kept.read(at)) is not None:
                self._pending[at] = Future()
                self._promised[at], verdict = found
                self._pending[at].set_result(verdict)
            elif at in promised and self._weights.has(promised[at]):
                self._begin(at, promised[at])
            else:
                log.warning("no answers are left for step %d, nor the weights that were to draw them", at + 1)

    def next(self, position: int, version: int, resumable: Collection[int]) -> Verdict:
        """The answers of the step at this position, where the weights are at that version now; later ones are begun.
        `resumable`: positions that the run may go on from; what these need stays on the disk."""
        starts = {position, *resumable}
        self._kept.prune({at + later for at in starts for later in range(self._bound + 1)})
        for at in range(position, min(position + self._bound + 1, self._num_steps)):
            if at not in self._pending:
                self._begin(at, version)
        found = self._result(position, version)
        del self._pending[position], self._promised[position]
        return found

    def settle(self, position: int, version: int) -> None:
        """Wait until the answers of the step at this position are there."""
        if position in self._pending:
            self._result(position, version)

    def drain(self, version: int) -> None:
        """Wait until all are there that were begun."""
        for position in sorted(self._pending):
            self._result(position, version)

    def at(self, version: int, what: Callable[[], T]) -> T:
        """Do that on the thread, by weights of that version; -> what comes of it."""
        return self._submitted(partial(self._aimed, version, what)).result()

    # -- inside

    def _begin(self, position: int, version: int) -> None:
        self._promised[position] = version
        self._kept.promise(self._promised, anew=position)
        self._pending[position] = self._submitted(partial(self._job, position, version))

    def _submitted(self, what: Callable[[], T]) -> "Future[T]":
        future = Future[T]()
        self._jobs.put((future, what))
        return future

    def _work(self) -> None:
        while True:
            future, what = self._jobs.get()
            found = tried(what, Exception)  # the edge of this thread: whoever waits is told
            future.set_exception(found) if isinstance(found, Exception) else future.set_result(found)

    def _job(self, position: int, version: int) -> Verdict:
        found = self._aimed(version, lambda: self._draw(position))
        self._kept.write(position, version, found)
        return found

    def _aimed(self, version: int, what: Callable[[], T]) -> T:
        self._weights.aim(version)
        return what()

    def _result(self, position: int, version: int) -> Verdict:
        """`version`: the present one, which draws where the promised one has gone."""
        try:
            return self._pending[position].result()
        except VersionGone as error:
            log.warning("answers of step %d come from version %d: %s", position + 1, version, error)
            self._begin(position, version)
            return self._pending[position].result()
