"""MegaBlocks without a GPU: its Triton kernels under Triton's interpreter, its compiled operators in torch.

For tests and machines without CUDA: the same Python code and the same kernels run, some 1000 times slower. Three gaps
are filled, each only here:
- `megablocks_ops`, the package's seven CUDA operators (sorts and scans), is registered as a module of torch functions;
- Triton's interpreter keeps bf16 as raw 16-bit integers and multiplies those in `dot`, and truncates instead of
  rounding when it stores bf16: both are replaced;
- the autotuner would time its candidates with a CUDA driver: one candidate is left.
The interpreter itself is switched on by TRITON_INTERPRET=1, before anything imports triton.
"""

import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner


def can_interpret() -> bool:
    """Say whether Triton's kernels can run here although there is no GPU."""
    return not torch.cuda.is_available() and triton.knobs.runtime.interpret


def install() -> None:
    """Make `import megablocks` work and its kernels right on this CPU. Calling it twice is harmless.

    Only where `can_interpret()`; must come before the first import of megablocks.
    """
    assert can_interpret(), "MegaBlocks runs on the GPU here, or TRITON_INTERPRET=1 was not set before triton's import"
    install_ops()
    _repair_bfloat16()
    _keep_one_candidate()


def install_ops() -> None:
    """Register the operators of `megablocks_ops`; enough to import megablocks, not to run its kernels."""
    sys.modules.setdefault("megablocks_ops", _operators())


def _operators() -> ModuleType:
    """The module that MegaBlocks imports: the functions of its csrc/ops.cu, with the same arguments and results."""
    module = ModuleType("megablocks_ops")
    scans = (histogram, inclusive_cumsum, exclusive_cumsum)
    for function in (*scans, sort, indices, replicate_forward, replicate_backward):
        setattr(module, function.__name__, function)
    return module


def histogram(x: Tensor, num_bins: int) -> Tensor:
    """-> int32 counts of the values 0 .. num_bins - 1."""
    return torch.bincount(x, minlength=num_bins)[:num_bins].int()


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Rows of a matrix (`dim` is 1), into `out`."""
    out.copy_(x.cumsum(dim))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.cumsum(dim) - x)


def sort(x: Tensor, end_bit: int, x_out: Tensor, iota_out: Tensor) -> None:
    """Stable, by the low `end_bit` bits; `iota_out` gets the permutation."""
    order = (x.long() & ((1 << end_bit) - 1)).argsort(stable=True)
    x_out.copy_(x[order])
    iota_out.copy_(order)


def indices(padded_bins: Tensor, block_size: int, num_block_rows: int, num_block_columns: int, out: Tensor) -> None:
    """Column of each non-zero block: the rows of expert e meet columns [e, e+1) * num_block_columns."""
    starts = torch.arange(num_block_rows) * block_size
    expert = torch.searchsorted(padded_bins, starts, right=True)
    out.copy_((expert[:, None] * num_block_columns + torch.arange(num_block_columns)).flatten())


def replicate_forward(x: Tensor, bins: Tensor, out: Tensor) -> None:
    """Column e of x fills the columns [bins[e-1], bins[e]) of `out`."""
    out.copy_(x.repeat_interleave(_sizes(bins), dim=1))


def replicate_backward(grad: Tensor, bins: Tensor, out: Tensor) -> None:
    """The transpose of `replicate_forward`: sums over each expert's columns."""
    expert = torch.arange(len(bins)).repeat_interleave(_sizes(bins))
    out.zero_().index_add_(1, expert, grad)


def _sizes(bins: Tensor) -> Tensor:
    return bins.long().diff(prepend=torch.zeros(1, dtype=torch.long))


def _repair_bfloat16() -> None:
    builder = interpreter.InterpreterBuilder
    if getattr(builder.create_dot, "exact_bfloat16", False):
        return
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_round(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widen(source.data), tl.float32)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (SimpleNamespace(data=_widen(side.data), dtype=tl.float32) for side in (a, b))
        return dot(self, a, b, *rest)

    create_dot.exact_bfloat16 = True  # type: ignore[attr-defined]
    builder.cast_impl, builder.create_dot = cast_impl, create_dot


def _round(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def _widen(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _keep_one_candidate() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the grouped_gemm package, which is optional
        from megablocks.backend import kernels

    for value in vars(kernels).values():
        if isinstance(value, Autotuner):
            value.configs = value.configs[-1:]
