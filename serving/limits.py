"""Limits: how many sequences and connections the edges hold at once, and the way out.

One object for HTTP and gRPC together. Draining refuses newcomers with 503/UNAVAILABLE and waits for those inside.
Decision: several gateways divide serve.max_concurrent_requests evenly, by how many there are, and tell each other nothing: so
together they hold no more, and what one has left another does not use. In the engines' queues clients are equal all the same.
Where all that is inside has begun to answer, nothing can go for an urgent request; engines have it give way, so the request
comes in beside it. A quarter of the slots is kept for that, on top: whoever counts priorities down gets no further.
"""

import asyncio
import logging
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from trinity.config import Client, ServeConfig
from trinity.errors import InvalidRequest, Overloaded, Unavailable

log = logging.getLogger("trinity.serving")
MOST_DESCRIPTORS, OTHER_DESCRIPTORS = 65_536, 256  # Ray's, files, and connections of one's own
PART = 4  # a quarter of the slots may be one request's, and as many more are for urgent ones


def within_descriptors(config: ServeConfig) -> ServeConfig:
    """The settings with as many connections as this process has descriptors for, after it took all that it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        soft = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, max(soft, MOST_DESCRIPTORS))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = max(1, (soft - OTHER_DESCRIPTORS) // 2)  # two listeners share them
    if room < config.max_connections:
        log.warning("%d descriptors leave room for %d connections of each listener", soft, room)
    return config.model_copy(update={"max_connections": min(room, config.max_connections)})


class Slot:
    """Room of one sequence. `wait` is the timeout within which its next token is waited for."""

    def __init__(self, claim: "Claim"):
        self.claim = claim
        self.error: Unavailable | Overloaded | None = None
        self.wait: asyncio.Timeout | None = None

    def lose(self, error: Unavailable | Overloaded) -> None:
        """Have the sequence end with this error, now or when it next waits."""
        self.error = error
        if self.wait is not None and not self.wait.expired():
            self.wait.reschedule(0.0)


class Claim:
    """Slots of one request: it gets all of them at once, or none. `num`: those that it holds, or wants."""

    def __init__(self, num: int):
        self.num, self.num_untaken = num, num
        self.client, self.priority = "", 0
        self.has_begun = False  # one of its sequences has a token
        self.error: Overloaded | None = None
        self.slots = set[Slot]()

    def take(self) -> Slot:
        """Raises Overloaded where another request has its place by now."""
        if self.error is not None:
            raise self.error
        self.num_untaken -= 1
        self.slots.add(slot := Slot(self))
        return slot

    def displace(self, error: Overloaded) -> None:
        self.error = error
        for slot in self.slots:
            slot.lose(error)


CLAIM: ContextVar[Claim | None] = ContextVar("claim", default=None)  # of the request that is being answered


class Admission:
    """Counts what is inside; a slot is given back however its holder ends. Each client has a share of the slots by weight;
    whoever comes with the admin key, or without one, may have all. Where there is no room an urgent request takes the place of
    less urgent ones that have not begun to answer, the least urgent and latest first: those of its own client where its share
    is used up, anybody's where all slots are. Beside less urgent ones that have begun it has one of the places over the limit,
    a quarter of it."""

    def __init__(self, config: ServeConfig, displaced: Callable[[], object] = lambda: None):
        """`displaced` hears of each request that loses its place."""
        self.held: Counter[str] = Counter()
        self._displaced = displaced
        self.leaving = self.draining = False  # balancers are told so; newcomers are refused
        self.num_gateways = 1  # that share serve.max_concurrent_requests
        self._most_of_all = config.max_concurrent_requests
        clients = config.client_by_key.values()
        total = sum(client.weight for client in clients)
        self._shares = {client.name: client.weight / total for client in clients}
        self._claims = dict[Claim, None]()  # in the order in which they came
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def limit(self) -> int:
        """Slots of this gateway: its part of serve.max_concurrent_requests."""
        return max(1, self._most_of_all // self.num_gateways)

    @property
    def active(self) -> int:
        return self.held.total()

    def most(self, client: Client) -> int:
        """Slots that the client may hold."""
        return max(1, int(self.limit * self._shares.get(client.name, 1.0)))

    def check(self, num: int, client: Client) -> None:
        """Note that the request under way is of so many sequences. Raises InvalidRequest where others would find no slot."""
        most = max(1, min(self._most_of_all // PART, self.most(client)))
        if num > most:
            raise InvalidRequest(
                f"{num} sequences (prompts x n) in one request; {most} are taken, at most a quarter of "
                "serve.max_concurrent_requests. Send several requests."
            )
        CLAIM.set(Claim(num))

    @contextmanager
    def slot(self, client: Client, priority: int = 0) -> Iterator[Slot]:
        """Raises Unavailable while draining, and Overloaded when all slots are taken or all of the client's, and by none that
        would have to give way."""
        claim = CLAIM.get()
        if claim is None or not (claim.num_untaken or claim.error):
            claim = Claim(1)
        if claim not in self._claims and claim.error is None:
            self._enter(claim, client, priority)
        slot = claim.take()
        try:
            yield slot
        finally:
            claim.slots.discard(slot)
            self._give_back(claim, 1 if claim.slots else claim.num)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse newcomers and wait for the rest; False if some were still inside after `timeout_s`. Repeatable."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def cut(self, error: Unavailable) -> None:
        """End what is inside with this error."""
        for claim in self._claims:
            for slot in claim.slots:
                slot.lose(error)

    # -- inside

    def _enter(self, claim: Claim, client: Client, priority: int) -> None:
        if self.draining:
            raise Unavailable("the server is shutting down; send the request to another one, or again later")
        claim.client, claim.priority = client.name, priority
        for victim in self._in_the_way(claim, client):
            victim.displace(Overloaded("a more urgent request has its place; send it again later"))
            self._give_back(victim, victim.num)
            self._displaced()
        self.held[client.name] += claim.num
        self._claims[claim] = None
        self._idle.clear()

    def _in_the_way(self, claim: Claim, client: Client) -> list[Claim]:
        """The requests that have to go for this one, most often none. Raises Overloaded."""
        lacks = claim.num - (self.limit - self.active)
        lacks_own = claim.num - (self.most(client) - self.held[client.name])
        if max(lacks, lacks_own) <= 0:
            return []
        found = self._to_go(claim, lacks, lacks_own)
        if found is None and self._goes_before_some(claim, among_own=lacks_own > 0):
            found = self._to_go(claim, lacks - over(self.limit), lacks_own - over(self.most(client)))
        if found is None:
            raise self._full(client, of_all=lacks > 0)
        return found

    def _full(self, client: Client, of_all: bool) -> Overloaded:
        if of_all:
            return Overloaded(
                f"{self.active} requests are running, as many as serve.max_concurrent_requests allows{self._divided}"
            )
        return Overloaded(
            f"{self.held[client.name]} requests of client {client.name!r} are running, all its share of "
            f"serve.max_concurrent_requests{self._divided}; wait for some, or ask for a larger weight"
        )

    def _goes_before_some(self, claim: Claim, among_own: bool) -> bool:
        """Say whether something that has begun, of its client where `among_own`, will give way in the engines."""
        others = (each for each in self._claims if not among_own or each.client == claim.client)
        return any(each.priority > claim.priority and each.has_begun for each in others)

    def _to_go(self, claim: Claim, lacks: int, lacks_own: int) -> list[Claim] | None:
        """Requests whose slots are so many, and so many of the own client's; None where too few may go."""
        may_go = [each for each in reversed(self._claims) if each.priority > claim.priority and not each.has_begun]
        may_go.sort(key=lambda each: -each.priority)  # stable: of equal ones the latest first
        own = _first([each for each in may_go if each.client == claim.client], lacks_own)
        rest = None if own is None else _first([each for each in may_go if each not in own], lacks - _sum(own))
        return None if own is None or rest is None else own + rest

    @property
    def _divided(self) -> str:
        return f" here, one of {self.num_gateways} gateways" if self.num_gateways > 1 else ""

    def _give_back(self, claim: Claim, num: int) -> None:
        """The last sequence of a request gives back all that is left: its others may never have begun."""
        if claim not in self._claims:
            return
        self.held[claim.client] -= num
        claim.num -= num
        if not claim.num:
            del self._claims[claim]
            claim.num_untaken = 0
        if not self.active:
            self._idle.set()


def over(most: int) -> int:
    """Places beside so many slots that are for urgent requests."""
    return max(1, most // PART)


def _sum(claims: list[Claim]) -> int:
    return sum(claim.num for claim in claims)


def _first(claims: list[Claim], num: int) -> list[Claim] | None:
    """Claims from the first on that hold so many slots together; None where all of them do not."""
    found = list[Claim]()
    for claim in claims:
        if num <= 0:
            break
        found.append(claim)
        num -= claim.num
    return found if num <= 0 else None
