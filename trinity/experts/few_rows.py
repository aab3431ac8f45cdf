"""Expert compute on a CPU for a few rows per expert, as in decoding: as fast as the weights can be read.

Legend: A assignments sorted by expert, E experts, D model, F expert hidden.

Matrix libraries are made for many rows: with four rows per expert they read weights at a fifth of the memory's speed. Here
each weight is loaded once and used for all rows of its expert, four at a time, in vector registers. fp32 and no gradients.

Measured (2 threads of an AVX512 core pair, D=F=512, E=32, top-4, fp32 weights of several layers in turn, forward in ms):

    tokens (rows per expert)    1    4     16 (2)   32 (4)   64 (8)   128 (16)   256 (32)
    F.grouped_mm
    this
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
ONE = np.float32(1)


def few_rows(x_AD: Tensor, weight_A1: Tensor, end_E: Tensor, weights: LayerWeights) -> Tensor:
    """Rows sorted by expert, expert e up to `end_E[e]` -> y_AD. All float32, contiguous, on the CPU; no gradients."""
    h_AF = torch.empty(len(x_AD), weights.gate_EFD.shape[1])
    y_AD = torch.zeros_like(x_AD)
    arrays = [t.numpy() for t in (x_AD, weight_A1.view(-1), end_E, *(w.detach() for w in weights), h_AF, y_AD)]
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
        lo, hi = end[e - 1] if e else 0, end[e]
        if lo < hi:
            _hidden(x, weight, gate[e], up[e], h, lo, hi)
            _project(h, down[e], y, lo, hi)


@numba.njit(nogil=True, cache=True, fastmath=True)
def _hidden(x, weight, gate, up, h, lo, hi):  # type: ignore[no-untyped-def]
    """h[r] = silu(gate x[r]) * (up x[r]) * weight[r] for rows lo to hi, four at a time; a missing one repeats the last."""
    num_f, num_d = gate.shape
    for r in range(lo, hi, 4):
        n, last = min(4, hi - r), hi - 1
        x0, x1, x2, x3 = x[r], x[min(r + 1, last)], x[min(r + 2, last)], x[min(r + 3, last)]
        for f in range(num_f):
            gate_D, up_D = gate[f], up[f]
            g0 = g1 = g2 = g3 = u0 = u1 = u2 = u3 = np.float32(0)
            if n == 1:
                for d in range(num_d):
                    g0 += gate_D[d] * x0[d]
                    u0 += up_D[d] * x0[d]
            elif n == 2:
                for d in range(num_d):
                    g0 += gate_D[d] * x0[d]
                    g1 += gate_D[d] * x1[d]
                    u0 += up_D[d] * x0[d]
                    u1 += up_D[d] * x1[d]
            else:
                for d in range(num_d):
                    g, u = gate_D[d], up_D[d]
                    g0 += g * x0[d]
                    g1 += g * x1[d]
                    g2 += g * x2[d]
                    g3 += g * x3[d]
                    u0 += u * x0[d]
                    u1 += u * x1[d]
                    u2 += u * x2[d]
                    u3 += u * x3[d]
            h[r, f] = g0 / (ONE + math.exp(-g0)) * u0 * weight[r]
            if n > 1:
                h[r + 1, f] = g1 / (ONE + math.exp(-g1)) * u1 * weight[r + 1]
            if n > 2:
                h[r + 2, f] = g2 / (ONE + math.exp(-g2)) * u2 * weight[r + 2]
            if n > 3:
                h[r + 3, f] = g3 / (ONE + math.exp(-g3)) * u3 * weight[r + 3]


@numba.njit(nogil=True, cache=True, fastmath=True)
def _project(h, down, y, lo, hi):  # type: ignore[no-untyped-def]
    """y[r] += h[r] down for rows lo to hi, four rows of `down` at a time."""
    num_f, num_d = down.shape
    whole = num_f - num_f % 4
    for f in range(0, whole, 4):
        w0, w1, w2, w3 = down[f], down[f + 1], down[f + 2], down[f + 3]
        for r in range(lo, hi):
            h0, h1, h2, h3, y_D = h[r, f], h[r, f + 1], h[r, f + 2], h[r, f + 3], y[r]
            for d in range(num_d):
                y_D[d] += h0 * w0[d] + h1 * w1[d] + h2 * w2[d] + h3 * w3[d]
    for f in range(whole, num_f):
        for r in range(lo, hi):
            for d in range(num_d):
                y[r, d] += h[r, f] * down[f, d]
