"""Prompts that one engine computes and another one goes on from: where their blocks lie, and how they come to this node.

Decisions. Blocks are handed over by the nodes' KV tiers: who computes a prompt has all its full blocks there before it says so,
and for who goes on they are a hit in the prefix cache like any other. So nothing of an answer depends on what comes over:
whatever is late, refused or lost on the way is computed here. Between nodes travel the blocks that are missing, and of windows
those that the next token looks back at.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from trinity.engine.kv_exchange import MOST_WANTED, Asked, SharedBlocks, Wanted
from trinity.engine.kv_tier import KVTier
from trinity.errors import TrinityError
from trinity.utils.trying import tried

log = logging.getLogger(__name__)
HELD_S = 10.0  # a pinned prompt's version after its end, until who goes on holds it
SAVE_S, AGAIN_S = 1.0, 0.005  # for the tier's lock
FIRST_S, BYTES_PER_S = 2.0, 50e6  # what a fetch may take: for the first byte, and at least so many then
BYTES_TOGETHER = 8 << 20  # of blocks in one answer, about
NUM_THREADS = 4


@dataclass(frozen=True)
class KVPlace:
    """The KV tier of a node: its name there, and the address at which its engine gives blocks to others."""

    node: str
    address: str
    tier: str


@dataclass(frozen=True)
class Prefilled:
    """A prompt whose first tokens were computed by weights of that name; their blocks are at that place. `num_cached`
    of them were there before."""

    num_tokens: int
    version: int
    place: KVPlace
    num_cached: int = 0


class Peer(Protocol):
    """A connection to another node's engine."""

    def ask(self, request: bytes, most_bytes: int, until_s: float) -> np.ndarray:
        """-> its answer, uint8, of at most so many bytes. Raises TrinityError or OSError."""
        ...

    def close(self) -> None: ...


class Listener(Protocol):
    """Listener for other nodes' engines, which asks `Handoff.answer`."""

    address: str

    def close(self) -> None: ...


Connect = Callable[[str, float], Peer]  # address, until when by time.monotonic()


class Handoff:
    """An engine's side of both: gives blocks of its node's tier, and fetches those of others. Owns its threads; for any
    thread."""

    def __init__(self, node: str, tier: KVTier, connect: Connect):
        self.blocks = SharedBlocks(*tier.shape)
        self.node = node
        self._listener: Listener | None = None
        self._tier, self._connect = tier, connect
        self._threads = ThreadPoolExecutor(NUM_THREADS, "trinity-handoff")
        self.num_fetched = 0

    @property
    def place(self) -> KVPlace:
        return KVPlace(self.node, self._listener.address if self._listener else "", self.blocks.name)

    def listen(self, listener: Listener) -> None:
        """Give blocks to whom that one lets in, which is this one's from now on."""
        self._listener = listener

    def answer(self, request: bytes) -> Iterator[bytes | memoryview]:
        """Pieces of the answer to another node's engine. Raises InvalidRequest."""
        return self.blocks.told(Asked.unpack(request))

    async def bring(self, prefilled: Prefilled, keys: Sequence[bytes], oldest: int, left_s: float) -> None:
        """Have the blocks in this node's tier, as far as that is possible in time. Never raises: what is missing is computed.

        `oldest`: the version, besides that of the prompt, whose blocks will do."""
        place, num = prefilled.place, min(len(keys), prefilled.num_tokens // self._tier.block_size)
        if (place.node, place.tier) == (self.node, self.blocks.name) or not num or not place.address:
            return
        asked = self._tier.asked(keys[:num], oldest, prefilled.version)
        if asked is None or place.tier != self.blocks.name:
            return
        fetch = partial(self._fetch, place.address, asked, time.monotonic() + left_s)
        error = await asyncio.get_running_loop().run_in_executor(
            self._threads, partial(tried, fetch, TrinityError, OSError, EOFError)
        )
        if error is not None:
            log.warning("%d tokens of a prompt are computed again: %s", prefilled.num_tokens, error)

    def close(self) -> None:
        """Harmless when repeated."""
        if self._listener is not None:
            self._listener.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.blocks.close()

    def _fetch(self, address: str, asked: Asked, end_s: float) -> None:
        missing, started_s = self.blocks.missing(asked), time.monotonic()
        if not missing:
            return
        until_s = min(end_s, started_s + FIRST_S + self.blocks.most_bytes(missing) / BYTES_PER_S)
        peer = self._connect(address, until_s)
        try:
            for some in self._batches(missing):
                part = asked._replace(wanted=some)
                answer = peer.ask(part.pack(), self.blocks.most_bytes(some), until_s)
                self.num_fetched += self.blocks.take(part, answer, time.monotonic_ns())
        finally:
            peer.close()

    def _batches(self, missing: Sequence[Wanted]) -> Iterator[tuple[Wanted, ...]]:
        start, size = 0, 0
        for at, each in enumerate(missing):
            size += self.blocks.block_bytes[each.kind]
            if size >= BYTES_TOGETHER or at + 1 - start == MOST_WANTED:
                yield tuple(missing[start : at + 1])
                start, size = at + 1, 0
        if start < len(missing):
            yield tuple(missing[start:])
