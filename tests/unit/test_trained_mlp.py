"""Products for gradients, and a feed-forward's own backward: the bits of their twins, and the gradients of the plain formula.

Legend: A assignments, R rows, E experts, K inner dimension, N outputs, D model, F hidden. Sizes are mostly no multiple of
anything.
"""

import pytest
import torch

from trinity.experts.base import Assignments, LayerWeights
from trinity.experts.reference import ReferenceBackend
from trinity.experts.torch_backend import TorchBackend
from trinity.ops import extension
from trinity.ops.batch_invariant import elementwise, gemm, outer, trained_mlp
from trinity.ops.gradient_sums import Stacks, Sums

DTYPES = [torch.float32, torch.bfloat16]
COUNTS = [3, 0, 300, 17]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def multiplies():
    """Leave out what this processor, or an extension that is not there, does not multiply."""

    def check(dtype):
        if not extension.has_outer(torch.empty(1, 1, dtype=dtype)):
            pytest.skip(f"no products of {dtype} by the extension here")

    return check


def run(job, num_matrices):
    job.run(0, num_matrices * job.num_units)


def chain(a_KA, b_KB, out_AB):
    """out + a^T b: 128 terms (of bfloat16 pairs, the second of each first) summed in turn, their sum added to what is there."""
    per = 2 if a_KA.dtype == torch.bfloat16 else 1
    for at in range(0, len(a_KA), 128 * per):
        total_AB = torch.zeros_like(out_AB)
        for first in range(at, min(at + 128 * per, len(a_KA)), per):
            for k in reversed(range(first, min(first + per, len(a_KA)))):
                total_AB = total_AB + a_KA[k, :, None].float() * b_KB[k].float()  # which is exact: as if fused
        out_AB = out_AB + total_AB
    return out_AB


@pytest.mark.parametrize("n", [64, 320])
def test_float32_has_numbas_bits(multiplies, monkeypatch, n):
    multiplies(torch.float32)
    num, end_E = sum(COUNTS), torch.tensor(COUNTS).cumsum(0)
    p_RK, v_EKN, a_RA, b_RB = random(num, 301), random(4, 301, n), random(num, 21), random(num, n, seed=1)
    for is_new in (True, False):
        found = []
        for has_native in (True, False):
            if not has_native:
                monkeypatch.setattr(extension, "lib", None)
            rows_RN, sums_EAB = random(num, n, seed=2), random(4, 21, n, seed=2)
            run(outer.adding_products(p_RK, v_EKN, end_E, rows_RN, is_new), 4)
            run(outer.summing(a_RA, b_RB, end_E, sums_EAB, is_new), 4)
            found.append((rows_RN, sums_EAB))
        monkeypatch.undo()
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("is_new", [True, False])
def test_bfloat16_is_summed_in_pairs(multiplies, is_new):
    multiplies(torch.bfloat16)
    num, end_E = sum(COUNTS), torch.tensor(COUNTS).cumsum(0)
    p_RK, v_EKN = random(num, 261, dtype=torch.bfloat16), random(4, 261, 45, dtype=torch.bfloat16)
    before_RN, before_EAB = random(num, 45), random(4, 261, 45)
    rows_RN, sums_EAB = before_RN.clone(), before_EAB.clone()
    b_RB = random(num, 45, seed=1, dtype=torch.bfloat16)
    run(outer.adding_products(p_RK, v_EKN, end_E, rows_RN, is_new), 4)
    run(outer.summing(p_RK, b_RB, end_E, sums_EAB, is_new), 4)
    for e, (lo, hi) in enumerate(zip([0, *end_E.tolist()], end_E.tolist(), strict=False)):
        start_RN, start_AB = before_RN[lo:hi] * (not is_new), before_EAB[e] * (not is_new)
        assert torch.equal(rows_RN[lo:hi], chain(p_RK[lo:hi].T, v_EKN[e], start_RN))
        assert torch.equal(sums_EAB[e], chain(p_RK[lo:hi], b_RB[lo:hi], start_AB))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_are_added_where_the_caller_gathers_them(multiplies, dtype, threads):
    multiplies(dtype)
    before, (experts, dim, hidden, rows, k) = torch.get_num_threads(), (9, 96, 70, 53, 3)
    x_RD, dy_RD = (random(rows, dim, seed=seed, dtype=dtype) for seed in (0, 1))
    weight_A = random(rows * k, seed=2).abs().requires_grad_()
    expert_A = torch.arange(rows * k) * 7 % (experts - 1)  # the last has no rows
    assigned = Assignments(torch.arange(rows).repeat_interleave(k), expert_A, weight_A)
    stored = [
        random(experts, *shape, seed=3, dtype=dtype) * 0.1 for shape in ((hidden, dim), (hidden, dim), (dim, hidden))
    ]
    weights = LayerWeights(stored[0], stored[1], stored[2].mT)
    leaves = LayerWeights(*(w.detach().requires_grad_() for w in weights))
    x_RD.requires_grad_()
    want = torch.autograd.grad(ReferenceBackend()(x_RD, assigned, leaves), (x_RD, weight_A, *leaves), dy_RD)
    sums, found = Sums(), [torch.full_like(w, 9.0, dtype=torch.float32) for w in weights]
    torch.set_num_threads(threads)
    try:
        for is_new in (True, False):
            y_RD = TorchBackend()(x_RD, assigned, weights, None, sums)
            assert sums.is_used
            sums.add_to(Stacks(found[0], found[1], found[2].mT), is_new)
            rest = torch.autograd.grad(y_RD, (x_RD, weight_A), dy_RD)
    finally:
        torch.set_num_threads(before)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for got, truth, times in zip((*rest, *found), want, (1, 1, 2, 2, 2), strict=True):
        assert got.shape == truth.shape
        assert (got.float() / times - truth.float()).norm() <= tolerance * truth.float().norm()
    assert not found[0][-1].any()
    assert sums.take() is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "hidden"), [(96, 64), (70, 45)])
def test_forward_has_the_bits_of_its_parts(multiplies, dtype, dim, hidden):
    """Sizes that its tiles take, and others; experts without rows, with one and with more than a unit has."""
    multiplies(dtype)
    counts, before = [1, 0, 200, 5, 3, 2], torch.get_num_threads()
    num, end_E = sum(counts), torch.tensor(counts).cumsum(0)
    x_AD, weight_A1 = random(num, dim, dtype=dtype), random(num, 1, seed=1)
    shapes = (hidden, dim), (hidden, dim), (dim, hidden)
    weights = Stacks(*(random(len(counts), *shape, seed=2 + i, dtype=dtype) * 0.1 for i, shape in enumerate(shapes)))
    gate_AF, up_AF = (gemm.multiply(x_AD, w, end_E).to(dtype) for w in weights[:2])
    want_AD = gemm.multiply(elementwise.gated(gate_AF, up_AF, weight_A1), weights.down_EDF, end_E).to(dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(trained_mlp.feed_forward(x_AD, weight_A1, weights, end_E, Sums()), want_AD)
        finally:
            torch.set_num_threads(before)
    many_AD = x_AD.repeat(3, 1)
    want_AF = gemm.multiply(many_AD, weights.gate_EFD[:1], torch.tensor([len(many_AD)])).to(dtype)
    assert torch.equal(gemm.linear(many_AD, weights.gate_EFD[0]), want_AF)
