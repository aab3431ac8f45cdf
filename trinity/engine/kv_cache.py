"""The paged KV cache's bookkeeping: sizes, blocks, and where each token's keys and values lie. Host code, no torch.

Legend: N rows (running sequences), P positions, C table columns. One table per kind: each LayerCache that layers have.
Decisions: a windowed layer never holds more than its window. A sequence's blocks of a kind form a ring of
`blocks_per_seq`: position p lies in column (p // block_size) % blocks_per_seq, so a block is taken over by new tokens
as soon as all its positions are behind the window. For layers that see everything the ring is as long as the longest sequence
and never turns round; one class serves both. A prefill chunk longer than the ring stores only its end (attention.py has
the rest at hand). One sequence of `max_model_len` always fits, so preemption alone resolves every shortage. What is stored of
a token is the LayerCache's to say: a latent layer is one more kind, of other numbers.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trinity.config import EngineConfig, LayerCache, ModelConfig
from trinity.errors import ConfigError


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def window_blocks(window: int, block_size: int) -> int:
    """Most blocks that `window` consecutive positions can touch."""
    return ceil_div(window - 1, block_size) + 1


@dataclass(frozen=True)
class CacheLayout:
    """Numbers of blocks of each kind, in all and for one sequence at most, and a block's bytes over all its layers.

    `places[layer]`: the layer's kind, and its number among the layers of that kind. Kinds that see everything come first.
    """

    block_size: int
    max_model_len: int
    kinds: tuple[LayerCache, ...]
    places: tuple[tuple[LayerCache, int], ...]
    num_blocks: Mapping[LayerCache, int]
    blocks_per_seq: Mapping[LayerCache, int]
    block_bytes: Mapping[LayerCache, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.num_blocks[kind] * self.block_bytes[kind] for kind in self.kinds)

    def num_layers(self, kind: LayerCache) -> int:
        return sum(each == kind for each, _ in self.places)


@dataclass(frozen=True)
class BlockSizes:
    """Bytes of a block of each kind, over all the layers of the kind. A window leaves room for `lookahead` tokens that may turn
    out to be no part of the sequence: they must not lie where its last token looks back at."""

    block_size: int
    block_bytes: Mapping[LayerCache, int]
    lookahead: int = 0

    @classmethod
    def of(cls, config: ModelConfig, block_size: int, itemsize: int, lookahead: int = 0) -> "BlockSizes":
        """`itemsize` is the bytes of one cached number. Kinds that see everything come first."""
        caches = config.layer_caches
        kinds = sorted(dict.fromkeys(caches), key=lambda kind: kind.window is not None)
        sizes = {kind: block_size * kind.numbers_per_token * itemsize * caches.count(kind) for kind in kinds}
        return cls(block_size, sizes, lookahead)

    def blocks_per_seq(self, num_tokens: int) -> dict[LayerCache, int]:
        """Blocks of each kind that a sequence of so many tokens takes."""
        every, size = ceil_div(num_tokens, self.block_size), self.block_size
        windows = {
            kind: every if kind.window is None else window_blocks(kind.window + self.lookahead, size)
            for kind in self.block_bytes
        }
        return {kind: min(every, blocks) for kind, blocks in windows.items()}

    def bytes_per_seq(self, num_tokens: int) -> int:
        return sum(num * self.block_bytes[kind] for kind, num in self.blocks_per_seq(num_tokens).items())

    def longest(self, num_bytes: int, most: int) -> int:
        """Tokens of the longest sequence that fits into so many bytes, and not more than `most`; 0: none does."""
        counts, size = range(1, ceil_div(most, self.block_size) + 1), self.block_size
        return min(most, size * bisect_right(counts, num_bytes, key=lambda count: self.bytes_per_seq(count * size)))


def plan_layout(config: ModelConfig, settings: EngineConfig, itemsize: int) -> CacheLayout:
    """Split `kv_cache_bytes`, which must be a number here (memory.py), between the kinds.

    Windowed kinds get the windows of `max_num_seqs` sequences, or as many blocks as the others where memory is scarce;
    kinds that see everything get the rest, up to what all sequences could use. Raises ConfigError when not even one fits.
    """
    assert settings.kv_cache_bytes is not None, "kv_cache_bytes is chosen in memory.py"
    size, caches = settings.block_size, config.layer_caches
    sizes, max_len = BlockSizes.of(config, size, itemsize, settings.max_draft_tokens), checked_max_len(config, settings)
    check_fits(sizes, settings.kv_cache_bytes, max_len)
    kinds, per_seq = tuple(sizes.block_bytes), sizes.blocks_per_seq(max_len)
    num_blocks = _split(settings.kv_cache_bytes, settings.max_num_seqs, sizes.block_bytes, per_seq)
    places = tuple((kind, caches[:layer].count(kind)) for layer, kind in enumerate(caches))
    return CacheLayout(size, max_len, kinds, places, num_blocks, per_seq, sizes.block_bytes)


def checked_max_len(config: ModelConfig, settings: EngineConfig) -> int:
    """The longest sequence in tokens; at most what the model was made for."""
    wanted = settings.max_model_len or config.max_position_embeddings
    if wanted > config.max_position_embeddings:
        raise ConfigError(
            f"engine.max_model_len {wanted} > {config.max_position_embeddings}, the model's max_position_embeddings"
        )
    return wanted


def check_fits(sizes: BlockSizes, have: int, max_len: int) -> None:
    """Raise ConfigError where `have`, of engine.kv_cache_bytes, does not hold one sequence of max_len tokens."""
    need = sizes.bytes_per_seq(max_len)
    if need <= have:
        return
    fits = sizes.longest(have, max_len)
    remedy = f" or engine.max_model_len to at most {fits}" if fits > 1 else ""
    raise ConfigError(
        f"one sequence of {max_len} tokens needs {need} bytes of KV cache, engine.kv_cache_bytes is {have}; "
        f"raise engine.kv_cache_bytes to at least {need}{remedy}"
    )


def _split(
    have: int, seqs: int, block_bytes: Mapping[LayerCache, int], per_seq: Mapping[LayerCache, int]
) -> dict[LayerCache, int]:
    """Blocks of each kind. Windowed kinds choose first, and leave the others what one sequence needs of them."""
    even = have // max(1, sum(block_bytes.values()))
    num: dict[LayerCache, int] = {}
    windowed = [kind for kind in block_bytes if kind.window is not None]
    growing = [kind for kind in block_bytes if kind.window is None]
    left = have - sum(per_seq[kind] * block_bytes[kind] for kind in block_bytes)  # beyond one sequence
    for kind in windowed:
        more = min(max(0, min(seqs * per_seq[kind], even) - per_seq[kind]), left // max(1, block_bytes[kind]))
        num[kind], left = per_seq[kind] + more, left - more * block_bytes[kind]
    for at, kind in enumerate(growing):
        shared = sum(block_bytes[other] for other in growing[at:])
        more = min(seqs * per_seq[kind] - per_seq[kind], left // max(1, shared))
        num[kind], left = per_seq[kind] + more, left - more * block_bytes[kind]
    return {kind: num[kind] for kind in block_bytes}


class BlockTable:
    """The blocks of one kind: a stack of free ones, and the ring of each row. Owns the block numbers."""

    def __init__(self, num_blocks: int, blocks_per_seq: int, block_size: int, num_rows: int):
        self.num_blocks, self.blocks_per_seq, self.block_size = num_blocks, blocks_per_seq, block_size
        self.free = list(range(num_blocks - 1, -1, -1))
        self.num_owned_N = np.zeros(num_rows, np.int64)
        self.block_NC = np.zeros((num_rows, blocks_per_seq), np.int32)

    def num_missing(self, row: int, num_tokens: int) -> int:
        """Blocks that the row lacks to hold the end of a sequence of num_tokens."""
        wanted = min(ceil_div(num_tokens, self.block_size), self.blocks_per_seq)
        return max(0, wanted - int(self.num_owned_N[row]))

    def take(self, row: int, count: int) -> None:
        for column in range(self.num_owned_N[row], self.num_owned_N[row] + count):
            self.block_NC[row, column] = self.free.pop()
        self.num_owned_N[row] += count

    def release(self, row: int) -> None:
        self.free.extend(int(block) for block in self.owned(row)[::-1])
        self.num_owned_N[row] = 0

    def owned(self, row: int) -> np.ndarray:
        return self.block_NC[row, : self.num_owned_N[row]]

    def slots(self, row: int | np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 places of positions in the flat pool [num_blocks * block_size]; `row` broadcasts against positions."""
        column = positions // self.block_size % self.blocks_per_seq
        return self.block_NC[row, column].astype(np.int64) * self.block_size + positions % self.block_size

    def check(self) -> None:
        """Every block is either free or owned once."""
        owned = [int(b) for row in range(len(self.num_owned_N)) for b in self.owned(row)]
        assert sorted(self.free + owned) == list(range(self.num_blocks)), "a block is lost or owned twice"


