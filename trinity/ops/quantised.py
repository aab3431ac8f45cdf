"""Rows times matrices of int8, and whole feed-forwards of them, on a CPU. Sums are whole numbers: no company changes them.

Legend: A rows sorted by expert, E experts (1 for a dense layer), D model, F hidden, K inner dimension, N outputs.
The format: a matrix [N, K] is int8, -127 to 127, with one float32 scale a row; a row of x is rounded the same way when it is
multiplied, hidden rows as well. With s the scale, amax / 127: q = round(w * (127 / amax)), halves to even;
y = float32(sum of q_w q_x) * s_w * s_x, each step rounded to float32. A row of numbers below TINY is zeros; one with a number
that is not finite is zeros with a scale of NaN, so that whoever looks for NaN finds it.
Here is the format's definition, which numba compiles; the extension (extension.py) has the same bits, faster.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from trinity.errors import InvalidRequest
from trinity.ops import extension
from trinity.ops.batch_invariant.compiled import kernel
from trinity.ops.batch_invariant.elementwise import gated
from trinity.ops.batch_invariant.fused_mlp import units_of
from trinity.ops.batch_invariant.simd import as_array
from trinity.ops.batch_invariant.threads import in_threads, in_turn

MOST, TINY = np.float32(127), np.float32(1e-30)
MOST_INNER = 1 << 16  # of 127 * 127 that an int32 holds, and of 255 * 127, as the extension adds them up


class Int8(NamedTuple):
    """Matrices of int8: q [..., N, K], scale [..., N] in float32, total [..., N], the sum of each row of q, in int32.

    Plain tensors; indexing the first dimension of all three gives an expert. `total` follows from q (see `with_totals`).
    """

    q: Tensor
    scale: Tensor
    total: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self)


def quantised(w: Tensor) -> Int8:
    """Matrices [..., N, K] in this format. Raises InvalidRequest if K is too large for its sums."""
    if w.shape[-1] > MOST_INNER:
        raise InvalidRequest(f"int8 matrices of {w.shape[-1]} columns: sums of at most {MOST_INNER} products are exact")
    q, scale = torch.empty(w.shape, dtype=torch.int8), torch.empty(w.shape[:-1])
    _rounded_into(w.detach().flatten(0, -2), q.view(-1, w.shape[-1]), scale.view(-1))
    return with_totals(q, scale)


def with_totals(q: Tensor, scale: Tensor) -> Int8:
    """Matrices whose int8 and scales are known, as from a checkpoint."""
    return Int8(q, scale.float(), q.sum(-1, dtype=torch.int32))


def dequantised(w: Int8) -> Tensor:
    """The float32 matrices that they stand for."""
    return w.q.float() * w.scale[..., None]


def multiply(x_AK: Tensor, w: Int8, end_E: Tensor) -> Tensor:
    """-> y_AN in float32: rows up to `end_E[0]` times the transpose of w[0], from there up to `end_E[1]` of w[1] and so on.

    x: float32 or bfloat16. No gradients."""
    (num, k), n = x_AK.shape, w.q.shape[1]
    y_AN = torch.empty(num, n)
    if extension.lib is not None:
        rows = extension.rounded(extension.INT8, x_AK)
        in_turn(len(w.q), [extension.multiplying(extension.INT8, rows, extension.Matrices(*w), end_E, y_AN)])
        return y_AN
    q_AK, scale_A = torch.empty(num, k, dtype=torch.int8), torch.empty(num)
    _rounded_into(x_AK, q_AK, scale_A)
    arrays = [as_array(t.contiguous()) for t in (q_AK, scale_A, w.q, w.scale, end_E, y_AN)]
    in_threads(len(w.q) * n, 2 * num * n * k, lambda first, last: _products(*arrays, first, last))
    return y_AN


def feed_forward(
    x_AD: Tensor, gate: Int8, up: Int8, down: Int8, end_E: Tensor, weight_A: Tensor | None = None
) -> Tensor:
    """-> y_AN in float32: rows up to `end_E[0]` through expert 0, from there up to `end_E[1]` through expert 1 and so on, their
    hidden rows times their weight. gate and up: [E, F, D]; down: [E, N, F]. No gradients."""
    if extension.lib is not None:
        y_AN, rows = torch.empty(len(x_AD), down.q.shape[1]), extension.rounded(extension.INT8, x_AD)
        matrices, units = [extension.Matrices(*w) for w in (gate, up, down)], units_of(end_E, len(x_AD))
        extension.feed_forward(extension.INT8, rows, matrices, weight_A, units, y_AN)
        return y_AN
    weight = None if weight_A is None else weight_A.float().unsqueeze(1)
    hidden_AF = gated(multiply(x_AD, gate, end_E), multiply(x_AD, up, end_E), weight)
    return multiply(hidden_AF, down, end_E)


def _rounded_into(x_RK: Tensor, q_RK: Tensor, scale_R: Tensor) -> None:
    arrays: Sequence[np.ndarray] = [as_array(t) for t in (x_RK.float().contiguous(), q_RK, scale_R)]
    in_threads(len(x_RK), 8 * x_RK.numel(), lambda first, last: _round(*arrays, first, last))


@numba.njit(inline="always")
def _largest(x):  # type: ignore[no-untyped-def]
    """The largest absolute value of a row; NaN or infinity if there is one."""
    bits, most = x.view(np.int32), np.int32(0)
    for i in range(len(bits)):  # of floats without a sign, the order is that of their bits, NaN last
        most = max(most, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    return np.full(1, most, np.int32).view(np.float32)[0]


@kernel
def _round(x, q, scale, first, last):  # type: ignore[no-untyped-def]
    for row in range(first, last):
        amax = _largest(x[row])
        scale[row] = amax / MOST if amax < np.inf else np.float32(np.nan)
        factor = MOST / amax if TINY <= amax < np.inf else np.float32(0)
        source, out = x[row], q[row]
        for i in range(len(source)):
            out[i] = np.int8(np.rint(source[i] * factor)) if factor else np.int8(0)


@kernel
def _products(x, x_scale, w, w_scale, end, y, first, last):  # type: ignore[no-untyped-def]
    """Units [first, last): unit u is output u % N of matrix u // N, for all rows of that matrix."""
    n, k = w.shape[1:]
    for u in range(first, last):
        e, c = u // n, u % n
        weights, scale = w[e, c], w_scale[e, c]
        for r in range(end[e - 1] if e else 0, end[e]):
            row, total = x[r], np.int32(0)
            for i in range(k):
                total += np.int32(row[i]) * np.int32(weights[i])
            y[r, c] = np.float32(total) * scale * x_scale[r]
