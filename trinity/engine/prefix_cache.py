"""Prefix cache: what requests need not compute, because it was computed before or is being computed for another one.

Decisions. All full blocks are found again, by the key of their tokens and of all before them (prefix_keys.py); a request
reads the longest beginning that is there, but never all of its own, because its last token's logits are wanted. Windows are
kept where somebody may go on: at the end of a prompt and of an answer, where a hit ended or would have ended but for the
window, where a request that waits for another one parts from it, now and then in long prompts, and of what is new in a prompt
at distances from its end that double (instructions come before tasks); others only while there is room. They are stored by the
passes that there are anyway (block_table.py). Whoever would compute what a running request is about to compute waits for it, so
that a prompt is prefilled once. Versions say what may be read (versions.py). Requests that want the log-probabilities of their
prompt have to compute it; traced ones share among themselves: experts are noted for them alone.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ids
from itertools import takewhile

import numpy as np

from trinity.config import AdapterRef, Client
from trinity.engine.block_pool import Content
from trinity.engine.block_table import Tips
from trinity.engine.key_log import KeyChanges, KeyLog
from trinity.engine.kv_cache import NO_HIT, Hit, KVCache
from trinity.engine.kv_tier import KVTier
from trinity.engine.prefix_keys import KeyBase, extend
from trinity.engine.request import Chunk, SamplingParams, Sequence
from trinity.engine.versions import Versions

CHECKPOINT_WINDOWS = 4  # a window is kept at every so many windows of a prompt


class PrefixCache:
    """The scheduler's dealings with what is cached. `model` names the model whose keys and values these are, and their type.

    `num_queries` and `num_hits` count tokens of requests that were looked up, and that were there, when they first began;
    `num_recalled` those that came from the node's `tier`, if there is one.
    """

    def __init__(self, cache: KVCache, versions: Versions, is_on: bool, model: str):
        self._cache, self._versions, self._is_on = cache, versions, is_on
        self._size = cache.layout.block_size
        self._base, self._log = KeyBase(model, self._size), KeyLog()
        cache.tables[cache.layout.kinds[0]].pool.watch = self._log.note
        self._sees_all = cache.layout.kinds[0].window is None
        windows = [table.reach for table in cache.tables.values() if table.reach is not None]
        self._every = CHECKPOINT_WINDOWS * (max(windows, default=0) + 1)  # blocks
        self.num_queries = self.num_hits = self.num_recalled = 0
        self.tier: KVTier | None = None

    def match(self, sequence: Sequence) -> Hit:
        """Find what is there of a sequence that is to begin."""
        if not self._reads(sequence):
            return NO_HIT
        return self._cache.match(*self._wanted(sequence))

    def num_at_hand(self, sequence: Sequence) -> int:
        """Tokens that it need not compute, by what is there and in the tier."""
        num = self.match(sequence).num_blocks
        if self.tier is not None and self._recalls(sequence):
            num = max(num, self.tier.num_blocks(*self._wanted(sequence)))
        return num * self._size

    def recall(self, sequence: Sequence, hit: Hit, until_s: float) -> tuple[Hit, bool]:
        """Bring what the tier has beyond a hit of a sequence for which there is room, or a part of it, as long as there is time
        on time.perf_counter(); -> what is there then, and whether that is all."""
        if self.tier is None or not self._recalls(sequence):
            return hit, True
        more, is_all = self.tier.recall(*self._wanted(sequence), hit, until_s)
        self.tier.touch(sequence.keys, more)
        self.num_recalled += (more.num_blocks - hit.num_blocks) * self._size
        return more, is_all

    def leader(self, sequence: Sequence, hit: Hit, running: Iterable[Sequence]) -> tuple[Sequence, int] | None:
        """A running one, as urgent, that will have computed more of this sequence's beginning, and how far they are alike:
        there it keeps a window."""
        place = hit.num_known
        if not self._reads(sequence) or place >= self._most(sequence):
            return None
        keys, version = sequence.keys[: self._most(sequence)], self._versions.of(sequence)
        for other in running:
            if other.priority > sequence.priority or place >= len(other.keys):
                continue
            is_ahead = other.num_computed < (place + 1) * self._size and other.keys[place] == keys[place]
            if is_ahead and self._versions.of(other) == version:
                parting = _num_alike(keys, other.keys)
                other.tips = other.tips._replace(sure=tuple(sorted({*other.tips.sure, parting})))
                return other, self._size * parting
        return None

    def begin(self, sequence: Sequence, hit: Hit) -> None:
        """Give it a row, and what is there of it."""
        sequence.row, sequence.num_computed = self._cache.open_row(hit), hit.num_blocks * self._size
        self._versions.begin(sequence)
        if hit.num_blocks:
            sequence.oldest, sequence.version = hit.oldest, hit.newest
        if sequence.params.trace:
            sequence.experts[: sequence.num_computed] = self._cache.routes(hit)
        if self._is_on:
            self._keys(sequence)
            sequence.tips = self._tips(sequence, hit)
        self._count(sequence)

    def keep(self, chunk: Chunk) -> None:
        """Have the pass that computes the chunk, whose blocks are its own by now, store the windows in it that are to be kept,
        where nobody else wants the room."""
        if not chunk.is_single:
            self._cache.keep(chunk.row, (chunk.start, chunk.end), chunk.sequence.tips)

    def computed(self, chunk: Chunk) -> None:
        """A pass has computed the chunk: note which blocks are full now, and let go those behind windows."""
        if chunk.start // self._size == chunk.end // self._size:
            return
        sequence = chunk.sequence
        if self._is_on and not self._versions.is_withdrawn(sequence.oldest, sequence.version):
            first, keys = chunk.start // self._size, self._keys(sequence)
            contents = [self._content(sequence, keys[place], place) for place in range(first, chunk.end // self._size)]
            self._cache.know(chunk.row, (chunk.start, chunk.end), contents, sequence.tips)
        self._cache.trim(chunk.row, chunk.end, sequence.tips)

    @property
    def base(self) -> KeyBase | None:
        """Facts by which others name its blocks; None where it is off."""
        return self._base if self._is_on else None

    def changes(self, since: int) -> KeyChanges:
        """Keys that came and went after an earlier account, of the kind of layers that looks back furthest. Safe from any
        thread."""
        return self._log.since(since)

    def forget(self, sequence: Sequence) -> None:
        """Let what is cached of it be found no more: it is damaged."""
        self._cache.forget(sequence.keys)
        if self.tier is not None:
            self.tier.forget(sequence.keys, sequence.version)

    def drop(self, is_wrong: Callable[[int, int], bool]) -> None:
        """Forget what versions (oldest, newest) computed that are wrong."""
        self._cache.drop(is_wrong)
        if self.tier is not None:
            self.tier.drop(is_wrong, self._versions.live)

    @property
    def has_unsaved(self) -> bool:
        """Is there something for `save` to do?"""
        return self.tier is not None and self.tier.has_work

    def save(self, last_pass_s: float | None) -> None:
        """Write to the tier what waits for it, for a time that a pass like the last one allows; None: there are none."""
        if self.tier is not None:
            self.tier.work(last_pass_s)

    def close(self) -> None:
        """Leave the tier. Harmless when repeated."""
        if self.tier is not None:
            self.tier.close()
            self.tier = None

    def counts(self) -> dict[str, int]:
        """Fields of EngineStats."""
        found = {"num_prefix_queries": self.num_queries, "num_prefix_hits": self.num_hits}
        if self.tier is None:
            return found
        return found | {
            "num_tier_hits": self.num_recalled,
            "num_tier_written": self.tier.num_written,
            "num_tier_evicted": self.tier.num_evicted,
            "tier_bytes": self.tier.used_bytes,
        }

    def _content(self, sequence: Sequence, key: bytes, place: int) -> Content:
        tokens = slice(place * self._size, (place + 1) * self._size)
        experts = sequence.experts[tokens]  # none where nobody asked, or the model has none
        routes = np.stack(experts) if experts else None
        return Content(key, sequence.oldest, sequence.version, routes, place, int(1e9 * sequence.added_s))

    def _reads(self, sequence: Sequence) -> bool:
        return self._is_on and not sequence.is_scored and (self._sees_all or not sequence.params.trace)

    def _recalls(self, sequence: Sequence) -> bool:
        return self._reads(sequence) and not sequence.params.trace

    def _wanted(self, sequence: Sequence) -> tuple[list[bytes], int, int]:
        """Keys of the blocks that it may read, and whose: the oldest and the newest version."""
        return self._keys(sequence)[: self._most(sequence)], *self._versions.bounds(sequence)

    def _most(self, sequence: Sequence) -> int:
        """Blocks that it may read."""
        return (len(sequence.token_ids) - 1) // self._size

    def _keys(self, sequence: Sequence) -> list[bytes]:
        """Keys of all its full blocks."""
        if not sequence.root:
            adapter = None if sequence.adapter is None else sequence.adapter.ref
            sequence.root = self._root(sequence.params, sequence.client, adapter)
        extend(sequence.keys, sequence.root, sequence.token_ids, self._size, len(sequence.token_ids) // self._size)
        return sequence.keys

    def _root(self, params: SamplingParams, client: Client, adapter: AdapterRef | None) -> bytes:
        content = None if adapter is None else adapter.content
        return self._base.root(params.trace, client.name, params.cache_salt, content)

    def keys_of(
        self, token_ids: Ids[int], params: SamplingParams, client: Client, adapter: AdapterRef | None
    ) -> list[bytes]:
        """Keys of all full blocks of a request's tokens. Safe from any thread."""
        keys = list[bytes]()
        extend(keys, self._root(params, client, adapter), token_ids, self._size, len(token_ids) // self._size)
        return keys

    def _tips(self, sequence: Sequence, hit: Hit) -> Tips:
        end = sequence.num_prompt // self._size
        sure = {hit.num_blocks, hit.num_known, (sequence.num_prompt - 1) // self._size, end}
        forks = takewhile(lambda place: place > hit.num_known, (end - (1 << power) for power in range(end)))
        return Tips(tuple(sorted(sure)), tuple(sorted({*range(self._every, end, self._every), *forks})))

    def _count(self, sequence: Sequence) -> None:
        if sequence.num_cached is None and self._is_on:
            self.num_queries += len(sequence.token_ids)
            self.num_hits += sequence.num_computed
        found = min(sequence.num_computed, sequence.num_prompt)
        if sequence.num_cached is None or not sequence.num_generated:
            sequence.num_cached = found if sequence.num_cached is None else min(found, sequence.num_cached)


def _num_alike(keys: list[bytes], others: list[bytes]) -> int:
    return next((i for i, (a, b) in enumerate(zip(keys, others, strict=False)) if a != b), min(len(keys), len(others)))
