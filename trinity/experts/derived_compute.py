"""Rows through experts that are here in another form than they are trained in: for inference, on a CPU.

Legend: R rows, A rows sorted by expert, E experts, D model, F expert hidden.
Decisions: a row's bits do not depend on the others, in any form. For int8, rows are rounded as well and sums are of whole
numbers; for the others only weights are rounded and products are those of fp32, an expert at a time where it is unpacked.
"""

import torch
from torch import Tensor

from trinity.experts.base import Assignments, LayerWeights
from trinity.experts.derived import INT8, DerivedLayer
from trinity.experts.rows import combine, sorted_rows
from trinity.experts.torch_backend import in_order


def infer(x_RD: Tensor, assigned: Assignments, layer: DerivedLayer) -> Tensor:
    """-> y_RD in x's dtype: what an ExpertBackend computes, of weights in that form."""
    if not assigned.row_A.numel():
        return torch.zeros_like(x_RD)
    order, x_AD, weight_A1, end_E = sorted_rows(x_RD.float(), assigned, len(layer.gate[0]))
    if layer.form is INT8:
        y_AD = _int8(x_AD, weight_A1, end_E, layer)
    elif len(layer.gate) == 1:  # floats, which products take as they are
        y_AD = in_order(x_AD, weight_A1, end_E, _weights(layer.gate[0], layer.up[0], layer.down[0]))
    else:
        y_AD = _unpacked(x_AD, weight_A1, end_E, layer)
    return combine(y_AD, order, x_RD.dtype)


def _int8(x_AD: Tensor, weight_A1: Tensor, end_E: Tensor, layer: DerivedLayer) -> Tensor:
    from trinity.ops.quantised import Int8, feed_forward  # a compiler comes with it

    stacks = ((q, scale, total) for scale, total, q in (layer.gate, layer.up, layer.down))
    gate, up, down = (Int8(*(part.contiguous() for part in parts)) for parts in stacks)  # they are, but for odd sizes
    return feed_forward(x_AD, gate, up, down, end_E, weight_A1.squeeze(1))


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


def _weights(gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> LayerWeights:
    return LayerWeights(gate_EFD, up_EFD, down_EDF.mT)
