"""Matrices of a model that keeps them in another format than a checkpoint has them in: rounded one by one as they are read.

Legend: N outputs and K inputs of a matrix.
Decision: never is there more of the model in its own type than a few matrices, one to a reader. What is stored in int8 with a
scale for each row stays as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trinity.checkpoint.quantised import QuantisedMatrix
from trinity.checkpoint.tensor_file import Part, Reading
from trinity.ops.extension import Matrices

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
        return self.reading(self.part).order

    def read(self) -> None:
        if (kept := self._as_stored()) is not None:
            return self.linear.put(kept)
        plain_NK = torch.empty(self.linear.weight.shape)
        self.reading(Part(self.part.key, plain_NK)).read()
        return self.linear.fill(plain_NK)

    def _as_stored(self) -> Matrices | None:
        if self.matrix is None or self.linear.weight.dtype != torch.int8 or (found := self.matrix.as_int8()) is None:
            return None
        from trinity.ops.quantised import with_totals  # a compiler comes with it

        return Matrices(*with_totals(*found))
