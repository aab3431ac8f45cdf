"""A row's bits do not depend on its company: products, activations, attention, norms, router and the whole expert layer.

Legend: T tokens, A assignments, E experts, K and N of a product, D model, F expert hidden.
Sizes are mostly no multiple of anything, so that every remainder is met; threads 1 to 3.
"""

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.config import preset
from trinity.engine.kv_pools import rounded
from trinity.experts.base import Assignments, LayerWeights
from trinity.experts.rows import weighted_swiglu
from trinity.experts.torch_backend import TorchBackend
from trinity.models.common.attention import PackedAttention, causal_mask, document_positions
from trinity.models.common.layers import Linear, RMSNorm, SwiGLU, project
from trinity.models.common.router import SigmoidRouter
from trinity.ops.batch_invariant import elementwise, gemm, low_rank
from trinity.ops.batch_invariant.attention import Seen, attention
from trinity.ops.batch_invariant.fused_mlp import feed_forward

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    inner=st.sampled_from([1, 8, 15, 16, 33, 128, 300]),
    outputs=st.sampled_from([1, 2, 7, 65, 130]),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
)
def test_a_rows_product_is_the_same_alone_and_in_company(counts, inner, outputs, dtype, threads):
    torch.set_num_threads(threads)
    x_AK, w_ENK = random(sum(counts), inner, dtype=dtype), random(len(counts), outputs, inner, seed=1, dtype=dtype)
    expert_A = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    got_AN = gemm.grouped(x_AK, w_ENK, torch.tensor(counts).cumsum(0))
    for row, expert, got_N in zip(x_AK, expert_A, got_AN, strict=True):
        assert torch.equal(gemm.linear(row[None], w_ENK[expert])[0], got_N)
    want_AN = torch.einsum("ak,ank->an", x_AK.double(), w_ENK[expert_A].double())
    torch.testing.assert_close(got_AN.double(), want_AN, atol=1e-4, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    inner=st.sampled_from([1, 15, 16, 130]),
    outputs=st.lists(st.sampled_from([1, 2, 7, 65, 130]), min_size=1, max_size=4),
    threads=st.integers(1, 3),
)
def test_products_side_by_side_are_those_one_by_one(rows, inner, outputs, threads):
    torch.set_num_threads(threads)
    x_TK, weights = random(rows, inner), [random(n, inner, seed=i) for i, n in enumerate(outputs)]
    got = gemm.side_by_side(x_TK, weights).split(outputs, -1)
    for y_TN, w_NK in zip(got, weights, strict=True):
        assert torch.equal(y_TN, gemm.linear(x_TK, w_NK))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 150), min_size=1, max_size=5).filter(any),
    dim=st.sampled_from([1, 16, 33, 100]),
    hidden=st.sampled_from([1, 17, 64, 70]),
    outputs=st.sampled_from([1, 2, 31]),
    threads=st.integers(1, 3),
)
def test_a_feed_forward_in_one_pass_is_that_in_four(counts, dim, hidden, outputs, threads):
    torch.set_num_threads(threads)
    num, end_E = len(counts), torch.tensor(counts).cumsum(0)
    x_AD, weight_A1 = random(sum(counts), dim), random(sum(counts), 1, seed=5)
    gate, up = random(num, hidden, dim, seed=1), random(num, hidden, dim, seed=2)
    down_ENF = random(num, outputs, hidden, seed=3)
    middle = elementwise.gated(gemm.grouped(x_AD, gate, end_E), gemm.grouped(x_AD, up, end_E), weight_A1)
    want = gemm.grouped(middle, down_ENF, end_E)
    assert torch.equal(feed_forward(x_AD, gate, up, down_ENF, end_E, weight_A1.squeeze(1)), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_give_the_same_bits_with_gradients_and_without(dtype):
    layer, projections = SwiGLU(33, 40, dtype=dtype), [Linear(33, n, dtype=dtype) for n in (8, 3, 17)]
    for part in (layer, layer.gate_proj, layer.up_proj, layer.down_proj, *projections):
        part.is_exact = True
    x = random(2, 13, 33, dtype=dtype)
    want = [layer(x), *project(x, *projections)]
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            for mine, theirs in zip([layer(x), *project(x, *projections)], want, strict=True):
                assert torch.equal(mine, theirs)


def test_its_gradients_are_those_of_the_plain_product():
    x, w = random(11, 20).requires_grad_(), random(3, 6, 20, seed=1).requires_grad_()
    ends, dy = torch.tensor([4, 4, 11]), random(11, 6, seed=2)
    got = torch.autograd.grad(gemm.grouped(x, w, ends), [x, w], dy)
    want = torch.autograd.grad(torch.cat([x[:4] @ w[0].T, x[4:] @ w[2].T]), [x, w], dy)
    torch.testing.assert_close(got, want)
    assert not got[1][1].any()


def test_gradients_of_swiglu_are_the_librarys():
    gate, up, weight = (random(50, n, seed=i).requires_grad_() for i, n in enumerate((97, 97, 1)))
    weighted = weighted_swiglu(gate, up, weight), F.silu(gate) * up * weight
    for mine, theirs in (weighted, (elementwise.swiglu(gate, up), F.silu(gate) * up)):
        leaves, dy = [gate, up, weight][: 3 if mine is weighted[0] else 2], random(50, 97, seed=3)
        torch.testing.assert_close(torch.autograd.grad(mine, leaves, dy), torch.autograd.grad(theirs, leaves, dy))


@pytest.mark.parametrize(
    "counts", [(70,), (5, 0, 13, 1, 0, 40, 6, 7, 2)]
)  # a job after the other, a matrix after the other
@pytest.mark.parametrize("outputs", [(64, 128), (7,)])  # by the kernel, by the library
@pytest.mark.parametrize("threads", [1, 2])
def test_adapters_have_the_gradients_of_the_matrices_that_they_are_part_of(counts, outputs, threads):
    torch.set_num_threads(threads)
    num, end_E, inner, rank = len(counts), torch.tensor(counts).cumsum(0), 128, 8
    x = random(sum(counts), inner).requires_grad_()
    shapes = [shape for n in outputs for shape in ((n, inner), (rank, inner), (n, rank))]
    leaves = [random(num, *shape, seed=i) / inner**0.5 for i, shape in enumerate(shapes)]
    leaves = [leaf.requires_grad_(i % 3 > 0) for i, leaf in enumerate(leaves)]
    parts = [tuple(leaves[i : i + 3]) for i in range(0, len(leaves), 3)]
    mine = low_rank.grouped(x, parts, 0.5, end_E)
    theirs = [gemm.grouped(x, w + 0.5 * b @ a, end_E) for w, a, b in parts]
    torch.testing.assert_close(list(mine), theirs)
    trained = [x, *(leaf for leaf in leaves if leaf.requires_grad)]
    dys = [random(*y.shape, seed=9) for y in theirs]
    want = torch.autograd.grad(theirs, trained, dys)
    torch.testing.assert_close(torch.autograd.grad(mine, trained, dys), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_is_the_same_wherever_it_stands(dtype):
    """1,000 x 97 elements are shared out unevenly among threads, and the compiler's vectors leave remainders."""
    gate, up, weight = (random(1000, n, seed=n, dtype=dtype) for n in (97, 97, 1))
    weight = weight.float()
    whole = elementwise.sigmoid(gate), elementwise.swiglu(gate, up), elementwise.gated(gate, up, weight)
    for threads, rows in ((1, 1), (2, 3), (3, 999), (3, 1000)):
        torch.set_num_threads(threads)
        part = slice(1000 - rows, 1000)
        some = gate[part], up[part], weight[part]
        assert torch.equal(elementwise.sigmoid(some[0]), whole[0][part])
        assert torch.equal(elementwise.swiglu(*some[:2]), whole[1][part])
        assert torch.equal(elementwise.gated(*some), whole[2][part])


def test_exp_is_within_an_ulp_and_keeps_nan():
    @numba.njit
    def each(x, y):
        for i in range(len(x)):
            y[i] = pointwise_exp(x[i])

    pointwise_exp = elementwise.exp
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    y = np.empty_like(x)
    each(x, y)
    want = np.exp(x.astype(np.float64))
    assert (np.abs(y - want) <= np.spacing(want.astype(np.float32))).all()
    assert np.isnan(elementwise.sigmoid(torch.tensor([float("nan")])).numpy()).all()
    assert elementwise.sigmoid(torch.tensor([float("-inf"), float("inf"), 0.0])).tolist() == pytest.approx([0, 1, 0.5])


def seen_by(chunk: range, window: int, slot_N: torch.Tensor | None = None) -> Seen:
    """What the chunk's queries see, of keys from the first on that any of them does."""
    end_T = torch.arange(chunk.start, chunk.stop) + 1
    first = max(0, chunk.start + 1 - window)
    slot_N = torch.arange(chunk.stop - first) if slot_N is None else slot_N
    return Seen(slot_N, (end_T - window).clamp(min=0) - first, end_T - first, torch.full_like(end_T, -first))


def scattered(part: torch.Tensor, slots: torch.Tensor, num: int) -> torch.Tensor:
    """At these slots of `num`, among what must not be read: NaN, or int8 whose scales are."""
    pool = torch.full((num, *part.shape[1:]), torch.nan if part.is_floating_point() else 99, dtype=part.dtype)
    pool[slots] = part
    return pool


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 300),
    window=st.integers(1, 300),
    heads=st.sampled_from([(4, 2), (6, 1), (3, 3), (16, 2)]),
    dim=st.sampled_from([4, 16, 40, 128]),
    dtype=st.sampled_from(DTYPES),
    is_int8=st.booleans(),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_a_query_sees_its_keys_and_nothing_else(length, window, heads, dim, dtype, is_int8, threads, data):
    """A query alone and a chunk of several, their keys scattered among NaN, have the bits of the whole sequence, whose are
    what SDPA computes; of int8 as of what it stands for."""
    torch.set_num_threads(threads)
    q, *kv = (random(length, num, dim, seed=i, dtype=dtype) for i, num in enumerate((heads[0], heads[1], heads[1])))
    parts = [part for pair in zip(*map(rounded, kv), strict=True) for part in pair] if is_int8 else kv
    whole = attention(q, *parts[:2], seen_by(range(length), window), parts[2:])
    t = data.draw(st.integers(0, length - 1))
    for end in (t + 1, data.draw(st.integers(t + 1, length))):
        first = max(0, t + 1 - window)
        slots = torch.randperm(2 * length, generator=torch.Generator().manual_seed(t))[: end - first]
        pools = [scattered(part[first:end], slots, 2 * length) for part in parts]
        part = attention(q[t:end], *pools[:2], seen_by(range(t, end), window, slots), pools[2:])
        assert torch.equal(part, whole[t:end])
    if is_int8:
        kv = [part * scale[..., None] for part, scale in zip(parts[:2], parts[2:], strict=True)]
    plain = [x.double().transpose(0, 1)[None] for x in (q, *kv)]
    mask = causal_mask(length, window, None, torch.device("cpu"))
    want = F.scaled_dot_product_attention(*plain, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(whole.double(), want, atol=1e-2 if dtype is torch.bfloat16 else 2e-6, rtol=1e-2)


def test_queries_of_several_sequences_are_those_of_each():
    """Side by side as in a decode: some have a query, one has three that share their keys."""
    window, chunks = 90, (range(69, 70), range(4, 5), range(197, 200), range(1))
    first = [max(0, chunk.start + 1 - window) for chunk in chunks]
    qkv = [[random(c.stop, heads, 32, seed=i) for i, heads in enumerate((4, 2, 2))] for c in chunks]
    parts = [(q[c.start :], k[at:], v[at:]) for (q, k, v), c, at in zip(qkv, chunks, first, strict=True)]
    alone = [attention(*part, seen_by(chunk, window)) for part, chunk in zip(parts, chunks, strict=True)]
    begins = np.cumsum([0, *(chunk.stop - at for chunk, at in zip(chunks, first, strict=True))])
    seen = [[t + int(at) for t in seen_by(c, window).tensors] for c, at in zip(chunks, begins, strict=False)]
    q, k, v = map(torch.cat, zip(*parts, strict=True))
    assert torch.equal(attention(q, k, v, Seen(*map(torch.cat, zip(*seen, strict=True)))), torch.cat(alone))


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("layer", [0, 3])  # sliding, full
def test_gradients_of_attention_are_the_librarys(layer, has_documents):
    """Where ours is computed forward, the library's backward is given our result."""
    model = preset("tiny").model_copy(update={"sliding_window": 5})
    docs_BS = torch.tensor([[0] * 4 + [1] * 9 + [2] * 7] * 2) if has_documents else None
    attend, size = PackedAttention(model, docs_BS, 2, 20), model.head_dim
    leaves = [random(40, heads, size, seed=seed).requires_grad_() for seed, heads in enumerate((4, 2, 2))]
    dy = random(40, 4, size, seed=5)
    mine = torch.autograd.grad(attend(layer, *leaves), leaves, dy)
    attend.is_exact = False
    torch.testing.assert_close(mine, torch.autograd.grad(attend(layer, *leaves), leaves, dy))


def test_documents_of_a_packed_sequence_are_computed_as_if_alone():
    model = preset("tiny").model_copy(update={"sliding_window": 5})
    docs_BS = torch.tensor([[0] * 4 + [1] * 9 + [2] * 7])
    q, k, v = random(20, 4, 8), random(20, 2, 8, seed=1), random(20, 2, 8, seed=2)
    assert document_positions(docs_BS, 1, 20).tolist() == [*range(4), *range(9), *range(7)]
    for layer in (0, 3):  # sliding, full
        whole = PackedAttention(model, docs_BS, 1, 20)(layer, q, k, v)
        part = slice(4, 13)
        assert torch.equal(whole[part], PackedAttention(model, None, 1, 9)(layer, q[part], k[part], v[part]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(8, 16, 12), (5, 128, 40)])
def test_experts_give_a_row_the_same_bits_in_any_company(size, dtype):
    """1 to 512 rows in random company, with and without gradients, on one to three threads."""
    num_experts, dim, hidden = size
    shapes = ((hidden, dim), (hidden, dim), (dim, hidden))
    stacks = [random(num_experts, *shape, seed=i, dtype=dtype) / 4 for i, shape in enumerate(shapes)]
    weights = LayerWeights(stacks[0], stacks[1], stacks[2].mT)
    rng, backend = torch.Generator().manual_seed(7), TorchBackend()
    x_TD, ids_TK = random(512, dim, dtype=dtype), torch.rand(512, num_experts, generator=rng).topk(3).indices
    weight_TK = torch.rand(512, 3, generator=rng)

    def layer(rows):
        row_A = torch.arange(len(rows)).repeat_interleave(3)
        assigned = Assignments(row_A, ids_TK[rows].flatten(), weight_TK[rows].flatten())
        return backend(x_TD[rows], assigned, weights)

    whole = layer(torch.arange(512))
    for i, num in enumerate((1, 2, 3, 4, 5, 9, 11, 12, 17, 33, 64, 200, 511)):
        torch.set_num_threads(1 + i % 3)
        rows = torch.randperm(512, generator=rng)[:num]
        with torch.inference_mode(i % 2 == 0):
            assert torch.equal(layer(rows), whole[rows]), f"{num} rows"


def test_norms_and_router_give_a_row_the_same_bits_in_any_company():
    config = preset("tiny").model_copy(update={"hidden_size": 100, "num_experts": 13, "num_experts_per_tok": 3})
    norm, router = RMSNorm(100, 1e-5), SigmoidRouter(100, 13, config.num_experts_per_tok, scale=config.route_scale)
    router.is_exact, router.bias_E = True, random(13) / 10
    x_TD = random(300, 100)
    with torch.no_grad():
        normed, routing = norm(x_TD), router(x_TD)
        for threads, part in ((1, slice(0, 1)), (2, slice(5, 8)), (3, slice(1, 300)), (2, slice(17, 61))):
            torch.set_num_threads(threads)
            assert torch.equal(norm(x_TD[part]), normed[part])
            for mine, whole in zip(router(x_TD[part]), routing, strict=True):
                assert torch.equal(mine, whole[part])
