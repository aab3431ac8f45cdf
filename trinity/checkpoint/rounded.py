"""Matrices of a model that keeps them in another format than a checkpoint has them in: rounded one by one as they are read.

Legend: N outputs and K inputs of a matrix.
Decision: never is there more of the model in its own type than a few matrices, one to a reader. What is stored in that format
already stays as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trinity.checkpoint.quantised import QuantisedMatrix
from trinity.checkpoint.tensor_file import Part, Reading

if TYPE_CHECKING:
    from trinity.models.common.layers import Linear


@dataclass(frozen=True)
class RoundedPart:
    """One matrix and the part of a model that keeps it, to be read with others. `reading`: how to read it plainly; `matrix`:
    what it is stored as, where it is not plainly."""

    linear: "Linear"
    reading: Callable[[Part], Reading]
    matrix: QuantisedMatrix | None
    part: Part

    @property
    def order(self) -> tuple[str, int]:
        return self._reading_into(torch.empty(self.linear.kept.sides, device="meta")).order

    def read(self) -> None:
        assert self.linear.format is not None, "it is read plainly"
        if self.matrix is not None and (kept := self.matrix.kept_as(self.linear.format.name)) is not None:
            return self.linear.put(kept)
        plain_NK = torch.empty(self.linear.kept.sides)
        self._reading_into(plain_NK).read()
        return self.linear.fill(plain_NK)

    def _reading_into(self, plain_NK: Tensor) -> Reading:
        return self.reading(Part(self.part.key, plain_NK))
