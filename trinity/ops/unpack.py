"""Matrices in 8 or 4 bits as fp32, in one pass: for weights that are unpacked each time they are used.

Legend: N outputs and K inputs of a matrix, B bytes of a row, S scales of a row.
Decision: the bits are those of formats.py, `scaled(decoded(..))`, which writes what lies between and takes longer.
"""

import torch
from torch import Tensor

from trinity.ops.batch_invariant.compiled import kernel
from trinity.ops.batch_invariant.threads import in_threads

OPERATIONS = 4  # for a number, about


def unpacked(bytes_NB: Tensor, table: Tensor, scale_NS: Tensor, columns: int) -> Tensor:
    """The matrix of bytes that `table` explains, with a scale for each run of so many columns of a row."""
    num, width = bytes_NB.shape
    out_NK = torch.empty(num, width * table.shape[1])
    arrays = [each.contiguous().numpy() for each in (bytes_NB, table.T, scale_NS)]
    target = out_NK.view(num, width, table.shape[1]).numpy()
    in_threads(num, OPERATIONS * out_NK.numel(), lambda first, last: _unpack(*arrays, columns, target, first, last))
    return out_NK


@kernel
def _unpack(data, table, scale, columns, out, first, last):  # type: ignore[no-untyped-def]
    """`out` [N, B, numbers in a byte]; `table` [numbers in a byte, 256]."""
    per_byte, width = len(table), data.shape[1]
    for n in range(first, last):
        for i in range(per_byte):
            numbers, row, target = table[i], data[n], out[n, :, i]
            for s in range(scale.shape[1]):
                factor, begin, end = scale[n, s], s * columns // per_byte, min((s + 1) * columns // per_byte, width)
                for b in range(begin, end):
                    target[b] = numbers[row[b]] * factor
