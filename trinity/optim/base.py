"""Base of optimizers: the rule by which the tensors of one parameter group change.

Decisions: a rule keeps no state; it is handed old values and the tensors for new ones, which may be the same. All of them are
fp32, whatever the storage type. A rule sits in a file of its own, takes what it needs from the settings, and is named once, in
optimizer.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trinity.config import OptimConfig

WEIGHT = "weight"  # beside the kinds of state: the values themselves, or their fp32 master
Kinds = Mapping[str, Tensor]


@dataclass(frozen=True)
class Matrix:
    """A tensor whose last two dimensions are matrices: [..., fan_out, fan_in], or its transpose in storage."""

    fan_out: int
    fan_in: int


@dataclass(frozen=True)
class Change:
    """One tensor's part in an update: `new` is to follow from `old`, both {kind: tensor} with WEIGHT among the kinds."""

    grad: Tensor  # its values may be used up
    lr: float
    number: int  # of the update, from 1
    matrix: Matrix | None
    old: Kinds
    new: Kinds
    scale: float = 1.0  # of the gradient: the global clip


class Rule(Protocol):
    """One family of optimizers."""

    kinds: tuple[str, ...]  # of state that each tensor has, zero at first; at least one: shards look for it

    def __init__(self, config: OptimConfig): ...

    @staticmethod
    def peak_lr(config: OptimConfig) -> float:
        """The learning rate that a schedule takes its share of."""

    def update(self, change: Change) -> None:
        """Write all kinds of `change.new`. The same bits whether or not they lie over the old ones."""
