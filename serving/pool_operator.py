"""A pool's placement service as both edges see it: its latest snapshot, followed by one loop, and its commands.

Decisions: the operator's calls block, so they run in threads of their own: a placement service that hangs takes no thread
of the tokenizer's and stalls no stream. One loop asks for everybody: any number of dashboards, watchers and scrapes costs
the service one call a second. A gateway starts and serves while the service is away; what is shown then says how old it is.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from serving.errors import NoPool
from trinity.config import AdapterRef, AdapterSet
from trinity.errors import DeadlineExceeded, Overloaded, TrinityError, Unavailable
from trinity.placement.snapshot import Snapshot

log = logging.getLogger("trinity.serving")
T = TypeVar("T")
PERIOD_S = 1.0  # between two snapshots, unless an epoch comes first
ANSWER_S = 10.0  # beyond what was asked for, until the service counts as away
NUM_THREADS = 4
MAX_WAITING = 32
AWAY = "the placement service does not answer right now; try again"
STOPPING = "the server is stopping; ask another"


class Operator(Protocol):
    """`actors.control.admin.PlacementOperator`. Calls block and raise TrinityErrors; changes run on once asked for."""

    def snapshot(self) -> Snapshot: ...

    def wait(self, epoch: int, timeout_s: float) -> Snapshot:
        """Returns when the table's epoch is above `epoch`, or the time is up."""
        ...

    def scale(self, num_shards: int, reason: str) -> int:
        """Each of the four answers with the epoch before the change."""
        ...

    def replicate(self, layer: int, expert: int, num_replicas: int) -> int: ...

    def drain(self, shard: str) -> int: ...

    def rebalance(self) -> int: ...

    def load_adapter(self, name: str, source: str, timeout_s: float) -> AdapterSet:
        """All adapters that are served then."""
        ...

    def unload_adapter(self, name: str) -> AdapterSet: ...


@dataclass(frozen=True)
class Seen:
    """A snapshot and when it came, by the event loop's clock."""

    snapshot: Snapshot
    at_s: float


class Placement:
    """Owns the loop that follows the service, and its threads. `connect` is called in them, again after each failure.

    `observe` hears of every snapshot, and None once the service is away. `connect` None: this server has no pool.
    """

    def __init__(self, connect: Callable[[], Operator] | None, observe: Callable[[Snapshot | None], None]):
        self._connect, self._observe = connect, observe
        self._operator: Operator | None = None
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="placement") if connect else None
        self._seen: Seen | None = None
        self._adapters = AdapterSet()
        self._away: TrinityError | None = None
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._waiting = 0
        self._stopped = False

    @property
    def is_there(self) -> bool:
        """Has this server's engine a pool?"""
        return self._connect is not None

    def start(self) -> None:
        """Begin, in the event loop that serves."""
        if self._connect is not None:
            self._task = asyncio.create_task(self._follow())

    def stop(self) -> None:
        """Watchers end with Unavailable. Repeatable."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
            self._tell(Unavailable(STOPPING))
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def latest(self) -> tuple[Snapshot, float]:
        """The last snapshot and its age in seconds: about PERIOD_S, more while the service is away. Costs nothing.

        Raises NoPool, and Unavailable before the first one.
        """
        self._check_pool()
        if self._seen is None:
            raise self._away or Unavailable(AWAY)
        return self._seen.snapshot, asyncio.get_running_loop().time() - self._seen.at_s

    @property
    def adapters(self) -> tuple[AdapterRef, ...]:
        """Adapters that are served, as far as is known; a server without a pool has none."""
        return self._adapters.refs

    def check_known(self) -> None:
        """Raise Unavailable before it is known which adapters there are."""
        if self._connect is not None and self._seen is None:
            raise self._away or Unavailable(AWAY)

    async def load_adapter(self, name: str, source: str, timeout_s: float) -> None:
        """Raises what the operator raises, NoPool, Unavailable, Overloaded, DeadlineExceeded."""
        self._know(await self._asked(lambda operator: operator.load_adapter(name, source, timeout_s), timeout_s))

    async def unload_adapter(self, name: str) -> None:
        self._know(await self.ask(lambda operator: operator.unload_adapter(name)))

    def _know(self, adapters: AdapterSet) -> None:
        """Hear of them; of two that come at once the newer counts."""
        self._adapters = max(self._adapters, adapters, key=lambda each: each.number)

    async def watch(self, every_s: float) -> AsyncGenerator[Snapshot, None]:
        """The last snapshot, then one at each new epoch and every `every_s` (in steps of PERIOD_S). Ends with Unavailable."""
        self._check_pool()
        clock = asyncio.get_running_loop().time
        epoch, due_s = -1, 0.0
        while True:
            news = self._news
            if self._away is not None:
                raise self._away
            if self._seen and (self._seen.snapshot.table.epoch != epoch or clock() >= due_s):
                epoch, due_s = self._seen.snapshot.table.epoch, clock() + every_s - PERIOD_S / 2
                yield self._seen.snapshot
            else:
                await news.wait()

    async def ask(self, what: Callable[[Operator], T], timeout_s: float | None = None) -> T:
        """The answer to one call. Raises what the operator raises, NoPool, Unavailable, Overloaded, DeadlineExceeded."""
        return await self._asked(what, ANSWER_S if timeout_s is None else min(timeout_s, ANSWER_S))

    async def _asked(self, what: Callable[[Operator], T], timeout_s: float) -> T:
        self._check_pool()
        if self._stopped:
            raise Unavailable(STOPPING)
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{self._waiting} calls wait for the placement service; try again later")
        return await self._call(what, timeout_s)

    def _check_pool(self) -> None:
        if self._connect is None:
            raise NoPool("this server's engine has no pool of expert shards; `trinity serve CHECKPOINT` makes one")

    async def _call(self, what: Callable[[Operator], T], timeout_s: float) -> T:
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, what)
        except TimeoutError:
            raise DeadlineExceeded(f"the placement service did not answer within {timeout_s:.3g} s") from None
        finally:
            self._waiting -= 1

    def _run(self, what: Callable[[Operator], T]) -> T:
        """Run it in a thread."""
        assert self._connect is not None
        operator = self._operator or self._connect()
        self._operator = operator
        return what(operator)

    async def _follow(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            try:
                found = await self._call(self._next, PERIOD_S + ANSWER_S)
                self._seen = Seen(found, clock())
                self._know(found.adapters)
                self._observe(found)
                self._tell(None)
            except Exception as error:
                self._lose(error)
                await asyncio.sleep(PERIOD_S)

    def _next(self, operator: Operator) -> Snapshot:
        """Run it in a thread."""
        if self._seen is None or self._away is not None:
            return operator.snapshot()
        return operator.wait(self._seen.snapshot.table.epoch, PERIOD_S)

    def _lose(self, error: Exception) -> None:
        """Say once that nobody answered, and tell all."""
        if self._away is None:
            log.warning("no placement service answers: %s: %s", type(error).__name__, error)
        self._operator = None
        self._observe(None)
        self._tell(error if isinstance(error, Unavailable) else Unavailable(AWAY))

    def _tell(self, away: TrinityError | None) -> None:
        self._away = away
        self._news.set()
        self._news = asyncio.Event()
