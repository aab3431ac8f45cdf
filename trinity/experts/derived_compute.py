"""Rows through experts that are here in another form than they are trained in: for inference, on a CPU.

Legend: R rows, A rows sorted by expert, E experts, D model, F expert hidden.
Decisions: a row's bits do not depend on the others, in any form. For int8 and bf16, rows are rounded as well, and hidden rows:
sums are of whole numbers, or in fp32 as the extension's kernels have them. For the others only weights are rounded and products
are those of fp32, an expert at a time. What an expert makes of a row is rounded to the rows' type, as their sum is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trinity.experts.base import Assignments, LayerWeights
from trinity.experts.derived import DerivedLayer
from trinity.experts.rows import combine, sorted_rows
from trinity.experts.torch_backend import in_order
from trinity.ops import batch_invariant, extension
from trinity.ops.extension import Matrices

Compute = Callable[[Tensor, Tensor, Tensor, DerivedLayer], Tensor]  # rows in order, weights, ends -> y_AD in fp32


def infer(x_RD: Tensor, assigned: Assignments, layer: DerivedLayer) -> Tensor:
    """-> y_RD in x's dtype: what an ExpertBackend computes, of weights in that form."""
    if not assigned.row_A.numel():
        return torch.zeros_like(x_RD)
    order, x_AD, weight_A1, end_E = sorted_rows(x_RD.float(), assigned, len(layer.gate[0]))
    y_AD = _compute_of(layer)(x_AD, weight_A1, end_E, layer)
    return combine(y_AD.to(x_RD.dtype), order, x_RD.dtype)


def _compute_of(layer: DerivedLayer) -> Compute:
    kind = layer.matrices()[0].kind
    if kind in (extension.FP8, extension.NVFP4):
        return _unpacked if extension.lib is None else _in_registers
    return _int8 if kind == extension.INT8 else _floats


def _int8(x_AD: Tensor, weight_A1: Tensor, end_E: Tensor, layer: DerivedLayer) -> Tensor:
    from trinity.ops.quantised import Int8, feed_forward  # a compiler comes with it

    gate, up, down = (Int8(*(part for part in each if part is not None)) for each in _whole(layer))
    return feed_forward(x_AD, gate, up, down, end_E, weight_A1.squeeze(1))


def _floats(x_AD: Tensor, weight_A1: Tensor, end_E: Tensor, layer: DerivedLayer) -> Tensor:
    """y_AD in fp32; rows are rounded to the stacks' type."""
    from trinity.ops.batch_invariant import elementwise, fused_mlp, gemm  # a compiler comes with it

    stacks = [each.values for each in _whole(layer)]
    x_AD = x_AD.to(stacks[0].dtype)
    if batch_invariant.at_once(x_AD, *stacks):
        gate, up, down = stacks
        return fused_mlp.feed_forward(x_AD, gate, up, down, end_E, weight_A1.squeeze(1), torch.float32)
    gate_AF, up_AF = (gemm.grouped(x_AD, stack, end_E) for stack in stacks[:2])
    return gemm.multiply(elementwise.gated(gate_AF, up_AF, weight_A1), stacks[2], end_E)


def _in_registers(x_AD: Tensor, weight_A1: Tensor, end_E: Tensor, layer: DerivedLayer) -> Tensor:
    """`_unpacked` by the extension, a few rows of a matrix at a time: the same bits."""
    from trinity.ops.batch_invariant.fused_mlp import units_of  # a compiler comes with it

    y_AD, stacks = torch.empty(x_AD.shape), _whole(layer)
    rows, units = extension.Rows(x_AD.contiguous()), units_of(end_E, len(x_AD))
    extension.feed_forward(stacks[0].kind, rows, stacks, weight_A1.squeeze(1), units, y_AD)
    return y_AD


def _unpacked(x_AD: Tensor, weight_A1: Tensor, end_E: Tensor, layer: DerivedLayer) -> Tensor:
    """y_AD, an expert at a time: there never is a copy of more in fp32."""
    y_AD, begin = torch.empty_like(x_AD), 0
    for e, end in enumerate(end_E.tolist()):
        if begin < end:
            matrices = (layer.form.read(*(part[e] for part in parts)) for parts in (layer.gate, layer.up, layer.down))
            weights = _weights(*(matrix[None] for matrix in matrices))
            own = slice(begin, end)
            y_AD[own] = in_order(x_AD[own], weight_A1[own], end_E.new_tensor([end - begin]), weights)
        begin = end
    return y_AD


def _whole(layer: DerivedLayer) -> list[Matrices]:
    """Its matrices as kernels want them: an expert's next to the one before."""
    return [each.mapped(Tensor.contiguous) for each in layer.matrices()]


def _weights(gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> LayerWeights:
    return LayerWeights(gate_EFD, up_EFD, down_EDF.mT)
