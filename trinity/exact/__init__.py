"""Arithmetic that gives a row the same bits whatever shares its batch, in training as in serving: fp32 on a CPU.

What imports from here does so where it is used, because a compiler (numba) comes with it.
"""

from torch import Tensor, float32


def is_for(x: Tensor) -> bool:
    """Whether there is exact arithmetic for tensors like x."""
    return x.is_cpu and x.dtype is float32