class KVCache:
    """Blocks of all kinds for up to num_rows running sequences. A row gets all the blocks it asks for, or none."""

    def __init__(self, layout: CacheLayout, num_rows: int):
        self.layout = layout
        self.tables = {
            kind: BlockTable(layout.num_blocks[kind], layout.blocks_per_seq[kind], layout.block_size, num_rows)
            for kind in layout.kinds
        }
        self._free_rows = list(range(num_rows - 1, -1, -1))

    @property
    def num_total_blocks(self) -> int:
        return sum(table.num_blocks for table in self.tables.values())

    @property
    def num_free_blocks(self) -> int:
        return sum(len(table.free) for table in self.tables.values())

    def fits(self, num_tokens: int, reserve: int = 0) -> bool:
        """Could a new sequence of num_tokens be held now, leaving `reserve` blocks of each kind that goes on growing free?"""
        for kind, table in self.tables.items():
            wanted = min(ceil_div(num_tokens, table.block_size), table.blocks_per_seq)
            if wanted + (reserve if kind.window is None else 0) > len(table.free):
                return False
        return True

    def open_row(self) -> int:
        return self._free_rows.pop()

    def grow(self, row: int, num_tokens: int) -> bool:
        """Give the row what it lacks to hold num_tokens; False, and nothing changed, if there is too little."""
        missing = {kind: table.num_missing(row, num_tokens) for kind, table in self.tables.items()}
        if any(missing[kind] > len(table.free) for kind, table in self.tables.items()):
            return False
        for kind, table in self.tables.items():
            table.take(row, missing[kind])
        return True

    def close_row(self, row: int) -> None:
        """Take everything back from the row."""
        for table in self.tables.values():
            table.release(row)
        self._free_rows.append(row)

    def check(self, rows: list[int]) -> None:
        """Assert free + used == total for each kind, and that exactly `rows` hold anything."""
        num_rows = len(next(iter(self.tables.values())).num_owned_N)
        assert sorted(self._free_rows + rows) == list(range(num_rows)), "a row is lost or used twice"
        for table in self.tables.values():
            table.check()
            assert all(table.num_owned_N[row] == 0 for row in self._free_rows), "a closed row holds blocks"
