"""Weights in another form than they are trained in, made of them when they are committed: what rows are computed with.

Legend: E experts, N outputs and K inputs of a matrix (F and D of gate and up, D and F of down), W words of a matrix.
A stack of a form is one buffer [E, W] of 32-bit words, scales and data: the scales of all experts, then their data, each dense
as kernels want it. One expert's words, in the same order, are a row of W: that is what is read, moved and replicated, so that
no data ever is without its scales. A version names it `{layer}.{gate|up|down}.{form}::weight`.
Decisions: made from the optimizer's fp32 master where there is one, else from the weights; whoever takes an expert up takes the
row as it is, so that all replicas have the same bits whatever made them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.config import FP4_GROUP, ModelConfig, why_not
from trinity.errors import ConfigError
from trinity.experts.spec import ShardSpec
from trinity.ops import extension, formats
from trinity.ops.extension import Matrices
from trinity.rpc.messages import WEIGHT

BLOCK = (128, 128)  # of fp8
Shape = tuple[int, int]


class Plane(NamedTuple):
    """A part of a form: its numbers for one matrix."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_words(self) -> int:
        return ceil(prod(self.shape) * self.dtype.itemsize / 4)


@dataclass(frozen=True)
class Form:
    """A form by its name. `planes`: its parts for a matrix of that shape; `made`: these parts of a matrix, fp32; `read`: the
    matrix, fp32, that they mean, of one expert."""

    name: str
    planes: Callable[[Shape], tuple[Plane, ...]]
    made: Callable[[Tensor], tuple[Tensor, ...]]
    read: Callable[..., Tensor]
    inputs: int = 1  # a matrix has a multiple of so many

    @property
    def kind(self) -> str:
        """The kind of rows that it is, in the words of stacked.py."""
        return f"{self.name}.{WEIGHT}"

    def num_words(self, shape: Shape) -> int:
        return sum(plane.num_words for plane in self.planes(shape))

    def empty(self, shape: Shape, num: int = 0) -> Tensor:
        return torch.empty((num, self.num_words(shape)), dtype=torch.int32)

    def parts(self, stack_EW: Tensor, shape: Shape) -> list[Tensor]:
        """Its planes [E, ...], which are the stack's memory."""
        blocks = zip(self.planes(shape), self._blocks(stack_EW, shape), strict=True)
        return [b.view(p.dtype)[:, : prod(p.shape)].view(len(b), *p.shape) for p, b in blocks]

    def row(self, stack_EW: Tensor, at: int, shape: Shape) -> Tensor:
        """row_W of one expert, a copy."""
        return torch.cat([block[at] for block in self._blocks(stack_EW, shape)])

    def put(self, stack_EW: Tensor, at: int, shape: Shape, row_W: Tensor) -> None:
        """Make that row the expert's."""
        blocks = self._blocks(stack_EW, shape)
        pieces = row_W.split([block.shape[1] for block in blocks])
        for block, piece in zip(blocks, pieces, strict=True):
            block[at] = piece

    def derive(self, stack_EW: Tensor, at: int, matrix_NK: Tensor) -> None:
        """Fill one expert's place from its matrix."""
        shape = (matrix_NK.shape[0], matrix_NK.shape[1])
        for part, plane in zip(self.made(matrix_NK.float()), self.parts(stack_EW, shape), strict=True):
            plane[at] = part

    def _blocks(self, stack_EW: Tensor, shape: Shape) -> list[Tensor]:
        num, sizes = len(stack_EW), [plane.num_words for plane in self.planes(shape)]
        pieces = stack_EW.view(-1).split([num * size for size in sizes])
        return [piece.view(num, size) for piece, size in zip(pieces, sizes, strict=True)]


class DerivedLayer(NamedTuple):
    """A layer's experts in a form: the planes of each projection, in the checkpoint's orientation."""

    form: Form
    gate: list[Tensor]
    up: list[Tensor]
    down: list[Tensor]

    def matrices(self) -> list[Matrices] | None:
        """gate, up and down as the kernels of products take them; None: these have to be unpacked first."""
        parts = (self.gate, self.up, self.down)
        if self.form is INT8:
            return [Matrices(q, scale, total) for scale, total, q in parts]
        return [Matrices(values) for (values,) in parts] if len(self.gate) == 1 else None

    def packed(self) -> tuple[int, list[Matrices]]:
        """The others' format and matrices, as the extension unpacks them; a scale goes before its values."""
        planes = ([plane.contiguous() for plane in part] for part in (self.gate, self.up, self.down))
        if self.form is FP8:
            return extension.FP8, [Matrices(values, scale) for scale, values in planes]
        return extension.NVFP4, [Matrices(values, overall, scale) for overall, scale, values in planes]


def _float(dtype: torch.dtype) -> Form:
    name = str(dtype).removeprefix("torch.")
    return Form(name, lambda shape: (Plane(dtype, shape),), lambda w: (w.to(dtype),), lambda w: w.float())


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
    return unpacked(bytes_NB, formats.FP4, scales, 16)


INT8 = Form(
    "int8",
    lambda s: (Plane(torch.float32, s[:1]), Plane(torch.int32, s[:1]), Plane(torch.int8, s)),
    _int8_made,
    lambda scale_N, total_N, q_NK: q_NK.float() * scale_N.unsqueeze(1),
)
FP8 = Form(
    "fp8",
    lambda s: (Plane(torch.float32, (ceil(s[0] / BLOCK[0]), ceil(s[1] / BLOCK[1]))), Plane(torch.uint8, s)),
    _fp8_made,
    _fp8_read,
)
NVFP4 = Form(
    "nvfp4",
    lambda s: (
        Plane(torch.float32, (1,)),
        Plane(torch.uint8, (s[0], s[1] // 16)),
        Plane(torch.uint8, (s[0], s[1] // 2)),
    ),
    _fp4_made,
    _fp4_read,
    inputs=FP4_GROUP,
)
FORMS: Mapping[str, Form] = {f.name: f for f in (INT8, FP8, NVFP4, _float(torch.float32), _float(torch.bfloat16))}
IS_FORM = {form.kind for form in FORMS.values()}


def form_of(kind: str) -> Form | None:
    """The form that rows of a kind are in; None for what takes steps, adapters and optimizer state."""
    return FORMS[kind.partition(".")[0]] if kind in IS_FORM else None


def form_for(spec: ShardSpec) -> Form | None:
    """The form in which a shard computes inference; None: as it has the weights. Raises ConfigError where it cannot."""
    name, model = spec.expert_dtype, spec.model
    if name is None or name == model.dtype:
        return None
    rank, sides = spec.optim.lora.rank if spec.optim else 0, (model.hidden_size, model.moe_intermediate_size)
    if (why := why_not(name, sides, spec.device, rank)) is not None:
        raise ConfigError(why)
    return FORMS[name]


def shapes_of(model: ModelConfig) -> Sequence[Shape]:
    """Shapes of gate, up and down in a checkpoint."""
    f, d = model.moe_intermediate_size, model.hidden_size
    return (f, d), (f, d), (d, f)
