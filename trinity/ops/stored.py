"""Formats that matrices are kept in for inference: the parts of each, how they are made of a matrix, and what they mean.

Legend: N outputs and K inputs of a matrix, B bytes and S scales of a row.
Decision: scales go before the data, so that what is one piece of memory has its words in order (trinity/experts/derived.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.config import FP4_GROUP
from trinity.ops import formats
from trinity.ops.extension import Matrices

BLOCK = (128, 128)  # of fp8
Shape = tuple[int, int]


class Plane(NamedTuple):
    """A part of a format: its numbers for one matrix."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_words(self) -> int:
        return ceil(prod(self.shape) * self.dtype.itemsize / 4)


@dataclass(frozen=True)
class Format:
    """A format by its name. `planes`: its parts for a matrix of that shape; `made`: these parts of a matrix, fp32; `read`: the
    matrix, fp32, that they mean."""

    name: str
    planes: Callable[[Shape], tuple[Plane, ...]]
    made: Callable[[Tensor], tuple[Tensor, ...]]
    read: Callable[..., Tensor]
    inputs: int = 1  # a matrix has a multiple of so many


def matrices(parts: Sequence[Tensor]) -> Matrices:
    """Parts of a format, of one matrix or a stack, as products take them."""
    return Matrices(parts[-1], *parts[:-1])


def made(w_NK: Tensor, name: str) -> Matrices:
    """A matrix in that format. Raises InvalidRequest if K is too large for int8's sums."""
    return matrices(FORMATS[name].made(w_NK.float()))


def parts_of(kept: Matrices) -> list[Tensor]:
    """The inverse."""
    return [part for part in (*kept[1:], kept.values) if part is not None]


def _float(dtype: torch.dtype) -> Format:
    name = str(dtype).removeprefix("torch.")
    return Format(name, lambda shape: (Plane(dtype, shape),), lambda w: (w.to(dtype),), lambda w: w.float())


def _int8_made(w_NK: Tensor) -> tuple[Tensor, ...]:
    from trinity.ops.quantised import quantised  # a compiler comes with it

    made = quantised(w_NK)
    return made.scale, made.total, made.q


def _fp8_made(w_NK: Tensor) -> tuple[Tensor, ...]:
    q_NK, scale = formats.to_fp8(w_NK, BLOCK)
    return scale, q_NK.view(torch.uint8)


def _fp8_read(scale: Tensor, bytes_NK: Tensor) -> Tensor:
    from trinity.ops.unpack import unpacked  # a compiler comes with it

    num_out, num_in = bytes_NK.shape
    rows = scale.repeat_interleave(BLOCK[0], dim=0)[:num_out]
    return unpacked(bytes_NK, formats.FP8, rows, min(BLOCK[1], num_in))


def _fp4_made(w_NK: Tensor) -> tuple[Tensor, ...]:
    bytes_NB, scale_NS, overall = formats.to_fp4(w_NK)
    return overall, scale_NS.view(torch.uint8), bytes_NB


def _fp4_read(overall: Tensor, scale_NS: Tensor, bytes_NB: Tensor) -> Tensor:
    from trinity.ops.unpack import unpacked  # a compiler comes with it

    scales = unpacked(scale_NS, formats.FP8, torch.ones(len(scale_NS), 1), scale_NS.shape[1]) / overall
    return unpacked(bytes_NB, formats.FP4, scales, FP4_GROUP)


INT8 = Format(
    "int8",
    lambda s: (Plane(torch.float32, s[:1]), Plane(torch.int32, s[:1]), Plane(torch.int8, s)),
    _int8_made,
    lambda scale_N, total_N, q_NK: q_NK.float() * scale_N.unsqueeze(1),
)
FP8 = Format(
    "fp8",
    lambda s: (Plane(torch.float32, (ceil(s[0] / BLOCK[0]), ceil(s[1] / BLOCK[1]))), Plane(torch.uint8, s)),
    _fp8_made,
    _fp8_read,
)
NVFP4 = Format(
    "nvfp4",
    lambda s: (
        Plane(torch.float32, (1,)),
        Plane(torch.uint8, (s[0], s[1] // FP4_GROUP)),
        Plane(torch.uint8, (s[0], s[1] // 2)),
    ),
    _fp4_made,
    _fp4_read,
    inputs=FP4_GROUP,
)
FORMATS: Mapping[str, Format] = {
    each.name: each for each in (_float(torch.float32), _float(torch.bfloat16), INT8, FP8, NVFP4)
}
