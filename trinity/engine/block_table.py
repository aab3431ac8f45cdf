"""The blocks of one kind of layer that each row has, and where each token's keys and values lie. Host code, no torch.

Legend: N rows (running sequences), P positions, C places of blocks in a sequence, T tokens of a pass, W those it writes.
Decisions: position p lies in the row's block of place p // block_size. Between passes a windowed layer holds no more than its
window; in a pass that computes a chunk also what the chunk looks back at, and of the chunk only the end, in whole blocks
(attention.py has the rest at hand), and windows within it that are kept for others, while nobody else wants the room: no pass
is cut short for them. Blocks behind the window are let go after the pass. Where no block is left, a row writes over its own
ones that will be behind the window: attention reads what is past before it writes.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import chain, takewhile
from typing import NamedTuple

import numpy as np

from trinity.config import LayerCache
from trinity.engine.block_pool import BlockPool, Content
from trinity.engine.kv_layout import CacheLayout, ceil_div


class Tips(NamedTuple):
    """Places in a sequence, each in order, before which windows are kept for others: where some will go on, and where some may,
    which make room first."""

    sure: tuple[int, ...] = ()
    guessed: tuple[int, ...] = ()


NO_TIPS = Tips()


class BlockTable:
    """The blocks of one kind: which each row has, at the places [first, end) of its sequence; -1 where it has none."""

    def __init__(self, layout: CacheLayout, kind: LayerCache, num_rows: int):
        self.block_size, self.blocks_per_seq = layout.block_size, layout.blocks_per_seq[kind]
        self.window, self.pool = kind.window, BlockPool(layout.num_blocks[kind])
        self.first_N, self.end_N = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
        self.block_NC = np.full((num_rows, ceil_div(layout.max_model_len, layout.block_size)), -1, np.int32)

    @property
    def reach(self) -> int | None:
        """Blocks before a block's first token that it looks back at; None: all."""
        return None if self.window is None else ceil_div(self.window - 1, self.block_size)

    def slots(self, row: int | np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 slots of positions in the flat pool [num_blocks * block_size]; `row` broadcasts against positions."""
        blocks = self.block_NC[row, positions // self.block_size]
        return blocks.astype(np.int64) * self.block_size + positions % self.block_size

    def written(self, row_T: np.ndarray, position_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens of a pass are written, those in blocks that their rows have, and their slots."""
        place_T = position_T // self.block_size
        block_T = self.block_NC[row_T, place_T]
        at_W = np.nonzero((block_T >= 0) & (place_T >= self.first_N[row_T]))[0]
        return at_W, block_T[at_W].astype(np.int64) * self.block_size + position_T[at_W] % self.block_size

    def first_stored(self, num_tokens: int) -> int:
        """The first place that a chunk is written to that ends with so many tokens, but for what `keep` gives it."""
        return max(0, ceil_div(num_tokens, self.block_size) - self.blocks_per_seq)

    def held(self, row: int) -> np.ndarray:
        blocks_C = self.block_NC[row, self.first_N[row] : self.end_N[row]]
        return blocks_C[blocks_C >= 0]

    def share(self, row: int, end: int, blocks: list[int]) -> None:
        """Give an empty row these, which are its sequence's up to the place `end`."""
        first = end - len(blocks)
        self.first_N[row], self.end_N[row] = first, end
        self.block_NC[row, first:end] = blocks
        for block in blocks:
            self.pool.hold(block)

    def missing(self, row: int, num_tokens: int) -> range:
        """Places that the row needs a block for, to hold what is stored of a sequence of num_tokens."""
        return range(max(int(self.end_N[row]), self.first_stored(num_tokens)), ceil_div(num_tokens, self.block_size))

    def can_grow(self, row: int, num_tokens: int) -> bool:
        lacks = len(self.missing(row, num_tokens)) - self.pool.num_available
        return lacks <= 0 or lacks <= self._num_spare(row, num_tokens)

    def grow(self, row: int, num_tokens: int) -> None:
        places, end = self.missing(row, num_tokens), int(self.end_N[row])
        if not places:
            return
        self.block_NC[row, end : places.start] = -1
        for place in places:
            self.block_NC[row, place] = self.pool.take() if self.pool.num_available else self._spare(row)
        if self.first_N[row] == end:
            self.first_N[row] = places.start
        self.end_N[row] = places.stop

    def keep(self, row: int, chunk: tuple[int, int], tips: Tips) -> None:
        """Give the row, which has room for the chunk [start, end), what it lacks to store the windows before `tips` that end in
        it, as long as there is room."""
        first, end, taken = chunk[0] // self.block_size, self.first_stored(chunk[1]), dict[int, int]()
        lacks = {first + int(place) for place in np.nonzero(self.block_NC[row, first:end] < 0)[0]}
        reach = self.reach or 0  # whoever sees everything has all
        for tip in chain(*tips):
            wanted = lacks.intersection(range(tip - reach, tip)) - taken.keys()
            if len(wanted) <= self.pool.num_available:
                taken |= {place: self.pool.take() for place in sorted(wanted)}
        if taken:
            self.block_NC[row, list(taken)] = list(taken.values())
            self.first_N[row] = min(self.first_N[row], *taken)

    def _num_spare(self, row: int, num_tokens: int) -> int:
        """Blocks from its first one on that nobody else holds and that will be behind the window of so many tokens."""
        places = range(int(self.first_N[row]), min(int(self.end_N[row]), self.first_stored(num_tokens)))
        blocks = self.block_NC[row, places.start : places.stop]
        return len(list(takewhile(lambda block: self.pool.num_holders(block) == 1, map(int, blocks))))

    def _spare(self, row: int) -> int:
        """Its first block, to be written over in the pass to come, which still finds it at its place."""
        block = int(self.block_NC[row, self.first_N[row]])
        self.first_N[row] += 1
        self.pool.forget(block)
        return block

    def know(self, row: int, chunk: tuple[int, int], contents: Sequence[Content], tips: Tips) -> None:
        """A pass has computed positions [start, end): these are in the blocks that it has filled, if it has stored them."""
        first, end = chunk[0] // self.block_size, chunk[1] // self.block_size
        for place in range(max(first, int(self.first_N[row])), end):
            if (block := int(self.block_NC[row, place])) >= 0:
                self.pool.know(block, contents[place - first], self._worth(place, tips) > 0)

    def trim(self, row: int, num_tokens: int, tips: Tips) -> None:
        """Let go what no token after num_tokens looks back at. Of what is kept the end goes first where room is needed, as in
        `close`."""
        if self.window is None:
            return
        first = int(self.first_N[row])
        end = min(int(self.end_N[row]), max(0, num_tokens - self.window + 1) // self.block_size)
        worth = {p: self._worth(p, tips) for p in range(first, end) if self.block_NC[row, p] >= 0}
        for place in sorted(worth, key=lambda p: (worth[p], -p if worth[p] else p)):
            self.pool.let_go(int(self.block_NC[row, place]), keep=worth[place] > 0)
        self.first_N[row] = max(first, end)

    def _worth(self, place: int, tips: Tips) -> int:
        """2 for what is surely worth keeping, 1 where that is a guess, or 0."""
        return 2 if self._is_before(place, tips.sure) else int(self._is_before(place, tips.guessed))

    def _is_before(self, place: int, tips: tuple[int, ...]) -> bool:
        if self.reach is None:
            return True
        at = bisect_right(tips, place)
        return at < len(tips) and tips[at] - self.reach <= place

    def close(self, row: int) -> None:
        """Let all go, so that the end goes first where room is needed: what is left is of use."""
        for block in self.held(row)[::-1]:
            self.pool.let_go(int(block))
        self.first_N[row] = self.end_N[row] = 0

    def prefix(self, keys: Sequence[bytes], oldest: int, newest: int) -> list[int]:
        """Blocks with these keys, from the first on as far as they are there."""
        found: list[int] = []
        for key in keys:
            if (block := self.pool.find(key, oldest, newest)) is None:
                break
            found.append(block)
        return found

    def longest(self, keys: Sequence[bytes], is_there: Callable[[bytes], bool]) -> int:
        """The longest beginning, in blocks, whose window is there."""
        assert self.reach is not None
        end = len(keys)
        for place in range(len(keys) - 1, -1, -1):
            if end - place > self.reach:
                break
            if not is_there(keys[place]):
                end = place
        return end

    def check(self) -> None:
        self.pool.check(int(block) for row in range(len(self.end_N)) for block in self.held(row))
