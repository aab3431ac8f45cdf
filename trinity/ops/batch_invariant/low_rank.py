"""Rows times matrices that are trained by adapters alone: y = x (W + s B A)^T, where W is frozen; several of the same rows at once.

Legend: R rows sorted by matrix, T rows of one matrix, E matrices, K inner dimension, N outputs, M matrices beside each other, each
with a stack of its own (as gate and up), r rank, S = M r.
Decisions: fp32 on a CPU, for training: the products with W are those of gemm.py, and no gradient of W is made. The M factors A are
one product with x, forward and backward, the rows' gradient is one sum, made in place, and each product is one call for all
matrices.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trinity.ops.batch_invariant.gemm import multiply
from trinity.ops.batch_invariant.outer import add_products, sums

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
        ys, ctx.end_E, ctx.scale = tuple(multiply(x_RK, w_ENK, end_E) for w_ENK in w_MENK), end_E, scale
        for y_RN, h_Rr, b_ErN in zip(ys, h_RS.chunk(len(ys), 1), b_MErN, strict=True):
            add_products(h_Rr, b_ErN, end_E, y_RN)
        ctx.save_for_backward(x_RK, a_ESK, h_RS, *w_MENK, *b_MErN)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy_MRN: Tensor) -> tuple[Tensor | None, ...]:
        (x_RK, a_ESK, h_RS, *rest), num = ctx.saved_tensors, len(dy_MRN)
        w_MENK, b_MErN, end_E = rest[:num], rest[num:], ctx.end_E
        dy_MRN = tuple(dy_RN.contiguous() for dy_RN in dy_MRN)
        dh_RS = torch.cat([multiply(dy, b, end_E) for dy, b in zip(dy_MRN, b_MErN, strict=True)], 1).mul_(ctx.scale)
        da_ESK = sums(dh_RS, x_RK, end_E)
        db_MErN = [sums(h_Rr, dy_RN, end_E) for h_Rr, dy_RN in zip(h_RS.chunk(num, 1), dy_MRN, strict=True)]
        dx_RK = add_products(dh_RS, a_ESK, end_E) if ctx.needs_input_grad[0] else None
        if dx_RK is not None:  # of all products that x went into
            for dy_RN, w_ENK in zip(dy_MRN, w_MENK, strict=True):
                add_products(dy_RN, w_ENK, end_E, dx_RK)
        factors = zip(da_ESK.chunk(num, 1), db_MErN, strict=True)
        return dx_RK, None, None, *(grad for da, db in factors for grad in (None, da.contiguous(), db.mT.contiguous()))
