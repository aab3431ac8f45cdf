"""What a caller's process knows of the placement, kept fresh by a thread: the newest table, and who does not answer.

Decisions: a caller reads two attributes and never waits, except when a shard told it that its table is old. Shards that were
lost are asked for their address until they answer; meanwhile rows go to other replicas.
"""

import logging
import threading
import time

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.names import PLACEMENT, Handles, find
from trinity.errors import TrinityError
from trinity.placement.table import PlacementTable

log = logging.getLogger(__name__)
POLL_S = 10.0
AGAIN_S = 0.2
REFRESH_S = 1.0


class Follower:
    """A View (trinity/dispatch.py) of one pool. One for each process; its thread ends with the process."""

    def __init__(self, pool: str, namespace: str, table: PlacementTable, handles: Handles):
        self.table, self.away = table, frozenset[str]()
        self._pool, self._namespace, self._handles = pool, namespace, handles
        self._news, self._wake = threading.Condition(), threading.Event()
        for task in (self._follow, self._probe):
            threading.Thread(target=task, name=f"trinity-{task.__name__[1:]}", daemon=True).start()

    def lost(self, shard: str) -> None:
        with self._news:
            self.away |= {shard}
        self._wake.set()

    def refresh(self) -> None:
        """The thread hears of a new table as soon as there is one; wait for it a moment."""
        epoch = self.table.epoch
        with self._news:
            self._news.wait_for(lambda: self.table.epoch > epoch, REFRESH_S)

    def _follow(self) -> None:
        while ray.is_initialized():
            try:
                service = find(self._pool, PLACEMENT, self._namespace)
                found = ray.get(
                    service.newer.options(max_task_retries=0).remote(self.table.epoch, POLL_S), timeout=2 * POLL_S
                )
            except SystemExit:  # what Ray raises in a process that leaves it
                return
            except (TrinityError, RayError, GetTimeoutError):  # it starts again
                time.sleep(AGAIN_S)
                continue
            if found is not None:
                self._take(found)

    def _take(self, table: PlacementTable) -> None:
        with self._news:
            self.table, self.away = table, self.away & frozenset(table.shards)
            self._news.notify_all()
        log.info("placement epoch %d: %d shards", table.epoch, len(table.shards))

    def _probe(self) -> None:
        while ray.is_initialized():
            self._wake.wait()
            for shard in sorted(self.away):
                if self._answers(shard):
                    with self._news:
                        self.away -= {shard}
            if not self.away:
                self._wake.clear()
            else:
                time.sleep(AGAIN_S)

    def _answers(self, shard: str) -> bool:
        try:
            ray.get(self._handles[shard].address.remote(), timeout=1.0)
        except (TrinityError, RayError, GetTimeoutError):
            return False
        return True
