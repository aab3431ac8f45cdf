"""Expert compute in plain torch: rows sorted by expert, then one grouped multiplication or a loop over the experts.

Legend: R rows, A assignments, N rows of one expert, E experts, D model, F expert hidden.

Measured (one thread of an AVX512-BF16 core, torch 2.13, top-4, forward + backward in ms, grouped / loop):

    rows per expert      4-8          32-128       512           2048
    D=F=128, E=8   fp32  1.6 / 3.0    6.3 / 7.6    32 / 26       111 / 98
                   bf16  2.7 / 4.9    4.5 / 6.1    13 / 14       70 / 55
    D=F=512, E=32  fp32  97 / 147     308 / 322    1152 / 1022   -
                   bf16  32 / 43      167 / 174    695 / 500     -

so on CPU the loop takes over between 128 and 512 rows per expert. In fp32 on a CPU neither runs of itself: `in_order`
(trinity/exact) is as fast or faster with any number of rows, and gives a row the same bits in any company. On CUDA the loop
would wait for the row counts and launch three kernels per expert: there it is only for what grouped_mm does not take.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.experts.base import Assignments, LayerAdapters, LayerWeights
from trinity.experts.rows import Adapted, Product, combine, feed_forward, no_rows, sorted_rows, weighted_swiglu
from trinity.ops import batch_invariant
from trinity.ops.gradient_sums import Stacks, Sums
from trinity.state.strides import as_stored

Path = Literal["auto", "in_order", "grouped", "loop"]
Compute = Callable[[Tensor, Tensor, Tensor, LayerWeights, LayerAdapters | None], Tensor]
LOOP_FROM_ROWS = 512  # rows per expert on CPU


class TorchBackend:
    """Works on every device and dtype. `path` fixes what is otherwise chosen from shapes, dtype and row count."""

    name = "torch"

    def __init__(self, path: Path = "auto"):
        self.path = path
        self.is_in_order = path in ("auto", "in_order")  # wherever there is such arithmetic

    def stores_down_transposed(self, device: torch.device) -> bool:
        return device.type == "cpu"  # for `in_order`; the others do not care

    def __call__(
        self,
        x_RD: Tensor,
        assigned: Assignments,
        weights: LayerWeights,
        adapters: LayerAdapters | None = None,
        sums: Sums | None = None,
    ) -> Tensor:
        if not assigned.row_A.numel():
            return no_rows(x_RD, assigned, weights, adapters)
        order, x_AD, weight_A1, end_E = sorted_rows(x_RD, assigned, len(weights.gate_EFD))
        x_AD = x_AD.to(weights.gate_EFD.dtype)
        y_AD = None
        if sums is not None and adapters is None and self.is_in_order:
            y_AD = _trained(x_AD, weight_A1, end_E, weights, sums)
        if y_AD is None:
            y_AD = self._choose(x_AD, weights, adapters)(x_AD, weight_A1, end_E, weights, adapters)
        return combine(y_AD, order, x_RD.dtype)

    def _choose(self, x_AD: Tensor, weights: LayerWeights, adapters: LayerAdapters | None) -> Compute:
        if self.path == "in_order" or (
            self.path == "auto" and batch_invariant.is_for(x_AD) and batch_invariant.is_for(weights.gate_EFD)
        ):
            return in_order
        return grouped if self._use_grouped(x_AD, weights, adapters) else looped

    def _use_grouped(self, x_AD: Tensor, weights: LayerWeights, adapters: LayerAdapters | None) -> bool:
        if self.path != "auto":
            return self.path == "grouped"
        crowded = len(x_AD) >= LOOP_FROM_ROWS * len(weights.gate_EFD)
        return fits_grouped(weights, adapters) and (x_AD.is_cuda or not crowded)


def fits_grouped(weights: LayerWeights, adapters: LayerAdapters | None = None) -> bool:
    """Say whether F.grouped_mm takes these weights: fp32 or bf16, rows of a multiple of 16 bytes, sound gradients.

    On Blackwell the weight gradient of an expert without rows is garbage (pytorch issue 172439, open).
    """
    stack, ranks = weights.gate_EFD, () if adapters is None else (adapters.gate[0].shape[1],)
    if stack.dtype not in (torch.float32, torch.bfloat16):
        return False
    trained = (stack.requires_grad or adapters is not None) and torch.is_grad_enabled()
    if trained and stack.is_cuda and torch.cuda.get_device_capability(stack.device)[0] >= 10:
        return False
    return all(size * stack.element_size() % 16 == 0 for size in (*stack.shape[1:], *ranks))


def _trained(x_AD: Tensor, weight_A1: Tensor, end_E: Tensor, weights: LayerWeights, sums: Sums) -> Tensor | None:
    """`in_order` whose backward adds the weights' gradients to `sums`; None where there is no such arithmetic."""
    from trinity.ops.batch_invariant import trained_mlp

    stored = Stacks(weights.gate_EFD, weights.up_EFD, weights.down_EFD.mT)
    if not trained_mlp.is_for(x_AD, *stored):
        return None
    return trained_mlp.feed_forward(x_AD, weight_A1, stored, end_E, sums)


