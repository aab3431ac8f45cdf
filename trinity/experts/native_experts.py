"""A layer's experts as one call of the extension in C++, where there is one: for inference with the torch backend on a CPU.

Legend: R rows, K slots of a row, A assignments, E experts of the layer on this shard, D model, F expert hidden.
Decisions: the bits are those of `torch_backend.in_order`; sorting, feed-forwards and the sums over a row's experts are done
in one go, without a copy of the rows. What is not for it, and what an error is about, goes the other way.
"""

import struct

import torch
from torch import Tensor

from trinity import native
from trinity.experts.layer import ReadyLayer
from trinity.ops import batch_invariant
from trinity.ops.extension import KINDS
from trinity.state.strides import as_stored

EXPERTS = "<4q21q2q"  # native/step/step.h


def infer(layer: ReadyLayer, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> tuple[Tensor, Tensor] | None:
    """-> y_RD in x's type, and how many rows each expert had: rows_E. None: the backend has to."""
    given = (x_RD, ids_RK, weights_RK)
    if not hasattr(native.lib, "step_experts") or layer.weights is None or layer.adapters is not None:
        return None
    stacks = (layer.weights.gate_EFD, layer.weights.up_EFD, as_stored(layer.weights.down_EFD))
    if not all(tensor.is_contiguous() for tensor in given):
        return None
    if not batch_invariant.at_once(x_RD, *stacks) or ids_RK.is_cuda or weights_RK.dtype != torch.float32:
        return None
    if ids_RK.dtype != torch.int64 or stacks[2].shape[1] != x_RD.shape[1]:
        return None
    (num, _, dim), (rows, top_k) = stacks[0].shape, ids_RK.shape
    y_RD, rows_E = torch.empty_like(x_RD), torch.empty(num, dtype=torch.int64)
    what = struct.pack(
        EXPERTS, x_RD.dtype == torch.bfloat16, dim, num, top_k, *(field for stack in stacks for field in _matrix(stack)),
        layer.position_X.data_ptr(), len(layer.position_X) - 1,
    )  # fmt: skip
    places = (each.data_ptr() for each in (*given, y_RD, rows_E))
    is_done = native.lib.step_experts(what, torch.get_num_threads(), rows, *places)
    return (y_RD, rows_E) if is_done else None


def _matrix(stack_ENK: Tensor) -> tuple[int, ...]:
    """Fields of a Matrix."""
    return stack_ENK.data_ptr(), 0, 0, 0, *stack_ENK.shape[1:], KINDS[stack_ENK.dtype]
