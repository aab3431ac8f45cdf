"""Softmax attention, on a CPU, where a query's result depends on the query and the keys that it sees, and on nothing else.

Legend: T queries, H query heads, G key-value heads, d head dim, P slots of keys, N slot numbers.
Decisions: training, prefill and decoding are one function, told which keys each query sees; keys are read where they lie,
without gathering or padding; scores of a query are held in full, so there are no blocks whose borders would matter. Four
lines (query, head) of a key-value head are computed together: a key that one of them does not see has weight 0 there.
"""

from typing import Any, Protocol

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trinity.ops.batch_invariant.compiled import kernel
from trinity.ops.batch_invariant.elementwise import exp, total
from trinity.ops.batch_invariant.simd import COLUMNS, LANES, ROWS, as_array, dots, fma, mixes, widened
from trinity.ops.batch_invariant.threads import in_threads


def attention(q_THd: Tensor, k_PGd: Tensor, v_PGd: Tensor, slot_N: Tensor, first_T: Tensor, end_T: Tensor) -> Tensor:
    """-> o_THd, scale d**-0.5. Query t sees the keys at slot_N[first_T[t]:end_T[t]], in this order; at least one. No gradients.

    float32 or bfloat16; slot_N, first_T, end_T int64. Query head h uses key head h // (H / G). Neighbouring queries had better
    see neighbouring keys: all that lie between the keys of four lines are read.
    """
    return _attended(q_THd, k_PGd, v_PGd, slot_N, first_T, end_T)[0]


