"""Weights in another form than they are trained in, made of them when they are committed: what rows are computed with.

Legend: E experts, N outputs and K inputs of a matrix (F and D of gate and up, D and F of down), W words of a matrix.
A stack of a form is one buffer [E, W] of 32-bit words, scales and data: the scales of all experts, then their data, each dense
as kernels want it. One expert's words, in the same order, are a row of W: that is what is read, moved and replicated, so that
no data ever is without its scales. A version names it `{layer}.{gate|up|down}.{form}::weight`.
Decisions: made from the optimizer's fp32 master where there is one, else from the weights; whoever takes an expert up takes the
row as it is, so that all replicas have the same bits whatever made them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.config import ModelConfig, why_not
from trinity.errors import ConfigError
from trinity.experts.spec import ShardSpec
from trinity.ops.extension import Matrices
from trinity.ops.stored import FORMATS, Format, Shape, matrices, parts_of
from trinity.rpc.messages import WEIGHT


@dataclass(frozen=True)
class Form(Format):
    """A format as stacks of a shard have it."""

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
        self.keep(stack_EW, at, matrices(self.made(matrix_NK.float())))

    def keep(self, stack_EW: Tensor, at: int, kept: Matrices) -> None:
        """Fill one expert's place with a matrix that is in this form."""
        for part, plane in zip(parts_of(kept), self.parts(stack_EW, kept.sides), strict=True):
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

    def matrices(self) -> list[Matrices]:
        """gate, up and down as products take them."""
        return [matrices(parts) for parts in (self.gate, self.up, self.down)]


FORMS: Mapping[str, Form] = {
    name: Form(each.name, each.planes, each.made, each.read, each.inputs) for name, each in FORMATS.items()
}
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
