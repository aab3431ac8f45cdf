"""Gradients of an output's leaves."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def gradients_of(y: Tensor, dy: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return what `torch.autograd.grad(y, leaves, dy)` does, to the bit. That imports a solver of symbolic shapes when it is
    first called: half a second in which a shard that has just started keeps its callers waiting.

    Raises ValueError where `dy` has another shape than `y`.
    """
    if dy.shape != y.shape:
        raise ValueError(f"a gradient of shape {tuple(dy.shape)} for an output of shape {tuple(y.shape)}")
    with torch.enable_grad():  # a backward may ask
        seed: Tensor = _Seed.apply(y, dy)
    return torch.autograd.grad(seed, leaves)


class _Seed(Function):
    """A number whose gradient by `y` is `dy`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dy: Tensor) -> Tensor:
        ctx.dy = dy
        return y.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _one: Tensor) -> tuple[Tensor, None]:
        return ctx.dy, None
