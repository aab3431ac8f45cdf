"""Formats of quantised matrices: what a stored byte stands for, and the numbers that bytes and scales mean.

Legend: N outputs and K inputs of a matrix, R some of its rows, B bytes of a row, S scales of a row.
Decisions: a byte is looked up in a table of the numbers in it, the lower bits first, which is how all of these formats are
stored and on a CPU several times as fast as a conversion; a number is (value - zero) * scale in fp32 and is rounded once, to
the type that it is wanted in, so that it has the bits that the formats' own libraries give it.
"""

import torch
from torch import Tensor

_BYTES = torch.arange(256, dtype=torch.uint8)
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _nibbles(values: Tensor) -> Tensor:
    """Table of the two numbers in a byte, from the 16 numbers of a nibble."""
    return torch.stack([values[_BYTES.int() & 15], values[_BYTES.int() >> 4]], dim=1)


FP8 = _BYTES.view(torch.float8_e4m3fn).float().unsqueeze(1)  # with its two NaN
INT8 = _BYTES.view(torch.int8).float().unsqueeze(1)
OFFSET8 = (_BYTES.float() - 128).unsqueeze(1)
OFFSET4 = _nibbles(torch.arange(16.0) - 8)
FP4 = _nibbles(torch.cat([_E2M1, -_E2M1]))


def decoded(bytes_RB: Tensor, table: Tensor) -> Tensor:
    """values_RK, fp32, of uint8; K is B times the numbers in a byte."""
    found = table.index_select(0, bytes_RB.reshape(-1).int())
    return found.view(len(bytes_RB), -1)


def scaled(values_RK: Tensor, scale_RS: Tensor, columns: int) -> Tensor:
    """Multiply, in place, with scales of so many columns each, of which the last may have fewer; fp32."""
    num = values_RK.shape[1]
    if num % columns:
        return values_RK.mul_(spread(scale_RS, columns, num))
    values_RK.view(len(values_RK), -1, columns).mul_(scale_RS.unsqueeze(2))
    return values_RK


def spread(scale_RS: Tensor, columns: int, num: int) -> Tensor:
    """A scale, or a zero, for each of `num` columns."""
    return scale_RS.repeat_interleave(columns, dim=1)[:, :num]
