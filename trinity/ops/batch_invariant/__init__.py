"""Arithmetic that gives a row the same bits whatever shares its batch, in training as in serving, on a CPU.

fp32, or bf16 whose sums are fp32 and are rounded once. What imports from here does so where it is used, because a compiler
(numba) comes with it.
"""

from torch import Tensor, bfloat16, float32, is_grad_enabled

from trinity import native


def is_for(x: Tensor) -> bool:
    """Say whether there is exact arithmetic for tensors like x."""
    return x.is_cpu and x.dtype in (float32, bfloat16)


def at_once(x: Tensor, *weights: Tensor) -> bool:
    """Say whether several products may be made of x in one go: without gradients, of whole matrices of x's type, which is fp32,
    or bf16 where there is the extension."""
    whole = all(w.dtype == x.dtype and w.is_contiguous() and w.numel() for w in weights)
    fits = x.dtype == float32 or native.lib is not None
    return whole and is_for(x) and fits and x.numel() > 0 and not is_grad_enabled()
