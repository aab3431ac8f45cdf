"""Sums that a backward adds the gradients of experts' weights to itself, instead of making them for somebody to add.

Legend: E experts, D model, F hidden.
"""

from typing import NamedTuple

from torch import Tensor


class Stacks(NamedTuple):
    """Weights of experts, or sums of their gradients, each as it lies in memory."""

    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor


class Sums:
    """Sums that a backward is to add the gradients of weights to: float32, said before it runs (`add_to`), for one time.

    `is_used`: the forward has promised to; otherwise the weights are leaves of autograd's graph."""

    def __init__(self) -> None:
        self.is_used = self._is_new = False
        self._stacks: Stacks | None = None

    def add_to(self, stacks: Stacks, is_new: bool) -> None:
        """The next backward adds to these, or with `is_new` puts its gradients there, whatever they held."""
        self._stacks, self._is_new = stacks, is_new

    def take(self) -> tuple[Stacks, bool] | None:
        """The stacks, and are they new; None: nobody wants these gradients, or a backward has added to them."""
        stacks, self._stacks = self._stacks, None
        return None if stacks is None else (stacks, self._is_new)
