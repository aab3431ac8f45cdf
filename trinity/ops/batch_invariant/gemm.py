"""Rows times matrices, on a CPU, where a row's result does not depend on how many rows there are or where it stands.

Legend: A rows sorted by matrix, T rows of one matrix, E matrices, K inner dimension, N outputs.
Decisions: one kernel for any number of rows (simd.py has the order of its sums); the weights are used as
they are stored, rows of K; gradients are what is quickest (outer.py): nobody needs their bits to be independent of company.
It is no slower than the library: what it costs is in docs/benchmarks.md, "Same bits in any company".
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trinity.ops import extension
from trinity.ops.batch_invariant import threads
from trinity.ops.batch_invariant.compiled import kernel
from trinity.ops.batch_invariant.outer import products, sums
from trinity.ops.batch_invariant.simd import COLUMNS, ROWS, as_array, dots_of, flushing, restore
from trinity.ops.batch_invariant.threads import Job, in_turn

MANY = 64  # rows of a matrix, for which tiles are larger and sums are rounded where they are made
PANEL = 32  # pairs of weight rows that stay in a core's cache while all rows pass by


def linear(x: Tensor, w_NK: Tensor) -> Tensor:
    """x [..., K] times the transpose of w -> [..., N]. Differentiable in both."""
    x_TK = x.flatten(0, -2)
    end_E = torch.tensor([len(x_TK)])
    y: Tensor = grouped(x_TK, w_NK.unsqueeze(0), end_E).unflatten(0, x.shape[:-1])
    return y


def grouped(x_AK: Tensor, w_ENK: Tensor, end_E: Tensor) -> Tensor:
    """-> y_AN: rows up to `end_E[0]` times the transpose of w[0], from there up to `end_E[1]` of w[1] and so on.

    float32 or bfloat16, on the CPU; the matrices contiguous, or they are copied. Differentiable in x and w.
    """
    y_AN: Tensor = _Grouped.apply(x_AK, w_ENK, end_E)
    return y_AN


class _Grouped(Function):
    @staticmethod
    def forward(ctx: Any, x_AK: Tensor, w_ENK: Tensor, end_E: Tensor) -> Tensor:
        x_AK, w_ENK = x_AK.contiguous(), w_ENK.contiguous()
        ctx.save_for_backward(x_AK, w_ENK)
        ctx.end_E = end_E
        return rounded_product(x_AK, w_ENK, end_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_AN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x_AK, w_ENK), dy_AN = ctx.saved_tensors, dy_AN.contiguous()
        dx_AK = products(dy_AN, w_ENK, ctx.end_E) if ctx.needs_input_grad[0] else None
        return dx_AK, sums(dy_AN, x_AK, ctx.end_E) if ctx.needs_input_grad[1] else None, None


def multiply(x_AK: Tensor, w_ENK: Tensor, end_E: Tensor) -> Tensor:
    """`grouped` without gradients, for contiguous tensors; y in float32."""
    y_AN = torch.empty(len(x_AK), w_ENK.shape[1])
    x_AK = x_AK if x_AK.dtype == w_ENK.dtype else x_AK.float()
    in_turn(len(w_ENK), [multiplying(x_AK, w_ENK, end_E, y_AN)])
    return y_AN


def rounded_product(x_AK: Tensor, w_ENK: Tensor, end_E: Tensor) -> Tensor:
    """`multiply` with y in x's type."""
    if len(x_AK) < MANY * len(w_ENK) or not w_ENK.numel() or not extension.has_outer(x_AK, w_ENK):
        return multiply(x_AK, w_ENK, end_E).to(x_AK.dtype)
    y_AN = x_AK.new_empty(len(x_AK), w_ENK.shape[1])
    in_turn(len(w_ENK), [extension.multiplying_rounded(x_AK, w_ENK, end_E, y_AN)])
    return y_AN


def multiplying(x_AK: Tensor, w_ENK: Tensor, end_E: Tensor, y_AN: Tensor) -> Job:
    """`multiply` into y, as a job. x is float32, or bfloat16 as w is."""
    if extension.takes(x_AK.dtype) and x_AK.dtype == w_ENK.dtype:
        rows, matrices = extension.Rows(x_AK), extension.Matrices(w_ENK)
        return extension.multiplying(extension.KINDS[x_AK.dtype], rows, matrices, end_E, y_AN)
    arrays, (_, n, k) = [as_array(t) for t in (x_AK, w_ENK, end_E, y_AN)], w_ENK.shape
    return Job(_num_panels(n), 2 * len(x_AK) * n * k, lambda first, last: _units(*arrays, first, last))


def side_by_side(x_TK: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`linear` with each weight [N, K], one result beside the other -> y [T, sum of N] in x's type; no gradients.

    Threads are handed work once for all.
    """
    sizes, x_TK = [len(w) for w in weights], x_TK.contiguous()
    y, end_1 = torch.empty(len(x_TK), sum(sizes)), torch.tensor([len(x_TK)])
    parts = zip(weights, y.split(sizes, 1), strict=True)
    threads.side_by_side([multiplying(x_TK, w.detach().contiguous().unsqueeze(0), end_1, part) for w, part in parts])
    return y.to(x_TK.dtype)


def _num_panels(n: int) -> int:
    pairs = -(-n // COLUMNS)
    return -(-pairs // PANEL)


@kernel
def _units(x, w, end, y, first, last):  # type: ignore[no-untyped-def]
    """Units [first, last): unit u is panel u % P of matrix u // P, for all rows of that matrix.

    The two weight rows of a pair are N / 2 apart: memory is then read as two streams, 2.5 times as fast as one. If N is odd
    the last one is computed twice.
    """
    out, before = np.empty(ROWS * COLUMNS, np.float32), flushing(x)
    n, k = w.shape[1:]
    pairs = (n + COLUMNS - 1) // COLUMNS
    panels = (pairs + PANEL - 1) // PANEL
    for u in range(first, last):
        e, c0 = u // panels, u % panels * PANEL
        lo, hi = end[e - 1] if e else 0, end[e]
        for r in range(lo, hi, ROWS):
            rows = min(ROWS, hi - r)
            xs = addresses(x.ctypes.data + x.itemsize * k * r, x.itemsize * k, rows - 1)
            for c in range(c0, min(c0 + PANEL, pairs)):
                d = min(c + pairs, n - 1)
                at, length = w.ctypes.data + w.itemsize * k * n * e, w.itemsize * k
                dots_of(xs, (at + length * c, at + length * d), k, out.ctypes.data, w, x)
                for i in range(rows):
                    y[r + i, c], y[r + i, d] = out[i], out[ROWS + i]
    restore(x, before)


@numba.njit(inline="always")
def addresses(first, stride, last):  # type: ignore[no-untyped-def]
    """Addresses of ROWS rows in turn; those past the last repeat it."""
    return first, first + stride * min(1, last), first + stride * min(2, last), first + stride * min(3, last)
