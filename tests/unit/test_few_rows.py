"""Expert compute for a few rows on a CPU, against the plain formula."""

import pytest
import torch

from trinity.experts.backend import Assignments, LayerWeights
from trinity.experts.few_rows import few_rows
from trinity.experts.reference import ReferenceBackend
from trinity.experts.torch_backend import TorchBackend, fits_few_rows

DIM = 288


def weights_of(experts, hidden, dim=DIM, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(experts, hidden, dim, generator=rng) * dim**-0.5 for _ in range(3))
    return LayerWeights(gate.to(dtype), up.to(dtype), down.to(dtype).mT.contiguous().mT)


def assigned_of(rows, counts, seed=1):
    """`counts[e]` random rows for expert e, in random order."""
    rng = torch.Generator().manual_seed(seed)
    expert_A = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = torch.randperm(len(expert_A), generator=rng)
    row_A = torch.randint(rows, (len(expert_A),), generator=rng)
    return Assignments(row_A, expert_A[order], torch.rand(len(expert_A), generator=rng))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("counts", [[1], [0, 2, 0, 3], [4, 5, 6, 7, 8, 9], [0, 0, 1], [13, 1, 0, 2, 11, 0, 0, 3]])
@pytest.mark.parametrize("hidden", [256, 257])
def test_equals_the_formula(counts, hidden, threads):
    weights, assigned = weights_of(len(counts), hidden), assigned_of(7, counts)
    x_RD = torch.randn(7, DIM, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            got, want = TorchBackend()(x_RD, assigned, weights), ReferenceBackend()(x_RD, assigned, weights)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("counts", "grad", "dtype", "fits"),
    [
        ([4] * 4, False, torch.float32, True),
        ([4] * 4, True, torch.float32, False),
        ([4] * 4, False, torch.bfloat16, False),
        ([40, 40, 0, 0], False, torch.float32, False),  # 40 rows on each of two experts, though 20 a slot
        ([16, 16, 0, 0], False, torch.float32, True),
    ],
)
def test_it_is_for_few_rows_of_large_fp32_experts_without_gradients(counts, grad, dtype, fits):
    weights = weights_of(len(counts), 256, dtype=dtype)
    x_AD, end_E = torch.zeros(sum(counts), DIM), torch.tensor(counts).cumsum(0)
    with torch.set_grad_enabled(grad):
        assert fits_few_rows(x_AD, end_E, weights) is fits
        assert not fits_few_rows(x_AD, end_E, weights_of(len(counts), 8))
        assert not fits_few_rows(x_AD, end_E, LayerWeights(*(w.contiguous() for w in weights)))


def test_the_backend_uses_it(monkeypatch):
    calls = []
    monkeypatch.setattr("trinity.experts.few_rows.few_rows", lambda *a: calls.append(1) or few_rows(*a))
    with torch.inference_mode():
        TorchBackend()(torch.zeros(3, DIM), assigned_of(3, [2, 2]), weights_of(2, 256))
    assert calls