def in_order(
    x_AD: Tensor, weight_A1: Tensor, end_E: Tensor, weights: LayerWeights, adapters: LayerAdapters | None = None
) -> Tensor:
    """Rows sorted by expert, expert e up to `end_E[e]` -> y_AD: a row's bits do not depend on the others. fp32 on the CPU."""
    from trinity.ops.batch_invariant import (  # a compiler comes with it: only where it is of use
        fused_mlp,
        gemm,
        low_rank,
    )

    stored = weights.gate_EFD, weights.up_EFD, weights.down_EFD.mT
    if adapters is None and batch_invariant.at_once(x_AD, *stored):
        return fused_mlp.feed_forward(x_AD, *stored, end_E, weight_A1.squeeze(1))
    adapted: Adapted | None = None
    if torch.is_grad_enabled() and x_AD.dtype == torch.float32 == weights.gate_EFD.dtype:
        adapted = lambda x, parts, scale: low_rank.grouped(x, parts, scale, end_E)  # noqa: E731
    product: Product = lambda x, stack: gemm.grouped(x, stack, end_E)  # noqa: E731
    return feed_forward(product, x_AD, weight_A1, weights, adapters, adapted)


def grouped(
    x_AD: Tensor, weight_A1: Tensor, end_E: Tensor, weights: LayerWeights, adapters: LayerAdapters | None = None
) -> Tensor:
    """Rows sorted by expert, expert e up to `end_E[e]` -> y_AD. No host synchronisation on Hopper in bf16."""
    offs_E = end_E.int()
    return feed_forward(lambda x, stack: F.grouped_mm(x, stack.mT, offs=offs_E), x_AD, weight_A1, weights, adapters)


def looped(
    x_AD: Tensor, weight_A1: Tensor, end_E: Tensor, weights: LayerWeights, adapters: LayerAdapters | None = None
) -> Tensor:
    """The same, an expert at a time. `unbind`: indexing the stack would zero a whole gradient stack for each expert."""
    counts = end_E.diff(prepend=end_E.new_zeros(1)).tolist()
    if adapters is not None:
        return feed_forward(partial(_product, counts), x_AD, weight_A1, weights, adapters)
    stored, is_FD = as_stored(weights.down_EFD), weights.down_EFD.is_contiguous()
    stacks = (weights.gate_EFD.unbind(0), weights.up_EFD.unbind(0), stored.unbind(0))
    parts = zip(x_AD.split(counts), weight_A1.split(counts), *stacks, strict=True)
    return torch.cat([_expert(*part, is_FD) for part in parts if len(part[0])])


def _product(counts: list[int], x_AK: Tensor, stack_ENK: Tensor) -> Tensor:
    parts = zip(x_AK.split(counts), stack_ENK.unbind(0), strict=True)
    return torch.cat([x_NK @ matrix_NK.T for x_NK, matrix_NK in parts if len(x_NK)])


def _expert(x_ND: Tensor, weight_N1: Tensor, gate_FD: Tensor, up_FD: Tensor, down: Tensor, is_FD: bool) -> Tensor:
    return weighted_swiglu(x_ND @ gate_FD.T, x_ND @ up_FD.T, weight_N1) @ (down if is_FD else down.T)
