"""Rows through feed-forwards, gate, up, SwiGLU and down in one pass over the weights: for inference on a CPU.

Legend: A rows sorted by expert, E experts (1 for a dense layer), D model, F hidden, N outputs; U units: some rows of an expert.
Decisions: the bits are those of gemm.py and elementwise.py one after the other. Training takes these, because
it keeps what lies between. Here threads are handed work once for a layer instead of four times, and what lies between stays
in a core's cache: with few rows that is as long as the arithmetic. A weight row of gate and one of up are read side by side.
The extension computes what it takes (`extension.takes`); fp32 goes by numba without it.
"""

import numpy as np
import torch
from torch import Tensor

from trinity.ops import extension
from trinity.ops.batch_invariant.compiled import kernel
from trinity.ops.batch_invariant.elementwise import ONE, exp
from trinity.ops.batch_invariant.gemm import PANEL, addresses
from trinity.ops.batch_invariant.simd import COLUMNS, ROWS, as_array, dots
from trinity.ops.batch_invariant.threads import in_threads

MOST_ROWS = 64  # of a unit: with more, rows and hidden rows would leave the cache


def feed_forward(
    x_AD: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_ENF: Tensor,
    end_E: Tensor,
    weight_A: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """-> y_AN in x's type, or in `dtype`, rounded once: rows up to `end_E[0]` through expert 0, from there up to `end_E[1]`
    through expert 1 and so on, their hidden rows times their weight. For what `exact.at_once` says yes to."""
    (num, dim), (_, n, f) = x_AD.shape, down_ENF.shape
    y_AN = torch.empty(num, n)
    if extension.takes(x_AD.dtype):
        matrices, rows = [extension.Matrices(w.contiguous()) for w in (gate_EFD, up_EFD, down_ENF)], x_AD.contiguous()
        kind, units = extension.KINDS[x_AD.dtype], units_of(end_E, num)
        extension.feed_forward(kind, extension.Rows(rows), matrices, weight_A, units, y_AN)
        return y_AN.to(dtype or x_AD.dtype)
    weight_A = torch.ones(num) if weight_A is None else weight_A
    arrays = [as_array(t.contiguous()) for t in (x_AD, gate_EFD, up_EFD, down_ENF, weight_A.float(), y_AN)]
    expert_U, first_U, last_U = _split(as_array(end_E), num)
    operations = 2 * num * f * (2 * dim + n)
    in_threads(
        len(expert_U),
        operations,
        lambda first, last: _units(*arrays, expert_U, first_U, last_U, first, last),
    )
    return y_AN if dtype is None else y_AN.to(dtype)


def units_of(end_E: Tensor, num: int, most: int = MOST_ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Expert, first row and end of each unit of up to `most`, for `num` rows."""
    expert_U, first_U, last_U = (torch.from_numpy(part).long() for part in _split(as_array(end_E), num, most))
    return expert_U, first_U, last_U


def _split(end_E: np.ndarray, num: int, most: int = MOST_ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """expert_U, first_U, last_U: each expert's rows in runs, of which every thread gets some."""
    share = -(-num // torch.get_num_threads())
    size = min(most, -(-share // ROWS) * ROWS)
    begin_E = np.concatenate((np.zeros(1, end_E.dtype), end_E[:-1]))
    runs_E = -(-(end_E - begin_E) // size)
    expert_U = np.repeat(np.arange(len(end_E)), runs_E)
    run_U = np.arange(len(expert_U)) - np.repeat(np.cumsum(runs_E) - runs_E, runs_E)
    first_U = begin_E[expert_U] + run_U * size
    return expert_U, first_U, np.minimum(first_U + size, end_E[expert_U])


@kernel
def _units(x, gate, up, down, weight, y, expert, begin, end, first, last):  # type: ignore[no-untyped-def]
    out = np.empty(ROWS * COLUMNS, np.float32)
    dim, f, n = x.shape[1], gate.shape[1], down.shape[1]
    half = (n + 1) // 2
    for u in range(first, last):
        e, lo, num = expert[u], begin[u], end[u] - begin[u]
        hidden, other = np.empty((num, f), np.float32), np.empty((num, f), np.float32)
        gate_at, up_at = gate.ctypes.data + 4 * dim * f * e, up.ctypes.data + 4 * dim * f * e
        for c0 in range(0, f, PANEL):
            for r in range(0, num, ROWS):
                rows = min(ROWS, num - r)
                xs = addresses(x.ctypes.data + 4 * dim * (lo + r), 4 * dim, rows - 1)
                for c in range(c0, min(c0 + PANEL, f)):
                    dots(xs, (gate_at + 4 * dim * c, up_at + 4 * dim * c), dim, out.ctypes.data, gate)
                    for i in range(rows):
                        hidden[r + i, c], other[r + i, c] = out[i], out[ROWS + i]
        for r in range(num):
            w = weight[lo + r]
            for c in range(f):
                hidden[r, c] = hidden[r, c] / (ONE + exp(-hidden[r, c])) * other[r, c] * w
        at = down.ctypes.data + 4 * f * n * e
        for c0 in range(0, half, PANEL):
            for r in range(0, num, ROWS):
                rows = min(ROWS, num - r)
                hs = addresses(hidden.ctypes.data + 4 * f * r, 4 * f, rows - 1)
                for c in range(c0, min(c0 + PANEL, half)):
                    d = min(c + half, n - 1)
                    dots(hs, (at + 4 * f * c, at + 4 * f * d), f, out.ctypes.data, down)
                    for i in range(rows):
                        y[lo + r + i, c], y[lo + r + i, d] = out[i], out[ROWS + i]
