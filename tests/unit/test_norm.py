"""RMSNorm in training: the bits of its formula, and the gradients that autograd has of it."""

import pytest
import torch

from trinity.models.common.layers import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounds_first", [False, True])
@pytest.mark.parametrize("shape", [(1500, 70), (3, 5, 64)])
def test_gradients_are_autograds(monkeypatch, dtype, rounds_first, shape):
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    norm = RMSNorm(shape[-1], 1e-5, rounds_first=rounds_first).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
    x.requires_grad_()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = norm(x)
        found.append(torch.autograd.grad(y, (x, norm.weight), dy))
    torch.set_num_threads(before)
    monkeypatch.setattr(RMSNorm, "_is_trained", lambda *_: False)
    plain = norm(x)
    assert torch.equal(y, plain)
    for one, two, want in zip(*found, torch.autograd.grad(plain, (x, norm.weight), dy), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, two)
        assert (one.float() - want.float()).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * want.float().norm()
