"""Rows through feed-forwards in training: gate, up, SwiGLU and down, and their gradients, one expert after the other.

Legend: A rows sorted by expert, E experts, D model, F hidden.
Decisions: forward is one call of the extension, with the bits of gemm.py and elementwise.py one after the other. For the
backward it keeps the products with gate and up; the hidden rows are made again. An expert's backward is done before the next
one's: what it needs is in a core's cache then. Gradients of weights are float32 sums that are added to where the caller gathers
them: none is made to be added and thrown away. For types and processors that the extension has products for (`has_outer`).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trinity.ops import extension
from trinity.ops.batch_invariant.compiled import kernel
from trinity.ops.batch_invariant.elementwise import ONE, OPERATIONS, exp, total
from trinity.ops.batch_invariant.fused_mlp import units_of
from trinity.ops.batch_invariant.outer import adding_products, summing
from trinity.ops.batch_invariant.simd import as_array, narrowed, widened
from trinity.ops.batch_invariant.threads import Job, in_turn
from trinity.ops.gradient_sums import Stacks, Sums


def is_for(x: Tensor, *weights: Tensor) -> bool:
    """Say whether rows like x are trained here."""
    return all(w.dtype == x.dtype and w.is_contiguous() and w.numel() for w in weights) and extension.has_outer(
        x, *weights
    )


def feed_forward(x_AD: Tensor, weight_A1: Tensor, weights: Stacks, end_E: Tensor, sums: Sums) -> Tensor:
    """-> y_AD in x's type: rows up to `end_E[0]` through expert 0 and so on, their hidden rows times their weight.

    Differentiable in x and weight; gradients of the weights go to `sums`.
    """
    y_AD: Tensor = _Trained.apply(x_AD, weight_A1, weights, end_E, sums)
    return y_AD


class _Trained(Function):
    @staticmethod
    def forward(ctx: Any, x_AD: Tensor, weight_A1: Tensor, weights: Stacks, end_E: Tensor, sums: Sums) -> Tensor:
        sums.is_used, weights = True, Stacks(*(w.detach() for w in weights))
        x_AD = x_AD.contiguous()
        units = units_of(end_E, len(x_AD), extension.SOME_ROWS)
        gate_AF, up_AF, y_AD = extension.forward_and_keep(x_AD, weights, weight_A1, units)
        ctx.save_for_backward(x_AD, weight_A1, gate_AF, up_AF)
        ctx.weights, ctx.end_E, ctx.sums = weights, end_E, sums
        return y_AD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, weight_A1, gate_AF, up_AF = ctx.saved_tensors
        weights, end_E, taken = ctx.weights, ctx.end_E, ctx.sums.take()
        dy_AD = dy_AD.contiguous()
        dhidden_AF, dx_AD = torch.empty(gate_AF.shape), torch.empty(x_AD.shape)
        dgate_AF, dup_AF, dweight_A1 = torch.empty_like(gate_AF), torch.empty_like(up_AF), torch.empty(weight_A1.shape)
        hidden_AF = dhidden_AF if x_AD.dtype == torch.float32 else torch.empty_like(gate_AF)  # made where it is read
        rows = [dhidden_AF, gate_AF, up_AF, weight_A1.float().contiguous(), dgate_AF, dup_AF, hidden_AF, dweight_A1]
        jobs = [
            adding_products(dy_AD, weights.down_EDF, end_E, dhidden_AF, is_new=True),
            _gating(rows, end_E),
            adding_products(dgate_AF, weights.gate_EFD, end_E, dx_AD, is_new=True),
            adding_products(dup_AF, weights.up_EFD, end_E, dx_AD),
        ]
        if taken is not None:
            into, is_new = taken
            jobs += [
                summing(dy_AD, hidden_AF, end_E, into.down_EDF, is_new),
                summing(dgate_AF, x_AD, end_E, into.gate_EFD, is_new),
                summing(dup_AF, x_AD, end_E, into.up_EFD, is_new),
            ]
        in_turn(len(end_E), jobs)
        return dx_AD.to(x_AD.dtype), dweight_A1.to(weight_A1.dtype), None, None, None


def _gating(tensors: list[Tensor], end_E: Tensor) -> Job:
    """The job of `_gradients` for each expert's rows."""
    arrays = [as_array(tensor) for tensor in tensors]
    return Job(
        1, 2 * OPERATIONS * tensors[0].numel(), lambda first, last: _gradients(*arrays, as_array(end_E), first, last)
    )


@kernel
def _gradients(dhidden, gate, up, weight, dgate, dup, hidden, dweight, end, first, last):  # type: ignore[no-untyped-def]
    """Gradients of hidden = silu(gate) * up * weight, and hidden itself, which may lie where its own gradient does."""
    part, below = np.empty(gate.shape[1], np.float32), np.empty(gate.shape[1], np.float32)
    begin = end[first - 1] if first else 0
    for row in range(begin, end[last - 1]):
        d, g, u, w = dhidden[row], gate[row], up[row], weight[row, 0]
        dg, du, h = dgate[row], dup[row], hidden[row]
        # One result a loop: for more, the compiler does not find out that no two lie in one place, and leaves out its vectors.
        for i in range(len(g)):
            below[i] = ONE + exp(-widened(g[i]))
        for i in range(len(g)):
            part[i] = d[i] * (widened(g[i]) * (ONE / below[i])) * widened(u[i])
        dweight[row, 0] = total(part)
        for i in range(len(g)):
            s = ONE / below[i]
            dg[i] = narrowed(d[i] * w * widened(u[i]) * (s * (ONE + widened(g[i]) * (ONE - s))), dg)
        for i in range(len(g)):
            du[i] = narrowed(d[i] * w * (widened(g[i]) * (ONE / below[i])), du)
        for i in range(len(g)):
            h[i] = narrowed(widened(g[i]) / below[i] * widened(u[i]) * w, h)
