"""A layer's experts as one call of the extension in C++, where there is one: for inference on a CPU, with the torch backend or
by weights in another form.

Legend: R rows, K slots of a row, A assignments, E experts of the layer on this shard, D model, F expert hidden.
Decisions: the bits are those of `torch_backend.in_order` and of derived_compute.py; sorting, feed-forwards and the sums over
a row's experts are done in one go, without a copy of the rows. What is not for it, and what an error is about, goes the other
way.
"""

import struct

import torch
from torch import Tensor

from trinity import native
from trinity.experts.layer import ReadyLayer
from trinity.ops import batch_invariant
from trinity.ops.extension import STORED, Matrices
from trinity.state.strides import as_stored

EXPERTS = "<4q21q4q"  # native/step/step.h


def matrices_of(layer: ReadyLayer) -> list[Matrices] | None:
    """gate, up and down as the extension's kernels take them; None where they cannot."""
    if layer.adapters is not None:
        return None
    found: list[Matrices] | None = None
    if layer.derived is not None:
        found = layer.derived.matrices()
    elif layer.weights is not None:
        gate_EFD, up_EFD, down_EFD = layer.weights
        found = [Matrices(gate_EFD), Matrices(up_EFD), Matrices(as_stored(down_EFD))]
    return found if found is not None and _are_possible(layer, found) else None


def _are_possible(layer: ReadyLayer, matrices: list[Matrices]) -> bool:
    parts = [part for each in matrices for part in each if part is not None]
    if not all(part.is_cpu and part.is_contiguous() and part.numel() for part in parts):
        return False
    gate, up, down = matrices
    if not {each.values.dtype for each in matrices} <= STORED:
        return False
    return gate.kind == up.kind == down.kind and gate.sides == up.sides == down.sides[::-1]


def infer(layer: ReadyLayer, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> tuple[Tensor, Tensor] | None:
    """-> y_RD in x's type, and how many rows each expert had: rows_E. None: Python has to."""
    given = (x_RD, ids_RK, weights_RK)
    if not hasattr(native.lib, "step_experts") or not all(tensor.is_contiguous() for tensor in given):
        return None
    if not batch_invariant.at_once(x_RD) or ids_RK.dtype != torch.int64 or weights_RK.dtype != torch.float32:
        return None
    what = None if ids_RK.is_cuda else described(layer, x_RD.dtype, x_RD.shape[1], ids_RK.shape[1], None)
    if what is None:
        return None
    y_RD, rows_E = torch.empty_like(x_RD), torch.empty(len(layer.experts), dtype=torch.int64)
    places = (each.data_ptr() for each in (*given, y_RD, rows_E))
    is_done = native.lib.step_experts(what, torch.get_num_threads(), len(x_RD), *places)
    return (y_RD, rows_E) if is_done else None


def described(layer: ReadyLayer, dtype: torch.dtype, dim: int, top_k: int, counts_X: Tensor | None) -> bytes | None:
    """An Experts of native/step/step.h for rows of that type and width, which counts them in `counts_X`; it holds while the
    layer's tensors do. None: Python has to compute them."""
    matrices = matrices_of(layer)
    if matrices is None or matrices[0].sides[1] != dim:
        return None
    if layer.derived is None and matrices[0].values.dtype != dtype:
        return None
    num = len(layer.experts)
    sizes, counts = (dtype == torch.bfloat16, dim, num, top_k), 0 if counts_X is None else counts_X.data_ptr()
    places = layer.position_X.data_ptr(), len(layer.position_X) - 1, layer.ids_E.data_ptr(), counts
    return struct.pack(EXPERTS, *sizes, *(field for each in matrices for field in _fields(each)), *places)


def _fields(matrices: Matrices) -> tuple[int, ...]:
    """Fields of a Matrix, which has no bias."""
    values, *others = matrices.described()
    return values, 0, *others, matrices.kind
