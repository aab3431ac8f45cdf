"""Rows times matrices that are trained by adapters alone: y = x (W + s B A)^T, where W is frozen; several of the same rows at once.

Legend: R rows sorted by matrix, T rows of one matrix, E matrices, K inner dimension, N outputs, M matrices beside each other, each
with a stack of its own (as gate and up), r rank, S = M r.
Decisions: fp32 on a CPU, for training: the products with W are those of gemm.py, and no gradient of W is made. The M factors A are
one product with x, forward and backward, and the rows' gradient is one sum, made in place. Sums over K and N are gemm.py's,
one call for all matrices; those over r and T are the library's, of shapes that it is quick at (256 x 512 by 512 x 8 transposed
takes 0.04 ms, not transposed 0.18), so that here a row's last bits may depend on its company.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trinity.ops.batch_invariant.gemm import multiply

Adapted = tuple[Tensor, Tensor, Tensor]  # W [E, N, K], A [E, r, K], B [E, N, r]


def linear(x: Tensor, parts: Sequence[Adapted], scale: float) -> list[Tensor]:
    """x [..., K] -> [..., N] of each part, of matrices without E. Differentiable in x, A and B."""
    x_TK = x.flatten(0, -2)
    stacks = [tuple(matrix.unsqueeze(0) for matrix in part) for part in parts]
    ys = grouped(x_TK, stacks, scale, torch.tensor([len(x_TK)]))
    return [y_TN.unflatten(0, x.shape[:-1]) for y_TN in ys]


def grouped(x_RK: Tensor, parts: Sequence[tuple[Tensor, ...]], scale: float, end_E: Tensor) -> tuple[Tensor, ...]:
    """-> y_RN of each part: rows up to `end_E[0]` by its first matrix, from there up to `end_E[1]` by the second and so on.
    Differentiable in x, A and B."""
    ys: tuple[Tensor, ...] = _Adapted.apply(x_RK, scale, end_E, *(matrix for part in parts for matrix in part))
    return ys


class _Adapted(Function):
    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, scale: float, end_E: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
        x_RK, a_ESK = x_RK.contiguous(), torch.cat(matrices[1::3], 1)
        w_MENK, b_MErN = [w_ENK.contiguous() for w_ENK in matrices[::3]], [b.mT.contiguous() for b in matrices[2::3]]
        h_RS = multiply(x_RK, a_ESK, end_E).mul_(scale)
        ys, ctx.ends, ctx.scale = tuple(multiply(x_RK, w_ENK, end_E) for w_ENK in w_MENK), end_E, scale
        for y_RN, h_Rr, b_ErN in zip(ys, h_RS.chunk(len(ys), 1), b_MErN, strict=True):
            for e, lo, hi in _runs(end_E):
                y_RN[lo:hi].addmm_(h_Rr[lo:hi], b_ErN[e])
        ctx.save_for_backward(x_RK, a_ESK, h_RS, *w_MENK, *b_MErN)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy_MRN: Tensor) -> tuple[Tensor | None, ...]:
        (x_RK, a_ESK, h_RS, *rest), num = ctx.saved_tensors, len(dy_MRN)
        w_MENK, b_MErN, end_E = rest[:num], rest[num:], ctx.ends
        dy_MRN = tuple(dy_RN.contiguous() for dy_RN in dy_MRN)
        dh_RS = torch.cat([multiply(dy, b, end_E) for dy, b in zip(dy_MRN, b_MErN, strict=True)], 1).mul_(ctx.scale)
        da_ESK = _sums(dh_RS, x_RK, end_E)
        db_MErN = [_sums(h, dy, end_E) for h, dy in zip(h_RS.chunk(num, 1), dy_MRN, strict=True)]
        dx_RK = _dx(dy_MRN, w_MENK, dh_RS, a_ESK, end_E) if ctx.needs_input_grad[0] else None
        factors = zip(da_ESK.chunk(num, 1), db_MErN, strict=True)
        return dx_RK, None, None, *(grad for da, db in factors for grad in (None, da.contiguous(), db.mT.contiguous()))


def _dx(
    dy_MRN: Sequence[Tensor], w_MENK: Sequence[Tensor], dh_RS: Tensor, a_ESK: Tensor, end_E: Tensor
) -> Tensor:
    """dx_RK, the sum over all products that x went into."""
    dx_RK = dh_RS.new_empty(len(dh_RS), a_ESK.shape[2])
    for e, lo, hi in _runs(end_E):
        dx_TK = torch.mm(dh_RS[lo:hi], a_ESK[e], out=dx_RK[lo:hi])
        for dy_RN, w_ENK in zip(dy_MRN, w_MENK, strict=True):
            dx_TK.addmm_(dy_RN[lo:hi], w_ENK[e])
    return dx_RK


def _sums(left_RA: Tensor, right_RB: Tensor, end_E: Tensor) -> Tensor:
    """left^T right of each matrix's rows, [E, A, B]; zeros where it has none."""
    out_EAB = left_RA.new_zeros(len(end_E), left_RA.shape[1], right_RB.shape[1])
    for e, lo, hi in _runs(end_E):
        torch.mm(left_RA[lo:hi].T, right_RB[lo:hi], out=out_EAB[e])
    return out_EAB


def _runs(end_E: Tensor) -> list[tuple[int, int, int]]:
    """(matrix, first row, end) of each that has rows."""
    ends = end_E.tolist()
    return [(e, lo, hi) for e, (lo, hi) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if hi > lo]
