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


MOST_FP8, LEAST_FP8 = 448.0, 2.0**-9  # the greatest e4m3 number, and the least above 0
_MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # between E2M1 numbers
_FP4_BOUNDS = torch.where(
    torch.arange(7) % 2 == 1, torch.nextafter(_MIDDLES, torch.zeros(7)), _MIDDLES
)  # halves to even


def to_int8(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """q_NK int8 and scale_N1 fp32, as quantised.py rounds."""
    from trinity.ops.quantised import quantised  # a compiler comes with it

    made = quantised(w_NK.float())
    return made.q, torch.where(made.scale == 0, 1, made.scale).unsqueeze(1)


def to_fp8(w_NK: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """q_NK e4m3 and a scale in fp32 for each block, of which the last in a row or column may be smaller."""
    (n, k), (rows, columns) = w_NK.shape, block
    padded = F.pad(w_NK.float(), (0, -k % columns, 0, -n % rows))
    amax = padded.view(padded.shape[0] // rows, rows, -1, columns).abs().amax((1, 3))
    scale = torch.where(amax > 0, amax, MOST_FP8) / MOST_FP8
    wide_NK = spread(scale.repeat_interleave(rows, dim=0)[:n], columns, k)
    return (w_NK.float() / wide_NK).clamp_(-MOST_FP8, MOST_FP8).to(torch.float8_e4m3fn), scale


def to_fp4(w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of two E2M1 numbers each [N, K / 2], an e4m3 scale for each 16 of a row, and one of these scales (fp32, divides).
    K is a multiple of 16."""
    groups = w_NK.float().unflatten(1, (-1, 16))
    amax = groups.abs().amax()
    overall = MOST_FP8 * 6 / torch.where(amax > 0, amax, 1)
    scale_NS = (groups.abs().amax(2) / 6 * overall).clamp_(LEAST_FP8, MOST_FP8).to(torch.float8_e4m3fn)
    values = groups / (scale_NS.float() / overall).unsqueeze(2)
    codes = torch.bucketize(values.abs().contiguous(), _FP4_BOUNDS).to(torch.uint8) + 8 * (values < 0)
    low, high = codes.flatten(1).unflatten(1, (-1, 2)).unbind(2)
    return (low | (high << 4)).to(torch.uint8), scale_NS, overall.view(1)


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
