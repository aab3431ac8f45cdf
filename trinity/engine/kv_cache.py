"""The paged KV cache's bookkeeping: blocks of all kinds of layers, held by rows or found again. Host code, no torch.

One table per kind: each LayerCache that layers have.
Decisions: a hit needs all blocks of layers that see everything, and of windowed ones those that the next token looks back at.
One sequence of `max_model_len` always fits (block_table.py), so preemption alone resolves every shortage; what nobody holds
makes room first (block_pool.py). What is stored of a token is the LayerCache's to say: a latent layer is one more kind, of
other numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from trinity.config import LayerCache
from trinity.engine.block_pool import Content
from trinity.engine.block_table import NO_TIPS, BlockTable, Tips
from trinity.engine.kv_layout import CacheLayout, ceil_div


class Hit(NamedTuple):
    """Blocks that are there of a sequence's beginning. `num_known`: those that no layer lacks but windowed ones.

    `blocks`: of each kind, up to the place `num_blocks`. `oldest` and `newest` are versions of the weights behind them.
    """

    num_blocks: int
    num_known: int
    blocks: Mapping[LayerCache, list[int]]
    oldest: int
    newest: int


NO_HIT = Hit(0, 0, {}, 0, 0)


class KVCache:
    """Blocks of all kinds for up to num_rows running sequences. A row gets all the blocks it asks for, or none."""

    def __init__(self, layout: CacheLayout, num_rows: int):
        self.layout = layout
        self.tables = {kind: BlockTable(layout, kind, num_rows) for kind in layout.kinds}
        self._free_rows = list(range(num_rows - 1, -1, -1))

    @property
    def num_total_blocks(self) -> int:
        return sum(table.pool.num_blocks for table in self.tables.values())

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no row holds, whatever is in them."""
        return sum(table.pool.num_available for table in self.tables.values())

    @property
    def num_spare(self) -> int:
        """Blocks that nobody holds, of the kind that has fewest of them."""
        return min(table.pool.num_available for table in self.tables.values())

    @property
    def num_idle_blocks(self) -> int:
        """Those of them that would be found."""
        return sum(table.pool.num_idle for table in self.tables.values())

    def match(self, keys: Sequence[bytes], oldest: int, newest: int) -> Hit:
        """The longest beginning that is there of a sequence with these keys, by these versions of the weights alone."""
        num, num_known = self.longest(keys, lambda kind, key: self.has(kind, key, oldest, newest))
        blocks = {
            kind: table.prefix(keys[self.first_seen(kind, num) : num], oldest, newest)
            for kind, table in self.tables.items()
        }
        return Hit(num, num_known, blocks, *self._versions(blocks, oldest, newest))

    def has(self, kind: LayerCache, key: bytes, oldest: int, newest: int) -> bool:
        return self.tables[kind].pool.find(key, oldest, newest) is not None

    def first_seen(self, kind: LayerCache, num: int) -> int:
        """The first block that what comes after `num` blocks looks back at."""
        reach = self.tables[kind].reach
        return 0 if reach is None else max(0, num - reach)

    def longest(self, keys: Sequence[bytes], has: Callable[[LayerCache, bytes], bool]) -> tuple[int, int]:
        """Blocks of the longest beginning of which all that is needed is there, and of the longest that no layer lacks but
        windowed ones."""
        growing = [kind for kind in self.tables if kind.window is None]
        num_known = len(keys)
        for kind in growing:
            num_known = sum(1 for _ in takewhile(partial(has, kind), keys[:num_known]))
        num = self._with_windows(keys[:num_known], has)
        return num, num_known if growing else num

    def _with_windows(self, keys: Sequence[bytes], has: Callable[[LayerCache, bytes], bool]) -> int:
        windowed = {kind: table for kind, table in self.tables.items() if table.window is not None}
        num, before = len(keys), -1
        while num != before:
            before = num
            for kind, table in windowed.items():
                num = table.longest(keys[:num], partial(has, kind))
        return num

    def _versions(self, blocks: Mapping[LayerCache, list[int]], oldest: int, newest: int) -> tuple[int, int]:
        if oldest == newest:
            return oldest, newest
        found = [self.tables[kind].pool.content(block) for kind, some in blocks.items() for block in some]
        return min((c.oldest for c in found), default=newest), max((c.newest for c in found), default=newest)

    def routes(self, hit: Hit) -> list[np.ndarray]:
        """Experts of the hit's tokens, if they were traced. They are kept with the blocks of the first kind."""
        kind, table = next(iter(self.tables.items()))
        found = [table.pool.content(block).routes for block in hit.blocks.get(kind, ())]
        return [experts_LK for routes_TLK in found if routes_TLK is not None for experts_LK in routes_TLK]

    def fits(self, num_tokens: int, hit: Hit, reserve: int = 0) -> bool:
        """Could a new sequence of num_tokens, which begins with the hit, be held now, and `reserve` blocks be left of each kind
        that goes on growing?"""
        for kind, table in self.tables.items():
            shared = sum(table.pool.num_holders(block) > 0 for block in hit.blocks.get(kind, ()))
            wanted = min(ceil_div(num_tokens, table.block_size), table.blocks_per_seq) - shared
            if wanted + (reserve if kind.window is None else 0) > table.pool.num_available:
                return False
        return True

    def open_row(self, hit: Hit = NO_HIT) -> int:
        row = self._free_rows.pop()
        for kind, table in self.tables.items():
            table.share(row, hit.num_blocks, hit.blocks.get(kind, []))
        return row

    def grow(self, row: int, num_tokens: int) -> bool:
        """Give the row what it lacks to hold num_tokens; False, and nothing changed, if there is too little."""
        if not all(table.can_grow(row, num_tokens) for table in self.tables.values()):
            return False
        for table in self.tables.values():
            table.grow(row, num_tokens)
        return True

    def keep(self, row: int, chunk: tuple[int, int], tips: Tips) -> None:
        """Have a pass that computes the row's positions [start, end), for which it has grown, store the windows before `tips`
        that end there, as long as there is room."""
        for table in self.tables.values():
            table.keep(row, chunk, tips)

    def know(self, row: int, chunk: tuple[int, int], contents: Sequence[Content], tips: Tips = NO_TIPS) -> None:
        """A pass has computed the row's positions [start, end): these are in the blocks that it has filled."""
        for table in self.tables.values():
            table.know(row, chunk, contents, tips)

    def trim(self, row: int, num_tokens: int, tips: Tips = NO_TIPS) -> None:
        """Let go what no token after num_tokens looks back at."""
        for table in self.tables.values():
            table.trim(row, num_tokens, tips)

    def close_row(self, row: int) -> None:
        """Take everything back from the row. What is known of its blocks stays."""
        for table in self.tables.values():
            table.close(row)
        self._free_rows.append(row)

    def drop(self, is_wrong: Callable[[int, int], bool]) -> None:
        """Forget what versions (oldest, newest) computed that are wrong."""
        for table in self.tables.values():
            table.pool.drop(is_wrong)

    def forget(self, keys: Sequence[bytes]) -> None:
        """Forget these blocks."""
        for table in self.tables.values():
            for key in keys:
                table.pool.forget_key(key)

    def check(self, rows: list[int]) -> None:
        """Assert that every block is free, idle or held, and that exactly `rows` hold anything."""
        num_rows = len(next(iter(self.tables.values())).end_N)
        assert sorted(self._free_rows + rows) == list(range(num_rows)), "a row is lost or used twice"
        for table in self.tables.values():
            table.check()
            assert all(not len(table.held(row)) for row in self._free_rows), "a closed row holds blocks"
