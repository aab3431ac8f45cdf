"""Formats of quantised matrices: what a stored byte stands for, and the numbers that bytes and scales mean.

Legend: N outputs and K inputs of a matrix, R some of its rows, B bytes of a row, S scales of a row.
Decisions: a byte is looked up in a table of the numbers in it, the lower bits first, which is how all of these formats are
stored and on a CPU several times as fast as a conversion; a number is (value - zero) * scale in fp32 and is rounded once, to
the type that it is wanted in, so that it has the bits that the formats' own libraries give it. A row or block of zeros has
the scale 1: no reader divides by 0.
"""

import torch
import torch.nn.functional as F
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


MOST_FP8 = 448.0  # the greatest e4m3 number


def to_int8(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """q_NK int8 and scale_N1 fp32, a scale for each row: amax / 127, halves to even."""
    amax_N1 = w_NK.float().abs().amax(1, keepdim=True)
    amax_N1 = torch.where(amax_N1 > 0, amax_N1, 127)
    return (w_NK.float() * (127 / amax_N1)).round_().to(torch.int8), amax_N1 / 127


def to_fp8(w_NK: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """q_NK e4m3 and a scale in fp32 for each block, of which the last in a row or column may be smaller."""
    (n, k), (rows, columns) = w_NK.shape, block
    padded = F.pad(w_NK.float(), (0, -k % columns, 0, -n % rows))
    amax = padded.view(padded.shape[0] // rows, rows, -1, columns).abs().amax((1, 3))
    scale = torch.where(amax > 0, amax, MOST_FP8) / MOST_FP8
    wide_NK = spread(scale.repeat_interleave(rows, dim=0)[:n], columns, k)
    return (w_NK.float() / wide_NK).clamp_(-MOST_FP8, MOST_FP8).to(torch.float8_e4m3fn), scale


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
