"""Products of matrices that are kept in another format than rows come in: in int8, or in bfloat16 beside fp32 rows.

Legend: T rows, K inner dimension, N outputs, D model, F hidden.
Decisions: for inference, on a CPU. Rows are rounded as the matrices are, when they are multiplied (quantised.py has int8's
formula), and sums are fp32, not rounded again. The bits are those of native/step, and the same without the extension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trinity.ops import extension, quantised
from trinity.ops.batch_invariant import elementwise, fused_mlp, gemm, threads
from trinity.ops.extension import KINDS, Matrices


def made(w_NK: Tensor, dtype: torch.dtype) -> Matrices:
    """A matrix in that format. Raises InvalidRequest if K is too large for int8's sums."""
    return Matrices(*quantised.quantised(w_NK.float())) if dtype == torch.int8 else Matrices(w_NK.to(dtype))


def side_by_side(x_TK: Tensor, weights: Sequence[Matrices]) -> list[Tensor]:
    """y_TN in fp32 of each matrix [N, K] with the same rows, which are rounded once for those of a format."""
    x_TK, end_1 = x_TK.contiguous(), torch.tensor([len(x_TK)])
    if extension.lib is None:
        return [_product(x_TK, w, end_1) for w in weights]
    kinds = [KINDS[w.values.dtype] for w in weights]
    rows = {kind: extension.rounded(kind, x_TK) for kind in kinds}
    out = [torch.empty(len(x_TK), len(w.values)) for w in weights]
    parts = zip(kinds, weights, out, strict=True)
    jobs = [extension.multiplying(kind, rows[kind], _stack(w), end_1, y_TN) for kind, w, y_TN in parts]
    threads.side_by_side(jobs)
    return out


def feed_forward(x_TD: Tensor, gate: Matrices, up: Matrices, down: Matrices) -> Tensor:
    """y_TD in fp32 of gate, up and down of one format."""
    end_1, stacks = torch.tensor([len(x_TD)]), [_stack(w) for w in (gate, up, down)]
    if gate.values.dtype == torch.int8:
        first, second, third = map(_int8, stacks)
        return quantised.feed_forward(x_TD, first, second, third, end_1)
    x_TD = x_TD.to(gate.values.dtype).contiguous()
    if extension.lib is not None:
        gate_1FD, up_1FD, down_1DF = (stack.values for stack in stacks)
        return fused_mlp.feed_forward(x_TD, gate_1FD, up_1FD, down_1DF, end_1, dtype=torch.float32)
    gate_TF, up_TF = (_product(x_TD, w, end_1).to(x_TD.dtype) for w in (gate, up))
    return _product(elementwise.gated(gate_TF, up_TF), down, end_1)


def _product(x_TK: Tensor, w: Matrices, end_1: Tensor) -> Tensor:
    if w.values.dtype == torch.int8:
        return quantised.multiply(x_TK, _int8(_stack(w)), end_1)
    return gemm.multiply(x_TK.to(w.values.dtype), w.values.unsqueeze(0), end_1)


def _stack(w: Matrices) -> Matrices:
    others = (part if part is None else part.unsqueeze(0) for part in w[1:])
    return Matrices(w.values.unsqueeze(0), *others)


def _int8(stack: Matrices) -> quantised.Int8:
    return quantised.Int8(stack.values, *(part for part in stack[1:] if part is not None))
