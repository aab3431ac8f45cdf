"""Paged attention against dense masks, over random caches, chunkings and neighbours, and its splitting rules.

Legend: S sequence, H query heads, G key-value heads, d head dim.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_fakes import DenseAttend, fake_config
from trinity.config import EngineConfig
from trinity.engine import attention
from trinity.engine.attention import KVPools, PagedAttention
from trinity.engine.kv_cache import KVCache, plan_layout
from trinity.engine.request import Chunk, SamplingParams, Sequence
from trinity.engine.runner import flatten, in_order
from trinity.text.detokenizer import TextStream

LAYERS = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")
MAX_LEN = 400


class Paged:
    """Sequences of random q, k, v that are fed in chunks; collects what attention returned for each."""

    def __init__(self, window: int, block_size: int, lengths: list[int], seed: int = 0):
        self.config = fake_config(window, LAYERS)
        settings = EngineConfig(max_model_len=MAX_LEN, block_size=block_size, max_num_seqs=8, kv_cache_bytes=8 << 20)
        self.cache = KVCache(plan_layout(self.config, settings, 4), 8)
        self.pools = KVPools(self.cache.layout, torch.device("cpu"), torch.float32)
        for pool in (*self.pools.k.values(), *self.pools.v.values()):
            pool.fill_(torch.nan)  # nothing unwritten may ever be read
        made = torch.Generator().manual_seed(seed)
        self.qkv = [[torch.randn(n, heads, 4, generator=made) for heads in (4, 2, 2)] for n in lengths]
        self.sequences = [Sequence(str(i), (1,) * n, SamplingParams(), TextStream(None)) for i, n in enumerate(lengths)]
        for sequence in self.sequences:
            sequence.row = self.cache.open_row()
        self.out = [[torch.zeros(n, 4, 4) for _ in LAYERS] for n in lengths]

    def feed(self, counts: list[int]) -> None:
        chunks = []
        for sequence, count in zip(self.sequences, counts, strict=True):
            count = min(count, sequence.num_uncomputed)
            if count:
                assert self.cache.grow(sequence.row, sequence.num_computed + count)
                chunks.append(Chunk(sequence, sequence.num_computed, count))
        if not chunks:
            return
        chunks = in_order(chunks)
        attend = PagedAttention(self.pools, self.cache, flatten(chunks))
        parts = [(int(c.sequence.request_id), slice(c.start, c.end)) for c in chunks]
        q, k, v = (torch.cat([self.qkv[i][n][rows] for i, rows in parts]) for n in range(3))
        for layer in range(len(LAYERS)):
            pieces = attend(layer, q, k, v).split([c.count for c in chunks])
            for (i, rows), piece in zip(parts, pieces, strict=True):
                self.out[i][layer][rows] = piece
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end

    def check(self) -> None:
        dense = DenseAttend(self.config)
        for i, layer in itertools.product(range(len(self.out)), range(len(LAYERS))):
            torch.testing.assert_close(self.out[i][layer], dense(layer, *self.qkv[i]), atol=2e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    window=st.integers(1, 40),
    block_size=st.integers(1, 20),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    data=st.data(),
)
def test_any_chunking_equals_dense(window, block_size, lengths, data):
    paged = Paged(window, block_size, lengths)
    while any(s.num_uncomputed for s in paged.sequences):
        counts = [data.draw(st.sampled_from([0, 1, 1, 2, 7, 30, 60])) for _ in lengths]
        paged.feed(counts if any(counts) else [1] * len(lengths))
    paged.check()


@pytest.mark.parametrize("window", [30, 64, 100, 300])
@pytest.mark.parametrize("counts", [[400], [150, 250], [1, 399]])
def test_long_chunks_are_cut_into_tiles(window, counts, monkeypatch):
    monkeypatch.setattr(attention, "MAX_MASK", 64 * 100)
    paged = Paged(window, 16, [MAX_LEN])
    for count in counts:
        paged.feed([count])
    paged.check()


@pytest.mark.parametrize("window", [16, 500])
def test_decodes_of_very_different_lengths(window, monkeypatch):
    """Several padded calls, limited by padding and by memory, and still each sequence its own."""
    monkeypatch.setattr(attention, "PAD_FREELY", 8)
    monkeypatch.setattr(attention, "MAX_GATHERED", 500)
    lengths = [380, 300, 290, 120, 60, 9, 3, 2]
    paged = Paged(window, 16, lengths)
    paged.feed([n - 1 for n in lengths])
    paged.feed([1] * len(lengths))
    paged.check()


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=64))
def test_groups_cover_all_and_bound_padding(lengths):
    seen = np.array(sorted(lengths, reverse=True))
    groups = attention._groups(seen)
    assert [i for lo, hi in groups for i in range(lo, hi)] == list(range(len(seen)))
    for lo, hi in groups:
        assert (hi - lo) * seen[lo] <= attention.MAX_GATHERED or hi - lo == 1
        assert seen[lo] <= attention.PAD_FREELY or seen[hi - 1] * 2 >= seen[lo]


@pytest.mark.parametrize(
    ("start", "end", "window"), [(0, 5000, None), (9000, 10000, None), (0, 3000, 100), (700, 2000, 512)]
)
def test_tiles_cover_each_query_once_with_small_masks(start, end, window):
    first = 0 if window is None else max(0, start - window + 1)
    tiles = attention._tiles(first, start, end, window, torch.device("cpu"))
    assert [i for t in tiles for i in range(t.queries.start, t.queries.stop)] == list(range(end - start))
    for tile in tiles:
        if tile.mask_qS is not None:
            assert tile.mask_qS.any(dim=1).all()
            assert tile.mask_qS.numel() <= max(attention.MAX_MASK, 64 * end)
