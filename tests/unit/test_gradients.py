"""Gradients from an output's gradient are torch's, and cost nothing that torch's need not."""

import sys

import pytest
import torch

from trinity.utils.gradients import gradients_of


def test_they_are_those_of_torch():
    x_RD, w_DD = torch.randn(5, 4).requires_grad_(), torch.randn(4, 4).requires_grad_()
    y_RD, dy_RD = (x_RD @ w_DD).tanh() * x_RD, torch.randn(5, 4)
    want = torch.autograd.grad(y_RD, (x_RD, w_DD), dy_RD, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(y_RD, dy_RD, (x_RD, w_DD)), want, strict=True))


def test_a_gradient_of_another_shape_is_refused():
    x_RD = torch.ones(5, 4).requires_grad_()
    with pytest.raises(ValueError, match=r"shape \(1, 4\) for an output of shape \(5, 4\)"):
        gradients_of(2 * x_RD, torch.ones(1, 4), (x_RD,))


def test_no_solver_is_imported(monkeypatch):
    """Which takes longer than a shard's first backward itself."""
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.symbolic_shapes", None)
    x_D = torch.ones(4).requires_grad_()
    with pytest.raises(ImportError):
        torch.autograd.grad(2 * x_D, (x_D,), torch.ones(4))
    (dx_D,) = gradients_of(2 * x_D, torch.ones(4), (x_D,))
    assert dx_D.tolist() == [2.0] * 4
