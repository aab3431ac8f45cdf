"""Strides of stacks of weights in memory."""

from torch import Tensor


def as_stored(stack: Tensor) -> Tensor:
    """The same numbers with the last dimension dense in memory: the stack itself, or its transpose."""
    return stack.mT if stack.ndim > 1 and stack.stride(-1) != 1 and stack.stride(-2) == 1 else stack
