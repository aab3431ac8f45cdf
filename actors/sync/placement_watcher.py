"""Knowledge of a caller's process about the placement, kept fresh by a thread: the newest table, and who does not answer.

Decisions: a caller reads two attributes and never waits, except when a shard told it that its table is old. Shards that were
lost are asked for their address until they answer; meanwhile rows go to other replicas.
"""

import logging
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Protocol

import ray
from ray.exceptions import RayError

from actors.names import PLACEMENT, SERVICE, Handles, ask, find
from trinity.errors import TrinityError
from trinity.placement.table import PlacementTable
from trinity.utils.trying import tried

log = logging.getLogger(__name__)
POLL_S = 10.0
AGAIN_S = 0.2
REFRESH_S = 1.0
ANSWER_S = 1.0  # for a shard that is asked whether it is there
STOP_S = 2.0
FAR = 2  # also a shard that does not say where it is


class Stoppable(Protocol):
    def stop(self) -> None: ...


_asking: "weakref.WeakSet[Stoppable]" = weakref.WeakSet()


def stop_before_leaving(what: Stoppable) -> None:
    """Something whose threads call Ray."""
    _asking.add(what)


def stop_all() -> None:
    """Stop them before this process leaves Ray: a thread in the middle of one of its calls would take the process along."""
    for each in list(_asking):
        each.stop()


class PlacementWatcher:
    """A PlacementView (trinity/dispatch/) of one pool. Its threads end with `stop`, or with the process.

    `version`: to be served, where `watch_version` has been called; None before.
    """

    def __init__(
        self, pool: str, namespace: str, table: PlacementTable, handles: Handles, wants_distances: bool = False
    ):
        self.table, self.unreachable, self.distances = table, frozenset[str](), dict[str, int]()
        self.version: int | None = None
        self._pool, self._namespace, self._handles = pool, namespace, handles
        self._wants_distances = wants_distances
        self._news, self._wake, self._stopped = threading.Condition(), threading.Event(), threading.Event()
        tasks = (self._follow, self._probe)
        self._threads = [threading.Thread(target=t, name=f"trinity-{t.__name__[1:]}", daemon=True) for t in tasks]
        for thread in self._threads:
            thread.start()
        stop_before_leaving(self)

    def stop(self) -> None:
        """Harmless when repeated."""
        self._stopped.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(STOP_S)

    def watch_version(self, version: int) -> None:
        """Follow the version that is served, too; `version` is what is known now."""
        self.version = version

    def other_version(self, known: int | None, timeout_s: float) -> int | None:
        """The version to be served, once it is another than that; -> after the timeout the known one."""
        with self._news:
            self._news.wait_for(lambda: self.version != known, timeout_s)
            return self.version

    def mark_unreachable(self, shard: str) -> None:
        with self._news:
            self.unreachable |= {shard}
            self._wake.set()

    def refresh(self) -> None:
        """The thread hears of a new table as soon as there is one; wait for it a moment."""
        epoch = self.table.epoch
        with self._news:
            self._news.wait_for(lambda: self.table.epoch > epoch, REFRESH_S)

    def _follow(self) -> None:
        with suppress(SystemExit):  # what Ray raises in a process that leaves it
            tried(self._measure, TrinityError, RayError)
            while not self._stopped.is_set():
                if tried(self._hear, TrinityError, RayError) is not None:  # the service starts again
                    self._stopped.wait(AGAIN_S)

    def _hear(self) -> None:
        """Wait for the next table, with an eye on being stopped."""
        service = find(self._pool, PLACEMENT, self._namespace)
        version, until_s = self.version, time.monotonic() + 2 * POLL_S
        ref = service.newer.options(max_task_retries=0).remote(self.table.epoch, version, POLL_S)
        while not self._stopped.is_set() and time.monotonic() < until_s and version == self.version:
            if ray.wait([ref], timeout=AGAIN_S)[0]:
                table, served = ask(ref, POLL_S, SERVICE)
                if version is not None:
                    self._serve(served)
                if table is not None:
                    self._take(table)
                    self._measure()
                return

    def _serve(self, version: int) -> None:
        with self._news:
            self.version = version
            self._news.notify_all()

    def _take(self, table: PlacementTable) -> None:
        with self._news:
            self.table, self.unreachable = table, self.unreachable & frozenset(table.shards)
            self._news.notify_all()
        log.info("placement epoch %d: %d shards", table.epoch, len(table.shards))

    def _measure(self) -> None:
        """Learn on which nodes the shards are, where that is of use."""
        if not self._wants_distances:
            return
        rack_of = {node["NodeID"]: node["Labels"].get("rack") for node in ray.nodes() if node["Alive"]}
        refs = {self._handles[shard].where.remote(): shard for shard in self.table.shards}
        found, _ = ray.wait(list(refs), num_returns=len(refs), timeout=ANSWER_S)
        said = {refs[ref]: tried(partial(ask, ref, ANSWER_S, refs[ref]), TrinityError) for ref in found}
        own, distances = ray.get_runtime_context().get_node_id(), dict.fromkeys(self.table.shards, FAR)
        for shard, where in said.items():
            if not isinstance(where, TrinityError):
                distances[shard] = distance(where[0], own, rack_of)
        if distances != self.distances:
            self.distances = distances

    def _probe(self) -> None:
        while not self._stopped.is_set():
            self._wake.wait()
            for shard in sorted(self.unreachable):
                if not self._stopped.is_set() and self._answers(shard):
                    with self._news:
                        self.unreachable -= {shard}
            with self._news:
                if not self.unreachable and not self._stopped.is_set():
                    self._wake.clear()
            if self.unreachable:
                self._stopped.wait(AGAIN_S)

    def _answers(self, shard: str) -> bool:
        def asked() -> bool:
            ask(self._handles[shard].address.remote(), ANSWER_S, f"shard {shard}")
            return True

        return tried(asked, TrinityError, RayError) is True


def distance(node: str, own: str, rack_of: Mapping[str, str | None]) -> int:
    """0 on the own node, 1 in its rack (Ray's node label `rack`), 2 elsewhere."""
    if node == own:
        return 0
    return 1 if rack_of.get(node) is not None and rack_of.get(node) == rack_of.get(own) else FAR
