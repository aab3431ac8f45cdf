"""Adapters of a pass: several of them, and none, for rows that are computed together over one backbone.

Legend: T tokens of the pass, R those of one adapter, N outputs and K inputs of a matrix, r rank.
Decisions: the product with W is made of all rows at once, as where no adapter is; then each adapter adds its share to its own
rows, so that the others keep their bits and a row's do not depend on its company. A pass without adapters does nothing here.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from trinity.config import AdapterRef
from trinity.models.common.experts import ExpertLayer, Pending

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trinity.models.common.layers import Linear

RowAdapters = tuple[Tensor, Mapping[int, str]]  # content_T of each row's adapter (0: none), and each one's source


@dataclass(frozen=True, eq=False)
class BackboneAdapter:
    """The part of an adapter that is beside matrices of the backbone: A [r, K] and B [N, r] by the matrix's name in a
    checkpoint without `.weight`, in the model's type, on its device. y = x W^T + scale x A^T B^T."""

    ref: AdapterRef
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scale: float


class PassAdapters:
    """Adapters of one pass, `adapters_T` by token."""

    def __init__(self, adapters_T: Sequence[BackboneAdapter | None], device: torch.device):
        runs = [(adapter, len([*run])) for adapter, run in groupby(adapters_T)]
        own = dict.fromkeys(adapter for adapter, _ in runs if adapter is not None)
        contents = [0 if adapter is None else adapter.ref.content for adapter in adapters_T]
        content_T = torch.tensor(contents, dtype=torch.int64)
        self._by_row: RowAdapters = content_T, {adapter.ref.content: adapter.ref.source for adapter in own}
        self._all = {adapter: _rows(content_T == adapter.ref.content, device) for adapter in own}

    def has(self, name: str) -> bool:
        """Has any of them something beside that matrix?"""
        return any(name in adapter.pairs for adapter in self._all)

    def add(self, part: "Linear", x: Tensor, y: Tensor) -> Tensor:
        """Add to y [T, N], in place, what they add to the part's product with x [T, K]."""
        for adapter, row_R in self._all.items():
            if (pair := adapter.pairs.get(part.name)) is not None:
                a_rK, b_Nr = pair
                own = x if row_R is None else x.index_select(0, row_R)
                share = part.times(part.times(own, a_rK) * adapter.scale, b_Nr)
                y = y.add_(share) if row_R is None else y.index_add_(0, row_R, share)
        return y

    def over(self, experts: ExpertLayer) -> ExpertLayer:
        """The experts, called with each row's adapter."""
        return _AdaptedExperts(experts, self._by_row)  # type: ignore[arg-type]  # a dispatcher's: nobody else serves


def _rows(is_own_T: Tensor, device: torch.device) -> Tensor | None:
    """The rows of one adapter; None: all."""
    return None if bool(is_own_T.all()) else is_own_T.nonzero().squeeze(1).to(device)


class _KnowsAdapters(Protocol):
    priority: int

    def begin(
        self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, adapters: RowAdapters | None = None
    ) -> Pending: ...


class _AdaptedExperts:
    def __init__(self, experts: _KnowsAdapters, adapters: RowAdapters):
        self._experts, self._adapters, self.priority = experts, adapters, experts.priority

    def begin(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Pending:
        return self._experts.begin(layer, x_TD, ids_TK, weights_TK, self._adapters)


class Passing:
    """Knowledge that the matrices of one model have of the pass that is being computed. For one thread."""

    def __init__(self) -> None:
        self.adapters: PassAdapters | None = None

    @contextmanager
    def of(self, adapters: PassAdapters | None) -> "Iterator[None]":
        """Inside, the pass is one with these adapters."""
        self.adapters = adapters
        try:
            yield
        finally:
            self.adapters = None