def _attended(
    q_THd: Tensor, k_PGd: Tensor, v_PGd: Tensor, slot_N: Tensor, first_T: Tensor, end_T: Tensor
) -> tuple[Tensor, Tensor]:
    """-> o_THd, and lse_TH: the logarithm of the sum of a query's exponentiated scores, float32."""
    out_THd, lse_TH = torch.empty(q_THd.shape), torch.empty(q_THd.shape[:2])
    arrays = [as_array(t.contiguous()) for t in (q_THd.float(), k_PGd, v_PGd, slot_N, first_T, end_T, out_THd, lse_TH)]
    num, heads, dim = q_THd.shape
    lines = num * (heads // k_PGd.shape[1])  # of one key-value head
    tiles = k_PGd.shape[1] * -(-lines // ROWS)
    operations = 4 * heads * dim * int((end_T - first_T).sum())
    in_threads(tiles, operations, lambda first, last: _tiles(*arrays, first, last))
    return out_THd.to(q_THd.dtype), lse_TH


class Gradients(Protocol):
    """Gradients of attention by q, k and v, of a result that is there: somebody's that computes the same."""

    def __call__(
        self, do_THd: Tensor, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, o_THd: Tensor, lse_TH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def differentiable(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, first_T: Tensor, end_T: Tensor, gradients: Gradients
) -> Tensor:
    """`attention` among the queries' own keys, with these gradients."""
    out_THd: Tensor = _Attention.apply(q_THd, k_TGd, v_TGd, first_T, end_T, gradients)
    return out_THd


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, first_T: Tensor, end_T: Tensor, gradients: Gradients
    ) -> Tensor:
        o_THd, lse_TH = _attended(q, k, v, torch.arange(len(k)), first_T, end_T)
        ctx.save_for_backward(q, k, v, o_THd, lse_TH)
        ctx.gradients = gradients
        return o_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THd: Tensor) -> Any:
        return *ctx.gradients(do_THd, *ctx.saved_tensors), None, None, None


@kernel
def _tiles(q, k, v, slot, first_of, end_of, out, lse, first, last):  # type: ignore[no-untyped-def]
    """Tiles [first, last): tile u is four lines of key-value head u // tiles; line i is head i % R of query i // R."""
    groups = k.shape[1]
    share = q.shape[1] // groups
    lines = len(q) * share
    tiles = (lines + ROWS - 1) // ROWS
    weights = np.empty((ROWS, 0), np.float32)
    mixed = np.empty((ROWS, LANES), np.float32)
    for u in range(first, last):
        group, line = u // tiles, u % tiles * ROWS
        rows = min(ROWS, lines - line)
        begin, end = _span(first_of, end_of, line // share, (line + rows - 1) // share)
        if end - begin > weights.shape[1]:
            weights = np.empty((ROWS, 2 * (end - begin)), np.float32)
        _score(q, k, slot, group, line, rows, begin, end, weights)
        for i in range(ROWS):
            query, head = (line + min(i, rows - 1)) // share, group * share + (line + min(i, rows - 1)) % share
            seen = first_of[query] - begin, end_of[query] - begin
            lse[query, head] = _softmax(weights[i], seen[0], seen[1], end - begin)
        _mix(v, slot, group, line, rows, begin, end, weights, mixed, out)


@kernel
def _span(first_of, end_of, query, last):  # type: ignore[no-untyped-def]
    begin, end = first_of[query], end_of[query]
    for other in range(query + 1, last + 1):
        begin, end = min(begin, first_of[other]), max(end, end_of[other])
    return begin, end


@kernel
def _score(q, k, slot, group, line, rows, begin, end, weights):  # type: ignore[no-untyped-def]
    """weights[i, j] = q . k * d**-0.5 for line + i and the j-th key from begin."""
    groups, dim = k.shape[1:]
    share, base, scale = q.shape[1] // groups, k.ctypes.data, np.float32(1 / np.sqrt(np.float64(dim)))
    out, length = np.empty(ROWS * COLUMNS, np.float32), k.itemsize * dim
    xs = (
        _query(q, line, share, group),
        _query(q, line + min(1, rows - 1), share, group),
        _query(q, line + min(2, rows - 1), share, group),
        _query(q, line + rows - 1, share, group),
    )
    for j in range(begin, end, COLUMNS):
        two = min(j + 1, end - 1)
        ws = base + length * (slot[j] * groups + group), base + length * (slot[two] * groups + group)
        dots(xs, ws, dim, out.ctypes.data, k)
        for i in range(ROWS):
            weights[i, j - begin], weights[i, two - begin] = out[i] * scale, out[ROWS * (two - j) + i] * scale


@numba.njit(inline="always")
def _query(q, line, share, group):  # type: ignore[no-untyped-def]
    heads, dim = q.shape[1:]
    return q.ctypes.data + 4 * dim * (line // share * heads + group * share + line % share)


@kernel
def _softmax(weights, begin, end, num):  # type: ignore[no-untyped-def]
    """Scores become probabilities from begin to end, and 0 around; -> the logarithm of the sum of their exponentials."""
    seen = weights[begin:end]
    highest = seen[0]
    for j in range(len(seen)):
        highest = seen[j] if seen[j] > highest else highest
    for j in range(len(seen)):
        seen[j] = exp(seen[j] - highest)
    sum_of_all = total(seen)
    for j in range(len(seen)):
        seen[j] /= sum_of_all
    weights[:begin] = 0
    weights[end:num] = 0
    return highest + np.float32(np.log(sum_of_all))


@kernel
def _mix(v, slot, group, line, rows, begin, end, weights, mixed, out):  # type: ignore[no-untyped-def]
    groups, dim = v.shape[1:]
    share, stride, whole = out.shape[1] // groups, groups * dim, dim // LANES * LANES
    base, w, m = v.ctypes.data + v.itemsize * dim * group, weights.ctypes.data, mixed.ctypes.data
    ps = w, w + weights.strides[0], w + 2 * weights.strides[0], w + 3 * weights.strides[0]
    outs = m, m + 4 * LANES, m + 8 * LANES, m + 12 * LANES
    for at in range(0, whole, LANES):
        mixes(ps, slot.ctypes.data + 8 * begin, base + v.itemsize * at, stride, end - begin, outs, v)
        for i in range(rows):
            head = out[(line + i) // share, group * share + (line + i) % share]
            for lane in range(LANES):
                head[at + lane] = mixed[i, lane]
    for i in range(rows):
        head = out[(line + i) // share, group * share + (line + i) % share]
        for at in range(whole, dim):
            total = np.float32(0)
            for j in range(begin, end):
                total = fma(weights[i, j - begin], widened(v[slot[j], group, at]), total)
            head[at] = total
