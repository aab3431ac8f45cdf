"""Arithmetic that gives a row the same bits whatever shares its batch, in training as in serving, on a CPU.

fp32, or bf16 whose sums are fp32 and are rounded once. What imports from here does so where it is used, because a compiler
(numba) comes with it.
"""

from torch import Tensor, bfloat16, float32


def is_for(x: Tensor) -> bool:
    """Whether there is exact arithmetic for tensors like x."""
    return x.is_cpu and x.dtype in (float32, bfloat16)
