"""RMSNorm's gradients in one pass over memory, on a CPU: where autograd's operations one by one read and write twenty tensors.

Legend: R rows, D their width, C chunks of rows.
Decisions: the forward are the operations of `RMSNorm` one after the other, with their bits; it keeps its input and a number
for each row. The gain's gradient is summed up in chunks of so many rows, whatever the number of threads, and then over these.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trinity.ops.batch_invariant.compiled import kernel
from trinity.ops.batch_invariant.elementwise import ONE, total
from trinity.ops.batch_invariant.simd import as_array, narrowed, widened
from trinity.ops.batch_invariant.threads import in_threads

CHUNK = 1 << 15  # numbers


def rms_norm(x: Tensor, gain_D: Tensor, eps: float, rounds_first: bool) -> Tensor:
    """`RMSNorm` of x [..., D], float32 or bfloat16 as the gain is. Differentiable in both."""
    y: Tensor = _RMSNorm.apply(x, gain_D, eps, rounds_first)
    return y


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float, rounds_first: bool) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, gain_D, scale)
        x32 = x32 * scale
        return gain_D * x32.to(x.dtype) if rounds_first else (gain_D * x32).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, gain_D, scale = ctx.saved_tensors
        width = x.shape[-1]
        rows = [t.contiguous().view(-1, width) for t in (dy, x)]
        dx, step = torch.empty_like(rows[1]), max(1, CHUNK // width)
        num = -(-len(dx) // step)
        dgain_CD = torch.empty(num, width)
        arrays = [as_array(t) for t in (*rows, gain_D.contiguous(), scale.view(-1), dx, dgain_CD)]
        in_threads(num, 16 * x.numel(), lambda first, last: _gradients(*arrays, step, first, last))
        return dx.view(x.shape), dgain_CD.sum(0).to(gain_D.dtype), None, None


@kernel
def _gradients(dy, x, gain, scale, dx, dgain, step, first, last):  # type: ignore[no-untyped-def]
    """d gain = sum of dy n and dx = s (dy gain - n mean(dy gain n)), with n = x s, s = 1 / rms(x)."""
    width = x.shape[1]
    through, product, share = np.empty(width, np.float32), np.empty(width, np.float32), ONE / np.float32(width)
    for chunk in range(first, last):
        sums = dgain[chunk]
        for i in range(width):
            sums[i] = 0
        for row in range(chunk * step, min(len(x), (chunk + 1) * step)):
            d, values, to, s = dy[row], x[row], dx[row], scale[row]
            for i in range(width):
                product[i] = widened(d[i]) * (widened(values[i]) * s)
            for i in range(width):
                sums[i] += product[i]
            for i in range(width):
                product[i] *= widened(gain[i])
            for i in range(width):
                through[i] = widened(d[i]) * widened(gain[i])
            mean = total(product) * share
            for i in range(width):
                to[i] = narrowed(s * (through[i] - widened(values[i]) * s * mean), to)
