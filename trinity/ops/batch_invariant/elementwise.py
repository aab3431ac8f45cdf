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
from trinity.ops.batch_invariant.simd import LANES, as_float, fma
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


def softmax(x: Tensor) -> Tensor:
    """exp(x - max) / sum over the last dimension, in float32. Differentiable."""
    y: Tensor = _Softmax.apply(x)
    return y


def gated(gate: Tensor, up: Tensor, weight: Tensor | None = None) -> Tensor:
    """silu(gate) * up, both [..., F], times weight [..., 1] if there is one; no gradients (see `gated_gradients`)."""
    out = torch.empty(gate.shape)
    arrays, num = _lines(gate, up, out, weight=weight)
    in_threads(num, OPERATIONS * gate.numel(), lambda first, last: _gated(*arrays, first, last))
    return out.to(gate.dtype)


def gated_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gated` by gate and up, in their type, and by the weight, in float32, for one of its result. In one pass:
    three tensors are read and two written, where torch's operations one by one read and write twenty."""
    dgate, dup, dweight = torch.empty(gate.shape), torch.empty(gate.shape), torch.empty((*gate.shape[:-1], 1))
    (dgate_TF, dup_TF, dweight_T), num = _lines(dgate, dup, weight=dweight)
    arrays, _ = _lines(grad, gate, up, weight=weight)
    in_threads(
        num,
        2 * OPERATIONS * gate.numel(),
        lambda first, last: _gated_gradients(*arrays, dgate_TF, dup_TF, dweight_T, first, last),
    )
    return dgate.to(gate.dtype), dup.to(gate.dtype), dweight


def _lines(*tensors: Tensor, weight: Tensor | None = None) -> tuple[list[np.ndarray], int]:
    """float32 arrays [T, F] of tensors [..., F], and [T] of their weights, ones where there are none; T."""
    width = tensors[0].shape[-1]
    num = math.prod(tensors[0].shape[:-1])
    weight = torch.ones(num) if weight is None else weight
    flat = [t.detach().float().contiguous() for t in (*tensors, weight)]
    return [*(t.view(num, width).numpy() for t in flat[:-1]), flat[-1].view(num).numpy()], num


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


class _Softmax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, width = torch.empty(x.shape), x.shape[-1]
        arrays = [t.view(-1, width).numpy() for t in (x.detach().float().contiguous(), y)]
        in_threads(len(arrays[0]), OPERATIONS * x.numel(), lambda first, last: _softmax(*arrays, first, last))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dx: Tensor = torch.ops.aten._softmax_backward_data(dy, ctx.saved_tensors[0], -1, torch.float32)
        return dx


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return gated_gradients(dy, *ctx.saved_tensors)[:2]


@numba.njit(inline="always")
def exp(x):  # type: ignore[no-untyped-def]
    """Within 1 ulp on [-87, 88], as at the bounds beyond them; NaN stays NaN."""
    x = LOWEST if x < LOWEST else x
    x = HIGHEST if x > HIGHEST else x
    n = (fma(x, LOG2E, ROUND)) - ROUND
    r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x))
    p = fma(fma(fma(fma(fma(P0, r, P1), r, P2), r, P3), r, P4), r, P5)
    return (fma(p, r * r, r) + ONE) * as_float(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))


# Loops count from 0: the compiler would look whether another index means one from the end, and gather element by element.


@kernel
def _sigmoid(x, y, first, last):  # type: ignore[no-untyped-def]
    x, y = x[first:last], y[first:last]
    for i in range(len(x)):
        y[i] = ONE / (ONE + exp(-x[i]))


@kernel
def _softmax(x, y, first, last):  # type: ignore[no-untyped-def]
    for row in range(first, last):
        found, to, top = x[row], y[row], -np.float32(np.inf)
        for i in range(len(found)):
            top = max(top, found[i])
        for i in range(len(found)):
            to[i] = exp(found[i] - top)
        by = total(to)
        for i in range(len(found)):
            to[i] = to[i] / by


@kernel
def _gated(gate, up, out, weight, first, last):  # type: ignore[no-untyped-def]
    for row in range(first, last):
        g, u, y, w = gate[row], up[row], out[row], weight[row]
        for i in range(len(g)):
            y[i] = g[i] / (ONE + exp(-g[i])) * u[i] * w


@kernel
def _gated_gradients(grad, gate, up, weight, dgate, dup, dweight, first, last):  # type: ignore[no-untyped-def]
    """d silu(g) / dg = s (1 + g (1 - s)) with s = sigmoid(g)."""
    part = np.empty(gate.shape[1], np.float32)
    for row in range(first, last):
        d, g, u, w, dg, du = grad[row], gate[row], up[row], weight[row], dgate[row], dup[row]
        for i in range(len(g)):
            s = ONE / (ONE + exp(-g[i]))
            silu = g[i] * s
            part[i] = d[i] * silu * u[i]
            dg[i] = d[i] * w * u[i] * (s * (ONE + g[i] * (ONE - s)))
            du[i] = d[i] * w * silu
        dweight[row] = total(part)


@kernel
def total(values):  # type: ignore[no-untyped-def]
    """Sum of float32. Lane l has the elements l, l + 16, ... in turn, and lanes are added up in turn."""
    lanes, whole = np.zeros(LANES, np.float32), len(values) // LANES * LANES
    for at in range(0, whole, LANES):
        some = values[at : at + LANES]
        for lane in range(LANES):
            lanes[lane] += some[lane]
    rest = values[whole:]
    for lane in range(len(rest)):
        lanes[lane] += rest[lane]
    found = np.float32(0)
    for lane in range(LANES):
        found += lanes[lane]
    return found


@kernel
def _cos_sin(angle, out):  # type: ignore[no-untyped-def]
    for i in range(len(angle)):
        out[0, i], out[1, i] = math.cos(angle[i]), math.sin(angle[i])
