"""Which engine a request is sent to: the one where it costs least.

    cost = tokens of its prompt that are not cached there, four times: it waits for them, others there wait, too, and what is
           computed in a second place takes that place's time and memory again
         + tokens of prompts that were sent there before it and have no answer yet
         + LOAD_TOKENS for each request there

Decisions: whose beginning is cached where is what this gateway has sent, until an engine's own account says what is really
there (trinity/engine/key_log.py); a wrong guess costs time, never an answer. Load is what engines say of themselves, and what
this gateway has sent and got back since. From FEW requests an engine on, none is sent where there are over MOST_ABOVE_MEAN
times as many as on average, whatever is cached there. That a conversation comes back to its engine follows from the cost: what
was said is there.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from serving.frontend import EngineInfo
from trinity.engine.key_log import MOST, NO_ACCOUNT, KeyChanges, short
from trinity.engine.prefix_keys import extend

if TYPE_CHECKING:
    from trinity.config import Role

MISSING, LOAD_TOKENS = 4, 64
NO_BLOCKS = 1 << 62  # tokens in a block where nothing is cached
FEW, MOST_ABOVE_MEAN = 8, 1.25


class Chain:
    """Short keys of a text's full blocks, as its engine names them; it grows with the answer."""

    def __init__(self, root: bytes, block_size: int):
        self.keys, self.num_tokens = list[int](), 0
        self.block_size, self._last, self._rest = block_size, root, list[int]()

    def add(self, token_ids: Sequence[int]) -> None:
        self._rest += token_ids
        self.num_tokens += len(token_ids)
        num, keys = len(self._rest) // self.block_size, list[bytes]()
        if num:
            extend(keys, self._last, self._rest, self.block_size, num)
            self._last = keys[-1]
            del self._rest[: num * self.block_size]
            self.keys += map(short, keys)


class Sent:
    """A request that an engine has. Ended by whoever sent it."""

    def __init__(self, chain: Chain, num_missing: int):
        self.chain = chain
        self.num_pending = num_missing  # tokens before its first one

    def said(self, token_ids: Sequence[int]) -> None:
        """It has got these tokens."""
        self.num_pending = 0
        self.chain.add(token_ids)


class Asked(NamedTuple):
    """Requests that an engine had from here when it was asked for an account, and when that was."""

    time: int
    num_sent: int


class Seat:
    """Knowledge that a gateway has of one engine."""

    def __init__(self, info: EngineInfo):
        self.info = info
        self.role: Role = "both"
        self.is_there = True  # False: lost, until it answers again
        self.number = NO_ACCOUNT  # of its last account
        self.chosen = 0  # when, counted in choices
        self._told = set[int]()
        self._guessed = OrderedDict[int, int]()  # keys and their time, which is that of accounts
        self._time = self._num_others = 0
        self._sent = set[Sent]()

    @property
    def load(self) -> int:
        """Requests there, those of other gateways too."""
        return self._num_others + len(self._sent)

    def ask(self) -> Asked:
        """Begin to ask it for an account."""
        self._time += 1
        return Asked(self._time, len(self._sent))

    def told(self, info: EngineInfo, changes: KeyChanges | None, asked: Asked) -> None:
        """It has said this of itself."""
        self.info, self.is_there = info, True
        said = info.stats.get("num_running", 0) + info.stats.get("num_waiting", 0)
        self._num_others = max(0, said - asked.num_sent)
        if changes is None:
            return
        if changes.is_whole:
            self._told.clear()
        self._told.update(changes.came)
        self._told.difference_update(changes.went)
        self.number = changes.number
        while self._guessed and next(iter(self._guessed.values())) < asked.time:
            self._guessed.popitem(last=False)
        for sent in self._sent:
            if sent.num_pending:
                self._guess(sent.chain.keys)

    def num_cached(self, chain: Chain) -> int:
        """Tokens of a prompt that are there, or will be before it is begun. Never all."""
        most = (chain.num_tokens - 1) // chain.block_size
        for place in range(min(most, len(chain.keys)), 0, -1):
            if (key := chain.keys[place - 1]) in self._told or key in self._guessed:
                return place * chain.block_size
        return 0

    def cost(self, chain: Chain) -> int:
        pending = sum(sent.num_pending for sent in self._sent)
        return MISSING * (chain.num_tokens - self.num_cached(chain)) + pending + LOAD_TOKENS * self.load

    @contextmanager
    def holding(self, chain: Chain) -> Iterator[Sent]:
        """It has a request, inside the block, and its text from then on."""
        sent = Sent(chain, chain.num_tokens - self.num_cached(chain))
        self._sent.add(sent)
        self._guess(chain.keys)
        try:
            yield sent
        finally:
            self._sent.discard(sent)
            self._guess(chain.keys)

    def _guess(self, keys: Sequence[int]) -> None:
        for key in keys[-MOST:]:
            self._guessed[key] = self._time
            self._guessed.move_to_end(key)
        while len(self._guessed) > MOST:
            self._guessed.popitem(last=False)


class Routing:
    """The engines that a gateway knows of, and its choice among them."""

    def __init__(self) -> None:
        self.seats: dict[str, Seat] = {}
        self._choices = count(1)

    def chain(self, traced: bool, client: str, salt: str | None, adapter: int | None) -> Chain:
        """Begin to name a request's blocks."""
        base = next((seat.info.keys for seat in self.seats.values() if seat.info.keys), None)
        root = base.root(traced, client, salt, adapter) if base else b""
        return Chain(root, base.block_size if base else NO_BLOCKS)

    def choose(self, chain: Chain, among: Iterable[Seat]) -> Seat:
        """The engine where it costs least, of those that are there; of all where none is."""
        seats = list(among)
        fits = within_bound([seat for seat in seats if seat.is_there] or seats)
        chosen = min(fits, key=lambda seat: (seat.cost(chain), seat.chosen))
        chosen.chosen = next(self._choices)
        return chosen


def within_bound(seats: Sequence[Seat]) -> list[Seat]:
    """Those that may have one request more."""
    total = 1 + sum(seat.load for seat in seats)
    if total < FEW * len(seats):
        return list(seats)
    most = MOST_ABOVE_MEAN * total / len(seats)
    return [seat for seat in seats if seat.load + 1 <= most]
