"""exp and what is made of it, elementwise, on a CPU: the same bits wherever an element stands.

torch and its vector library compute the last few elements of a thread's share with another exp than the rest. Here it is
one formula in operations that are rounded once each, so the compiler's vectors and its remainder agree.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trinity.ops.batch_invariant.compiled import kernel
from trinity.ops.batch_invariant.simd import as_float, fma
from trinity.ops.batch_invariant.threads import in_threads

OPERATIONS = 30  # of one exp and what surrounds it, for the number of threads
ROUND = np.float32(1.5 * 2**23)  # added and taken away again, it rounds to an integer
LOG2E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
# exp(r) = 1 + r + r^2 * P(r) on [-ln2 / 2, ln2 / 2]: Cephes' expf, 1 ulp
P0, P1, P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
P3, P4, P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
HIGHEST, LOWEST, ONE = np.float32(88.0), np.float32(-87.0), np.float32(1)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)). Differentiable."""
    y: Tensor = _Sigmoid.apply(x)
    return y


def gated(gate: Tensor, up: Tensor, weight: Tensor | None = None) -> Tensor:
    """silu(gate) * up, both [..., F], times weight [..., 1] if there is one; no gradients (see trinity/experts/rows.py)."""
    width = gate.shape[-1]
    num = gate.numel() // max(1, width)
    weight_T, out = torch.ones(num) if weight is None else weight, torch.empty(gate.shape)
    arrays = [t.detach().float().contiguous().view(-1).numpy() for t in (gate, up, weight_T, out)]
    in_threads(num, OPERATIONS * gate.numel(), lambda first, last: _gated(*arrays, width, first, last))
    return out.to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Differentiable in both."""
    y: Tensor = _SwiGLU.apply(gate, up)
    return y


def cos_sin(angle: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(2, *angle.shape)
    _cos_sin(angle.contiguous().view(-1).numpy(), out.view(2, -1).numpy())
    return out[0], out[1]


class _Sigmoid(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.empty(x.shape)
        arrays = x.detach().float().contiguous().view(-1).numpy(), y.view(-1).numpy()
        in_threads(x.numel(), OPERATIONS * x.numel(), lambda first, last: _sigmoid(*arrays, first, last))
        y = y.to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dx: Tensor = torch.ops.aten.sigmoid_backward(dy, ctx.saved_tensors[0])
        return dx


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), dy * torch.nn.functional.silu(gate)


@numba.njit(inline="always")
def exp(x):  # type: ignore[no-untyped-def]
    """Within 1 ulp on [-87, 88], as at the bounds beyond them; NaN stays NaN."""
    x = LOWEST if x < LOWEST else x
    x = HIGHEST if x > HIGHEST else x
    n = (fma(x, LOG2E, ROUND)) - ROUND
    r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x))
    p = fma(fma(fma(fma(fma(P0, r, P1), r, P2), r, P3), r, P4), r, P5)
    return (fma(p, r * r, r) + ONE) * as_float(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))


@kernel
def _sigmoid(x, y, first, last):  # type: ignore[no-untyped-def]
    for i in range(first, last):
        y[i] = ONE / (ONE + exp(-x[i]))


@kernel
def _gated(gate, up, weight, out, width, first, last):  # type: ignore[no-untyped-def]
    for row in range(first, last):
        w = weight[row]
        for i in range(row * width, (row + 1) * width):
            out[i] = gate[i] / (ONE + exp(-gate[i])) * up[i] * w


@kernel
def _cos_sin(angle, out):  # type: ignore[no-untyped-def]
    for i in range(len(angle)):
        out[0, i], out[1, i] = math.cos(angle[i]), math.sin(angle[i])
