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

EXPERTS = "<4q21q4q"  # native/step/step.h


def infer(layer: ReadyLayer, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> tuple[Tensor, Tensor] | None:
    """-> y_RD in x's type, and how many rows each expert had: rows_E. None: the backend has to."""
    given = (x_RD, ids_RK, weights_RK)
    if not hasattr(native.lib, "step_experts") or not is_possible(layer, x_RD.dtype):
        return None
    if not all(tensor.is_contiguous() for tensor in given) or not batch_invariant.at_once(x_RD):
        return None
    if ids_RK.is_cuda or weights_RK.dtype != torch.float32 or ids_RK.dtype != torch.int64:
        return None
    if layer.stacks[2].shape[1] != x_RD.shape[1]:
        return None
    y_RD, rows_E = torch.empty_like(x_RD), torch.empty(len(layer.experts), dtype=torch.int64)
    places = (each.data_ptr() for each in (*given, y_RD, rows_E))
    what = described(layer, ids_RK.shape[1], None)
    is_done = native.lib.step_experts(what, torch.get_num_threads(), len(x_RD), *places)
    return (y_RD, rows_E) if is_done else None


def is_possible(layer: ReadyLayer, dtype: torch.dtype) -> bool:
    """Say whether the extension computes rows of that type with this layer's experts."""
    if layer.weights is None or layer.derived is not None or layer.adapters is not None:
        return False
    return all(
        stack.dtype == dtype and stack.is_contiguous() and stack.numel() and stack.is_cpu for stack in layer.stacks
    )


def described(layer: ReadyLayer, top_k: int, counts_X: Tensor | None) -> bytes:
    """An Experts of native/step/step.h, which counts rows in `counts_X`; it holds while the layer's tensors do."""
    stacks, counts = layer.stacks, 0 if counts_X is None else counts_X.data_ptr()
    matrices = (field for stack in stacks for field in _matrix(stack))
    sizes = stacks[0].dtype == torch.bfloat16, stacks[0].shape[2], len(layer.experts), top_k
    places = layer.position_X.data_ptr(), len(layer.position_X) - 1, layer.ids_E.data_ptr(), counts
    return struct.pack(EXPERTS, *sizes, *matrices, *places)


def _matrix(stack_ENK: Tensor) -> tuple[int, ...]:
    """Fields of a Matrix."""
    return stack_ENK.data_ptr(), 0, 0, 0, *stack_ENK.shape[1:], KINDS[stack_ENK.dtype]
