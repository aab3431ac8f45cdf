"""Blocks of the KV cache in the node's shared memory: found again by all engines of the node, and by one that starts again.

Legend: B blocks, L layers of a kind, P slots of the cache.
Decisions. What is worth keeping is written through, between passes, when it is full: a killed engine loses little. A pass and a
write share no time: writes take SHARE of what passes take, and all they like while there is no request. What is read goes into
the engine's own cache before a request begins, where it is a hit like any other; a little before each pass where others run.
Tokens are the prefix cache's keys; versions count only with the name of the line of weights that they belong to (a pool that
was made anew, a run that went back to an earlier step: another line). What is withdrawn is not read, whatever is still there,
and dropped when the writer's lock can be had. Blocks with experts of their tokens stay in the engine.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.config import LayerCache
from trinity.engine.block_pool import Content
from trinity.engine.kv_cache import Hit, KVCache
from trinity.engine.kv_exchange import Asked, Wanted
from trinity.engine.kv_segment import Known, KVSegment, Slots
from trinity.engine.kv_users import FolderUser

SHARE, LEAST_S, IDLE_S = 1 / 16, 0.001, 0.02  # of a pass's time; for a step with requests, and without
AGAIN_S = 0.05  # until the lock is tried again
BYTES_TOGETHER = 1 << 20  # of blocks that are copied in one go


class TierPlace(NamedTuple):
    """Place and size of a node's tier. `line` names the weights that a version belongs to: equal lines and versions are
    equal weights, for all processes of a server; None: nobody knows, so nothing of that version is kept or read."""

    folder: Path
    num_bytes: int
    line: Callable[[int], str | None]


class BlockCopies:
    """Bytes of blocks of one kind, out of and into all that is stored of its layers: each part [L, P, ...]."""

    def __init__(self, parts: Sequence[Tensor], block_size: int):
        self._parts = [part.unflatten(1, (-1, block_size)) for part in parts]
        self.block_bytes = sum(part[:, 0].nbytes for part in self._parts)
        self.num_together = max(1, BYTES_TOGETHER // self.block_bytes)

    def out(self, blocks: Sequence[int]) -> np.ndarray:
        """-> uint8 [B, block_bytes]."""
        index = torch.tensor(blocks, device=self._parts[0].device)
        rows = [part.index_select(1, index).transpose(0, 1).flatten(1) for part in self._parts]
        return torch.cat([each.view(torch.uint8) for each in rows], 1).cpu().numpy()

    def into(self, blocks: Sequence[int], rows_BN: np.ndarray) -> None:
        """The inverse."""
        index, at = torch.tensor(blocks, device=self._parts[0].device), 0
        for part in self._parts:
            shape = (len(blocks), part.shape[0], *part.shape[2:])
            size = part[:, 0].nbytes
            values = torch.from_numpy(rows_BN[:, at : at + size].copy()).view(part.dtype).view(shape)
            part.index_copy_(1, index, values.transpose(0, 1).to(part.device))
            at += size


class KVTier:
    """The engine's dealings with its node's tier, for the engine's thread. Hears of what is worth keeping from the pools of
    `cache`. Raises ConfigError where there can be none."""

    def __init__(
        self,
        place: TierPlace,
        cache: KVCache,
        parts: Callable[[LayerCache], Sequence[Tensor]],
        is_withdrawn: Callable[[int, int], bool],
    ):
        self._cache, self._line, self._is_withdrawn = cache, place.line, is_withdrawn
        self._copies = {kind: BlockCopies(parts(kind), cache.layout.block_size) for kind in cache.tables}
        sizes = [copies.block_bytes for copies in self._copies.values()]
        self._user = FolderUser(place.folder)
        self.shape, self.block_size = (place.folder, sizes, place.num_bytes), cache.layout.block_size
        self.segment = KVSegment(*self.shape)
        self._slots: Mapping[LayerCache, Slots] = dict(zip(cache.tables, self.segment.kinds, strict=True))
        self._queue: dict[tuple[LayerCache, int], tuple[Content, int]] = {}  # with its stamp
        self._drops: list[Callable[[], None]] = []
        self._again_s = 0.0
        self.num_written = 0
        self._pools = {kind: table.pool for kind, table in cache.tables.items()}
        for kind, pool in self._pools.items():
            pool.kept = partial(self._note, kind)

    @property
    def has_work(self) -> bool:
        """Is there something to write, and has nobody else been at it just now?"""
        return bool(self._queue or self._drops) and time.monotonic() >= self._again_s

    @property
    def num_evicted(self) -> int:
        return sum(slots.num_evicted for slots in self._slots.values())

    @property
    def used_bytes(self) -> int:
        return self.segment.used_bytes

    def close(self) -> None:
        """Harmless when repeated. What is there stays for others, and goes with the last."""
        self.segment.close()
        self._user.leave()

    # -- writing

    def _note(self, kind: LayerCache, block: int, content: Content, is_over: bool) -> None:
        if content.routes is None:
            stamp = (time.monotonic_ns() if is_over else content.begun_ns) - content.place
            self._queue[kind, block] = content, stamp

    def work(self, last_pass_s: float | None) -> None:
        """Write what waits, for a time that a pass like the last one allows; None: no request is here."""
        if not self.has_work:
            return
        budget_s = IDLE_S if last_pass_s is None else max(LEAST_S, SHARE * last_pass_s)
        until_s = time.perf_counter() + budget_s
        with self.segment.locked() as is_mine:
            if not is_mine:
                self._again_s = time.monotonic() + AGAIN_S
                return
            self._drop_all()
            while self._queue:
                self._write(self._next())
                if time.perf_counter() >= until_s:
                    return

    def _next(self) -> dict[tuple[LayerCache, int], tuple[Content, int]]:
        """Take the first that wait, of one kind."""
        (kind, _), *_ = self._queue
        some = [place for place in islice(self._queue, self._copies[kind].num_together) if place[0] == kind]
        return {place: self._queue.pop(place) for place in some}

    def _write(self, some: Mapping[tuple[LayerCache, int], tuple[Content, int]]) -> None:
        wanted = []
        for (kind, block), (content, stamp) in some.items():
            line = self._line_of(content.newest)
            if line is None or not self._pools[kind].has(block, content):
                continue
            known = Known(content.key, line, content.oldest, content.newest)
            if (slot := self._slot_of(kind, known)) is None:
                wanted.append((block, known, stamp))
            else:
                self._slots[kind].touch([slot], [stamp])
        if wanted:
            rows_BN = self._copies[kind].out([block for block, *_ in wanted])
            for (_, known, stamp), row_N in zip(wanted, rows_BN, strict=True):
                self.num_written += self._slots[kind].write(known, max(1, stamp), row_N)

    def _slot_of(self, kind: LayerCache, known: Known) -> int | None:
        found = self._slots[kind].find(known.key, known.line)
        return next((slot for *versions, slot in found if versions == [known.newest, known.oldest]), None)

    def drop(self, is_wrong: Callable[[int, int], bool], newest: int) -> None:
        """Let no block be found that versions (oldest, newest), of the line of `newest`, have computed that are wrong."""
        if (line := self._line_of(newest)) is not None:
            self._drops.append(partial(self._drop_versions, line, lru_cache(None)(is_wrong)))
            self.work(0.0)

    def _drop_versions(self, line: int, is_wrong: Callable[[int, int], bool]) -> None:
        for slots in self._slots.values():
            slots.drop([slot for newest, oldest, slot in slots.all_of(line) if is_wrong(oldest, newest)])

    def forget(self, keys: Sequence[bytes], newest: int) -> None:
        """Let these be found no more."""
        if (line := self._line_of(newest)) is not None:
            self._drops.append(partial(self._drop_keys, line, tuple(keys)))
            self.work(0.0)

    def _drop_keys(self, line: int, keys: Sequence[bytes]) -> None:
        for slots in self._slots.values():
            slots.drop([slot for key in keys for *_, slot in slots.find(key, line)])

    def _drop_all(self) -> None:
        drops, self._drops = self._drops, []
        for drop in drops:
            drop()

    # -- reading

    def num_blocks(self, keys: Sequence[bytes], oldest: int, newest: int) -> int:
        """Blocks of the longest beginning that is there or in the engine's own cache."""
        line = self._line_of(newest)
        if line is None or self._drops:
            return 0
        self.segment.refresh()
        return self._cache.longest(keys, partial(self._has, line, oldest, newest))[0]

    def recall(
        self, keys: Sequence[bytes], oldest: int, newest: int, hit: Hit, until_s: float = math.inf
    ) -> tuple[Hit, bool]:
        """Bring what is missing of the longest beginning into the engine's own cache, a piece at least, and no further one
        after `until_s` on time.perf_counter(); -> what is there then, and whether that is all. There must be room for a
        sequence with these blocks that begins with `hit`."""
        num, line = self.num_blocks(keys, oldest, newest), self._line_of(newest)
        if num <= hit.num_blocks or line is None:
            return hit, True
        with ExitStack() as held:  # room is made of what nobody holds
            for kind, pool in self._pools.items():
                for block in self._own(kind, keys[:num], oldest, newest):
                    pool.hold(block)
                    held.callback(pool.let_go, block)
            num_got = 0
            for kind, some in self._pieces(keys[:num], oldest, newest):
                if num_got and time.perf_counter() >= until_s:
                    return self._cache.match(keys, oldest, newest), False
                blocks = self._fetch(kind, some, line, oldest, newest)
                num_got += len(blocks)
                for block in blocks:
                    held.callback(self._pools[kind].let_go, block)
            return self._cache.match(keys, oldest, newest), True

    def _pieces(self, keys: Sequence[bytes], oldest: int, newest: int) -> list[tuple[LayerCache, list[bytes]]]:
        """Keys of what is missing here, as many as are brought together."""
        found = []
        for kind, copies in self._copies.items():
            some = keys[self._cache.first_seen(kind, len(keys)) :]
            lacks = [key for key in some if not self._cache.has(kind, key, oldest, newest)]
            found += [(kind, lacks[at : at + copies.num_together]) for at in range(0, len(lacks), copies.num_together)]
        return found

    def touch(self, keys: Sequence[bytes], hit: Hit) -> None:
        """Note that a request uses these: they are worth keeping here, too."""
        line, now_ns = self._line_of(hit.newest), time.monotonic_ns()
        if line is None or not hit.num_blocks:
            return
        for kind, slots in self._slots.items():
            first = self._cache.first_seen(kind, hit.num_blocks)
            found = [
                (slot, now_ns - place)
                for place in range(first, hit.num_blocks)
                for *_, slot in slots.find(keys[place], line)
            ]
            if found:
                slots.touch(*zip(*found, strict=True))

    # -- prompts that are handed over

    def asked(self, keys: Sequence[bytes], oldest: int, newest: int) -> Asked | None:
        """Blocks that go on from all of these takes: windows first, for nothing is of use without. Safe from any thread."""
        if (line := self._line_of(newest)) is None:
            return None
        kinds = sorted(enumerate(self._cache.tables), key=lambda each: each[1].window is None)
        wanted = (Wanted(at, key) for at, kind in kinds for key in keys[self._cache.first_seen(kind, len(keys)) :])
        return Asked(self.segment.name, line, oldest, newest, tuple(wanted))

    def save(self, keys: Sequence[bytes], oldest: int, newest: int) -> int | None:
        """Write what the engine has of these; -> the blocks of the longest beginning that is here then, None while another one
        writes."""
        line = self._line_of(newest)
        if line is None:
            return 0
        with self.segment.locked() as is_mine:
            if not is_mine:
                return None
            self._drop_all()
            for kind, pool in self._pools.items():
                own = self._own(kind, keys, oldest, newest)
                for at in range(0, len(own), num := self._copies[kind].num_together):
                    contents = ((block, pool.content(block)) for block in own[at : at + num])
                    self._write({(kind, block): (each, time.monotonic_ns() - each.place) for block, each in contents})
        return self._cache.longest(keys, lambda kind, key: self._found(kind, key, line, oldest, newest) is not None)[0]

    def _own(self, kind: LayerCache, keys: Sequence[bytes], oldest: int, newest: int) -> list[int]:
        pool = self._pools[kind]
        found = (pool.find(key, oldest, newest) for key in keys[self._cache.first_seen(kind, len(keys)) :])
        return [block for block in found if block is not None]

    def _has(self, line: int, oldest: int, newest: int, kind: LayerCache, key: bytes) -> bool:
        return self._cache.has(kind, key, oldest, newest) or self._found(kind, key, line, oldest, newest) is not None

    def _found(self, kind: LayerCache, key: bytes, line: int, oldest: int, newest: int) -> int | None:
        """The slot of the youngest block that these versions, and none that is withdrawn, have computed."""
        fits = [
            (last, first, slot)
            for last, first, slot in self._slots[kind].find(key, line)
            if oldest <= first and last <= newest and not self._is_withdrawn(first, last)
        ]
        return max(fits)[2] if fits else None

    def _fetch(self, kind: LayerCache, keys: Sequence[bytes], line: int, oldest: int, newest: int) -> list[int]:
        """Bring these in; -> blocks that are held now. Those that are gone meanwhile, or damaged, stay out."""
        copies, pool, slots = self._copies[kind], self._pools[kind], self._slots[kind]
        rows_BN, got = np.empty((len(keys), copies.block_bytes), np.uint8), list[Known]()
        for key in keys:
            slot = self._found(kind, key, line, oldest, newest)
            known = None if slot is None or len(got) == pool.num_available else slots.read(slot, rows_BN[len(got)])
            if known is not None and known[:2] == (key, line) and oldest <= known.oldest and known.newest <= newest:
                got.append(known)
        blocks = [pool.take() for _ in got]
        copies.into(blocks, rows_BN[: len(got)])
        for block, known in zip(blocks, got, strict=True):
            pool.know(block, Content(known.key, known.oldest, known.newest), keep=False)
        return blocks

    def _line_of(self, version: int) -> int | None:
        line = self._line(version)
        return None if line is None else _digest(line)


@lru_cache(maxsize=64)
def _digest(line: str) -> int:
    return int.from_bytes(sha256(line.encode()).digest()[:8], "little")
