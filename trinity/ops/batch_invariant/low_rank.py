"""Rows times matrices that are trained by adapters alone: y = x (W + s B A)^T, where W is frozen.

Legend: R rows sorted by matrix, T rows of one matrix, E matrices, K inner dimension, N outputs, r rank.
Decisions: fp32 on a CPU, for training: the product with W is that of gemm.py, and no gradient of W is made; those with the
factors are the library's, of shapes that it is quick at (256 x 512 by 512 x 8 transposed takes 0.09 ms, not transposed 0.18),
so that here a row's last bits may depend on its company.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trinity.ops.batch_invariant.gemm import multiply


def linear(x: Tensor, w_NK: Tensor, a_rK: Tensor, b_Nr: Tensor, scale: float) -> Tensor:
    """x [..., K] -> [..., N]. Differentiable in x, a and b."""
    x_TK = x.flatten(0, -2)
    w_1NK, a_1rK, b_1Nr = (matrix.unsqueeze(0) for matrix in (w_NK, a_rK, b_Nr))
    y_TN = grouped(x_TK, w_1NK, a_1rK, b_1Nr, scale, torch.tensor([len(x_TK)]))
    y: Tensor = y_TN.unflatten(0, x.shape[:-1])
    return y


def grouped(x_RK: Tensor, w_ENK: Tensor, a_ErK: Tensor, b_ENr: Tensor, scale: float, end_E: Tensor) -> Tensor:
    """-> y_RN: rows up to `end_E[0]` by the first matrix, from there up to `end_E[1]` by the second and so on. Differentiable
    in x, a and b."""
    y_RN: Tensor = _Adapted.apply(x_RK, w_ENK, a_ErK, b_ENr, scale, end_E)
    return y_RN


class _Adapted(Function):
    @staticmethod
    def forward(
        ctx: Any, x_RK: Tensor, w_ENK: Tensor, a_ErK: Tensor, b_ENr: Tensor, scale: float, end_E: Tensor
    ) -> Tensor:
        x_RK, w_ENK, b_ErN = x_RK.contiguous(), w_ENK.contiguous(), b_ENr.mT.contiguous()
        y_RN, h_Rr = multiply(x_RK, w_ENK, end_E), x_RK.new_empty(len(x_RK), a_ErK.shape[1])
        ctx.scale, ctx.ends = scale, end_E.tolist()
        for e, (lo, hi) in enumerate(_bounds(ctx.ends)):
            if hi > lo:
                torch.mm(x_RK[lo:hi], a_ErK[e].T, out=h_Rr[lo:hi]).mul_(scale)
                y_RN[lo:hi].addmm_(h_Rr[lo:hi], b_ErN[e])
        ctx.save_for_backward(x_RK, w_ENK, a_ErK, b_ErN, h_Rr)
        return y_RN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
        x_RK, w_ENK, a_ErK, b_ErN, h_Rr = ctx.saved_tensors
        dx_RK = torch.empty_like(x_RK) if ctx.needs_input_grad[0] else None
        da_ErK, db_ErN = torch.empty_like(a_ErK), torch.empty_like(b_ErN)
        for e, (lo, hi) in enumerate(_bounds(ctx.ends)):
            dy_TN = dy_RN[lo:hi]
            dh_Tr = (dy_TN @ b_ErN[e].T).mul_(ctx.scale)
            torch.mm(dh_Tr.T, x_RK[lo:hi], out=da_ErK[e])  # zeros where there are no rows
            torch.mm(h_Rr[lo:hi].T, dy_TN, out=db_ErN[e])
            if dx_RK is not None and hi > lo:
                torch.mm(dy_TN, w_ENK[e], out=dx_RK[lo:hi]).addmm_(dh_Tr, a_ErK[e])
        return dx_RK, None, da_ErK, db_ErN.mT.contiguous(), None, None


def _bounds(ends: list[int]) -> "zip[tuple[int, int]]":
    return zip([0, *ends[:-1]], ends, strict=True)
