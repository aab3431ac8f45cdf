"""Rows times matrices that are trained by adapters alone: y = x (W + s B A)^T, where W is frozen; several of the same rows.

Legend: R rows sorted by matrix, T rows of one matrix, E matrices, K inner dimension, N outputs, M stacks that the same rows go
through (as gate and up), r rank, S = M r.
Decisions: fp32 on a CPU, for training: the products with W are those of gemm.py, and no gradient of W is made. The M factors A
are one product with x, forward and backward, and the rows' gradient is one sum, made in place. One matrix is done after the
other: each of these products reads its rows again, and memory is further away than the arithmetic is long.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trinity.ops.batch_invariant.gemm import multiplying
from trinity.ops.batch_invariant.outer import adding_products, summing
from trinity.ops.batch_invariant.threads import in_turn

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
        h_RS, ys = x_RK.new_empty(len(x_RK), a_ESK.shape[1]), [x_RK.new_empty(len(x_RK), w.shape[1]) for w in w_MENK]
        jobs = [multiplying(x_RK, a_ESK * scale, end_E, h_RS)]
        for y_RN, w_ENK, h_Rr, b_ErN in zip(ys, w_MENK, h_RS.chunk(len(ys), 1), b_MErN, strict=True):
            jobs += [multiplying(x_RK, w_ENK, end_E, y_RN), adding_products(h_Rr, b_ErN, end_E, y_RN)]
        in_turn(len(end_E), jobs)
        ctx.scale, ctx.end_E = scale, end_E
        ctx.save_for_backward(x_RK, a_ESK, h_RS, *w_MENK, *b_MErN)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        (x_RK, a_ESK, h_RS, *rest), num, end_E = ctx.saved_tensors, len(dys), ctx.end_E
        w_MENK, b_MErN, dys = rest[:num], rest[num:], tuple(dy_RN.contiguous() for dy_RN in dys)
        dx_RK, dh_RS = torch.empty_like(x_RK) if ctx.needs_input_grad[0] else None, torch.empty_like(h_RS)
        da_ESK, db_MErN, jobs = torch.empty_like(a_ESK), [torch.empty_like(b) for b in b_MErN], []
        for dy, b, db, h, dh in zip(dys, b_MErN, db_MErN, h_RS.chunk(num, 1), dh_RS.chunk(num, 1), strict=True):
            jobs += [multiplying(dy, b * ctx.scale, end_E, dh), summing(h, dy, end_E, db)]
        if dx_RK is not None:  # of all products that x went into
            of_x = zip((dh_RS, *dys), (a_ESK, *w_MENK), strict=True)
            jobs += [adding_products(rows, v, end_E, dx_RK, is_new=at == 0) for at, (rows, v) in enumerate(of_x)]
        in_turn(len(end_E), [*jobs, summing(dh_RS, x_RK, end_E, da_ESK)])
        factors = zip(da_ESK.chunk(num, 1), db_MErN, strict=True)
        return dx_RK, None, None, *(grad for da, db in factors for grad in (None, da.contiguous(), db.mT.contiguous()))
