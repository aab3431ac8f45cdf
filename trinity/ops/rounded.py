"""Products of matrices that are kept in another format (stored.py) than rows come in.

Legend: T rows, K inner dimension, N outputs, D model, F hidden.
Decisions: for inference, on a CPU. In int8 (quantised.py has the formula) and bfloat16 rows are rounded as the matrices are,
when they are multiplied; fp8 and nvfp4 are fp32 by the time that rows meet them. Sums are fp32, not rounded again. The bits are
those of native/step, and the same without the extension.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trinity.ops import extension, quantised
from trinity.ops.batch_invariant import elementwise, fused_mlp, gemm, threads
from trinity.ops.extension import FP8, INT8, NVFP4, Matrices
from trinity.ops.stored import BLOCK, FORMATS, parts_of

BAND = 32 * BLOCK[0]  # outputs of a matrix that are fp32 at a time, without the extension
PACKED = {FP8: FORMATS["fp8"], NVFP4: FORMATS["nvfp4"]}


def side_by_side(x_TK: Tensor, weights: Sequence[Matrices]) -> list[Tensor]:
    """y_TN in fp32 of each matrix [N, K] with the same rows, which are rounded once for those of a format."""
    x_TK, end_1 = x_TK.contiguous(), torch.tensor([len(x_TK)])
    if extension.lib is None:
        return [_product(x_TK, w, end_1) for w in weights]
    kinds = [w.kind for w in weights]
    rows = {kind: extension.rounded(kind, x_TK) for kind in kinds}
    out = [torch.empty(len(x_TK), w.sides[0]) for w in weights]
    parts = zip(kinds, weights, out, strict=True)
    jobs = [extension.multiplying(kind, rows[kind], _stack(w), end_1, y_TN) for kind, w, y_TN in parts]
    threads.side_by_side(jobs)
    return out


def feed_forward(x_TD: Tensor, gate: Matrices, up: Matrices, down: Matrices) -> Tensor:
    """y_TD in fp32 of gate, up and down of one format."""
    end_1, stacks = torch.tensor([len(x_TD)]), [_stack(w) for w in (gate, up, down)]
    if gate.kind == INT8:
        first, second, third = map(_int8, stacks)
        return quantised.feed_forward(x_TD, first, second, third, end_1)
    if gate.kind in PACKED and extension.lib is not None:
        y_TD = torch.empty(len(x_TD), down.sides[0])
        rows, units = extension.rounded(gate.kind, x_TD), fused_mlp.units_of(end_1, len(x_TD))
        extension.feed_forward(gate.kind, rows, stacks, None, units, y_TD)
        return y_TD
    x_TD = x_TD.to(torch.float32 if gate.kind in PACKED else gate.values.dtype).contiguous()
    if extension.lib is not None:
        gate_1FD, up_1FD, down_1DF = (stack.values for stack in stacks)
        return fused_mlp.feed_forward(x_TD, gate_1FD, up_1FD, down_1DF, end_1, dtype=torch.float32)
    gate_TF, up_TF = (_product(x_TD, w, end_1).to(x_TD.dtype) for w in (gate, up))
    return _product(elementwise.gated(gate_TF, up_TF), down, end_1)


def _product(x_TK: Tensor, w: Matrices, end_1: Tensor) -> Tensor:
    if w.kind == INT8:
        return quantised.multiply(x_TK, _int8(_stack(w)), end_1)
    if w.kind in PACKED:
        return torch.cat([gemm.multiply(x_TK.float(), w_1BK, end_1) for w_1BK in _bands(w)], dim=1)
    return gemm.multiply(x_TK.to(w.values.dtype), w.values.unsqueeze(0), end_1)


def _bands(w: Matrices) -> Iterator[Tensor]:
    """Some outputs of a matrix after the others, in fp32."""
    *scales, values_NB = parts_of(w)
    for start in range(0, w.sides[0], BAND):
        own = slice(start, start + BAND)
        blocks = slice(start // BLOCK[0], (start + BAND) // BLOCK[0])
        some = [scales[0][blocks]] if w.kind == FP8 else [scales[0], scales[1][own]]
        yield PACKED[w.kind].read(*some, values_NB[own]).unsqueeze(0)


def _stack(w: Matrices) -> Matrices:
    return w.mapped(lambda part: part.unsqueeze(0))


def _int8(stack: Matrices) -> quantised.Int8:
    return quantised.Int8(stack.values, *(part for part in stack[1:] if part is not None))
