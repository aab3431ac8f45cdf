"""Expert compute on a CPU for a few rows per expert, as in decoding: as fast as the weights can be read.

Legend: A assignments sorted by expert, E experts, D model, F expert hidden.

Matrix libraries are made for many rows: with four rows per expert they read weights at a fifth of the memory's speed. Here
each weight is loaded once and used for all rows of its expert, four at a time, in vector registers. fp32 and no gradients.

Measured (2 threads of an AVX512 core pair, D=F=512, E=32, top-4, fp32 weights of several layers in turn, forward in ms):

    tokens (rows per expert)    1      4      16 (2)   32 (4)   64 (8)   128 (16)   256 (32)
    F.grouped_mm                2.3    5.5    17       18       18       17         24
    this                        0.7    2.3    5.3      7.0      10       10         20
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from trinity.experts.backend import LayerWeights

CHUNKS_PER_THREAD = 4  # a thread that is held up leaves its share to the others
ZERO, ONE = np.float32(0), np.float32(1)


def few_rows(x_AD: Tensor, weight_A1: Tensor, end_E: Tensor, weights: LayerWeights) -> Tensor:
    """Rows sorted by expert, expert e up to `end_E[e]` -> y_AD. float32, on the CPU, down stored transposed; no gradients."""
    h_AF, y_AD = torch.empty(len(x_AD), weights.gate_EFD.shape[1]), torch.empty_like(x_AD)
    stacks = (weights.gate_EFD.detach(), weights.up_EFD.detach(), weights.down_EFD.detach().mT)
    arrays = [t.numpy() for t in (x_AD, weight_A1.view(-1), end_E, *stacks, h_AF, y_AD)]
    _in_threads(torch.get_num_threads(), len(end_E), lambda first, last: _experts(*arrays, first, last))  # type: ignore[call-arg]
    return y_AD


def _in_threads(num_threads: int, num: int, run: Any) -> None:
    """run(first, last) over [0, num) in chunks; the threads take the next chunk until there is none."""
    size = max(1, -(-num // (num_threads * CHUNKS_PER_THREAD)))
    starts = itertools.count(0, size)

    def work() -> None:
        while (first := next(starts)) < num:
            run(first, min(num, first + size))

    helpers = [_pool(num_threads - 1).submit(work) for _ in range(num_threads - 1)]
    work()
    for helper in helpers:
        helper.result()


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="trinity-experts")


@numba.njit(nogil=True, cache=True)
def _experts(x, weight, end, gate, up, down, h, y, first, last):  # type: ignore[no-untyped-def]
    for e in range(first, last):
        for lo in range(end[e - 1] if e else 0, end[e], 4):
            n = min(4, end[e] - lo)
            _hidden(x, weight, gate[e], up[e], h, lo, n)
            _project(h, down[e], y, lo, n)


@numba.njit(nogil=True, cache=True, fastmath=True)
def _hidden(x, weight, gate, up, h, lo, n):  # type: ignore[no-untyped-def]
    """h[r] = silu(gate x[r]) * (up x[r]) * weight[r] for the 1 to 4 rows from lo; rows that are missing repeat the last."""
    last = lo + n - 1
    x0, x1, x2, x3 = x[lo], x[min(lo + 1, last)], x[min(lo + 2, last)], x[last]
    for f in range(len(gate)):
        g0, g1, g2, g3, u0, u1, u2, u3 = _dots(gate[f], up[f], x0, x1, x2, x3, n)
        h[lo, f] = g0 / (ONE + math.exp(-g0)) * u0 * weight[lo]
        if n > 1:
            h[lo + 1, f] = g1 / (ONE + math.exp(-g1)) * u1 * weight[lo + 1]
        if n > 2:
            h[lo + 2, f] = g2 / (ONE + math.exp(-g2)) * u2 * weight[lo + 2]
        if n > 3:
            h[lo + 3, f] = g3 / (ONE + math.exp(-g3)) * u3 * weight[lo + 3]


@numba.njit(nogil=True, cache=True, fastmath=True)
def _project(h, down, y, lo, n):  # type: ignore[no-untyped-def]
    """y[r] = down h[r] for the 1 to 4 rows from lo; down is [D, F]. Two outputs at a time, from the two halves of D: memory is
    read as two streams (2.5 times as fast as neighbouring rows), and if D is odd the last one is computed twice."""
    last, half = lo + n - 1, (len(down) + 1) // 2
    h0, h1, h2, h3 = h[lo], h[min(lo + 1, last)], h[min(lo + 2, last)], h[last]
    for d in range(half):
        e = min(d + half, len(down) - 1)
        a0, a1, a2, a3, b0, b1, b2, b3 = _dots(down[d], down[e], h0, h1, h2, h3, n)
        y[lo, d], y[lo, e] = a0, b0
        if n > 1:
            y[lo + 1, d], y[lo + 1, e] = a1, b1
        if n > 2:
            y[lo + 2, d], y[lo + 2, e] = a2, b2
        if n > 3:
            y[lo + 3, d], y[lo + 3, e] = a3, b3


@numba.njit(nogil=True, cache=True, fastmath=True)
def _dots(v, w, x0, x1, x2, x3, n):  # type: ignore[no-untyped-def]
    """Of two weight rows with up to four rows: each weight is read once, and eight sums hide the latency of adding."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = ZERO
    if n == 1:
        for i in range(len(v)):
            a0 += v[i] * x0[i]
            b0 += w[i] * x0[i]
    elif n == 2:
        for i in range(len(v)):
            p, q = v[i], w[i]
            a0 += p * x0[i]
            a1 += p * x1[i]
            b0 += q * x0[i]
            b1 += q * x1[i]
    else:
        for i in range(len(v)):
            p, q = v[i], w[i]
            a0 += p * x0[i]
            a1 += p * x1[i]
            a2 += p * x2[i]
            a3 += p * x3[i]
            b0 += q * x0[i]
            b1 += q * x1[i]
            b2 += q * x2[i]
            b3 += q * x3[i]
    return a0, a1, a2, a3, b0, b1, b2, b3
