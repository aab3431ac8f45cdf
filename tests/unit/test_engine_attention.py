"""Paged attention against dense masks, over random caches, chunkings and neighbours, and its splitting rules.

Legend: S sequence, H query heads, G key-value heads, d head dim.
"""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_fakes import VOCAB, DenseAttend, fake_config, fake_engine, run_all
from trinity.config import EngineConfig, LayerCache
from trinity.engine import attention
from trinity.engine.attention import PagedAttention
from trinity.engine.exact_attention import ExactAttention
from trinity.engine.kv_cache import KVCache
from trinity.engine.kv_layout import plan_layout
from trinity.engine.kv_pools import KVPools, rounded
from trinity.engine.request import Chunk, SamplingParams, Sequence
from trinity.engine.runner import flatten, in_order
from trinity.errors import ConfigError
from trinity.models.common.attention import PackedAttention
from trinity.models.common.decoder import Output
from trinity.models.common.family import Nobody
from trinity.text.detokenizer import TextStream

LAYERS = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")
MAX_LEN = 400


class Paged:
    """Sequences of random q, k, v that are fed in chunks; collects what attention returned for each."""

    def __init__(self, window: int, block_size: int, lengths: list[int], dtype: str = "auto", attend=PagedAttention):
        self.config = fake_config(window, LAYERS)
        room = {"max_model_len": MAX_LEN, "max_num_seqs": 8, "kv_cache_bytes": 8 << 20, "kv_cache_dtype": dtype}
        settings, self.attend = EngineConfig(block_size=block_size, **room), attend
        self.cache = KVCache(plan_layout(self.config, settings, 4), 8)
        self.pools = KVPools(self.cache.layout, torch.device("cpu"), torch.float32)
        for pool in itertools.chain(*map(self.pools.parts, self.cache.layout.kinds)):
            pool.fill_(torch.nan if pool.is_floating_point() else 99)  # nothing unwritten may ever be read
        made = torch.Generator().manual_seed(0)
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
        attend = self.attend(self.pools, self.cache, flatten(chunks))
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
            q, *kv = self.qkv[i]
            kv = self.pools.widened(self.pools.of(layer)[0], self.pools.stored(*kv))
            torch.testing.assert_close(self.out[i][layer], dense(layer, q, *kv), atol=2e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    window=st.integers(1, 40),
    block_size=st.integers(1, 20),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    dtype=st.sampled_from(["auto", "int8"]),
    attend=st.sampled_from([PagedAttention, ExactAttention]),
    data=st.data(),
)
def test_any_chunking_equals_dense(window, block_size, lengths, dtype, attend, data):
    """What is kept in 8 bits counts as what it stands for, for the chunk that computes it as for any later one."""
    paged = Paged(window, block_size, lengths, dtype, attend)
    while any(s.num_uncomputed for s in paged.sequences):
        counts = [data.draw(st.sampled_from([0, 1, 1, 2, 7, 30, 60])) for _ in lengths]
        paged.feed(counts if any(counts) else [1] * len(lengths))
    paged.check()
    if attend is ExactAttention:
        whole = Paged(window, block_size, lengths, dtype, attend)
        whole.feed(lengths)
        assert all(map(torch.equal, itertools.chain(*paged.out), itertools.chain(*whole.out)))


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


LATENT = LayerCache(num_heads=1, key_dim=6, value_dim=4, scale=0.3, is_latent=True)
CACHES = (LayerCache(2, 4, 4, 0.5), LATENT, LayerCache(2, 4, 4, 0.5, window=5), LATENT, replace(LATENT, window=7))


class LatentModel(torch.nn.Module):
    """Layers of several kinds: grouped heads, latent ones (keys alone, whose beginnings are the values), both with windows."""

    weight_dtype = "auto"

    def __init__(self):
        super().__init__()
        made = torch.Generator().manual_seed(0)
        self.keys = torch.nn.ParameterList(
            torch.randn(VOCAB, cache.num_heads, cache.key_dim, generator=made) for cache in CACHES
        )
        self.queries = torch.nn.ParameterList(torch.randn(VOCAB, 4, c.key_dim, generator=made) for c in CACHES)
        self.experts = Nobody()
        self.head = torch.nn.Parameter(torch.randn(VOCAB, 16 * len(CACHES), generator=made))

    def forward_all(self, passes):
        return [self(*inputs[:3]) for inputs in passes]

    def forward(self, ids_T, positions_T, attend):
        turn_T11 = 1 + 0.5 * torch.sin(1.7 * positions_T.float())[:, None, None]
        outs = []
        for layer, cache in enumerate(CACHES):
            q, k = self.queries[layer][ids_T], self.keys[layer][ids_T] * turn_T11
            outs.append(attend(layer, q, k, None if cache.is_latent else k.flip(-1)).flatten(1))
        return Output(torch.cat(outs, 1), ())

    def logits(self, hidden_TD):
        return hidden_TD @ self.head.T


def latent_config(invariant=True):
    return SimpleNamespace(
        layer_caches=CACHES, max_position_embeddings=4096, vocab_size=VOCAB, eos_token_ids=(3,), num_experts=1,
        batch_invariant=invariant, dtype="float32",
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [3, 8, 200])
def test_a_latent_cache_is_one_more_kind(chunk):
    """As DeepSeek-V3's: the engine needs to know no more of it than its LayerCache. Greedy text equals that without a cache."""
    model, config = LatentModel(), latent_config()
    prompts = [tuple(1 + (7 * i + j) % 30 for j in range(n)) for i, n in enumerate((1, 4, 23, 40))]
    engine = fake_engine(config, model=model, max_num_batched_tokens=chunk, max_num_seqs=4)
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    deltas = run_all(engine)
    engine.check()
    for i, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(12):
            dense = PackedAttention(config, None, 1, len(ids))
            hidden = model(torch.tensor(ids), torch.arange(len(ids)), dense).hidden_TD
            ids.append(int(model.logits(hidden[-1:]).argmax()))
        assert [t for delta in deltas[str(i)] for t in delta.token_ids] == ids[len(prompt) :]


def test_latent_layers_are_not_kept_in_8_bits():
    asked = EngineConfig(max_model_len=64, block_size=4, kv_cache_bytes=1 << 20, kv_cache_dtype="int8")
    with pytest.raises(ConfigError, match=r"kv_cache_dtype int8 .* layers 1, 3, 4 keep latent keys"):
        plan_layout(latent_config(), asked, 4)


def test_zeros_and_what_is_not_finite_survive_8_bits():
    x_NGd = torch.tensor([[[0.0, 0.0]], [[1.0, torch.nan]], [[torch.inf, 1.0]], [[127.0, -63.5]]])
    number, scale = rounded(x_NGd)
    got = number * scale[..., None]
    assert got[0].abs().max() == 0
    assert not torch.isfinite(got[1]).any()
    assert not torch.isfinite(got[2]).any()
    assert got[3].tolist() == [[127.0, -64.0]]


def test_a_latent_layer_stores_its_keys_alone():
    settings = EngineConfig(max_model_len=64, block_size=4, max_num_seqs=2, kv_cache_bytes=1 << 20)
    layout = plan_layout(latent_config(), settings, 4)
    assert [layout.block_bytes[kind] for kind in layout.kinds] == [4 * 16 * 4, 2 * 4 * 6 * 4, 4 * 16 * 4, 4 * 6 * 4]
    pools = KVPools(layout, torch.device("cpu"), torch.float32)
    assert [part.shape[2:] for part in pools.parts(LATENT)] == [(1, 6)]
    assert sum(part.nbytes for kind in layout.kinds for part in pools.parts(kind)) == layout.total_bytes
