"""Moving rows to their experts and back, and the activation between: what the backends share.

Legend: R rows, A assignments, P rows in expert order (A, or more where a kernel pads), D model, F expert hidden.

Decisions:
- `gather` and `combine` are each other's transpose: one description of the order serves forward and backward of both.
- Every sum over experts, the backward of `gather` included, is taken in fp32 in a fixed order and rounded once.
- The routing weight multiplies the hidden activations, inside the fp32 activation function: sum_a w_a (h_a down) =
  sum_a (w_a h_a) down. Nothing of A x D is scaled or kept for the gradient of the weights, and of A x F only the two
  projections are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from trinity.experts.base import Assignments, LayerAdapters, LayerWeights, Pair
from trinity.ops import batch_invariant

Product = Callable[[Tensor, Tensor], Tensor]  # rows in expert order [P, K], matrices [E, N, K] -> [P, N]
Adapted = Callable[
    [Tensor, list[tuple[Tensor, ...]], float], Sequence[Tensor]
]  # rows, (W, A, B) of each product, scale


class Order(Protocol):
    """Order of a caller's rows among the rows sorted by expert. Linear maps, outside autograd."""

    def spread(self, x_RD: Tensor) -> Tensor:
        """-> x_PD: a copy of its row for every assignment, in x's dtype; zeros where padded."""
        ...

    def collect(self, y_PD: Tensor) -> Tensor:
        """-> sum_RD: for every row the sum over its assignments, at least fp32. The transpose of `spread`."""
        ...


@dataclass(frozen=True)
class SortedOrder:
    """Plain torch: assignment p in expert order belongs to row `row_P[p]`."""

    row_P: Tensor
    num_rows: int

    def spread(self, x_RD: Tensor) -> Tensor:
        return x_RD.index_select(0, self.row_P)

    def collect(self, y_PD: Tensor) -> Tensor:
        return sum_rows(y_PD, self.row_P, self.num_rows)


def sum_rows(y_AD: Tensor, row_A: Tensor, num_rows: int) -> Tensor:
    """sum_RD[r] = sum of y[a] with row_A[a] == r, in fp32 (fp64 for fp64), the same bits every time."""
    y_AD = y_AD.to(accumulator(y_AD.dtype))
    sum_RD = y_AD.new_zeros(num_rows, y_AD.shape[1])
    if y_AD.is_cuda:  # index_add_ would add in any order; this sorts first. index_put_ would wait for a check of bounds
        return torch.ops.aten._index_put_impl_(sum_RD, [row_A], y_AD, accumulate=True, unsafe=True)
    return sum_RD.index_add_(0, row_A, y_AD)


class Sorted(NamedTuple):
    """Rows of a call in the order of their experts: where each belongs, the rows, their weights, and the ends of experts."""

    order: SortedOrder
    x_AD: Tensor
    weight_A1: Tensor
    end_E: Tensor


def sorted_rows(x_RD: Tensor, assigned: Assignments, num_experts: int) -> Sorted:
    """Rows sorted by expert, expert e up to `end_E[e]`."""
    expert_A, order_A = assigned.expert_A.sort(stable=True)
    order = SortedOrder(assigned.row_A.index_select(0, order_A), len(x_RD))
    weight_A1 = assigned.weight_A.index_select(0, order_A).unsqueeze(1)
    end_E = torch.searchsorted(expert_A, torch.arange(num_experts, device=x_RD.device), right=True)
    return Sorted(order, gather(x_RD, order), weight_A1, end_E)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, order: Order) -> Tensor:
        ctx.order, ctx.dtype = order, x_RD.dtype
        return order.spread(x_RD)

    @staticmethod
    def backward(ctx: Any, dx_PD: Tensor) -> tuple[Tensor, None]:
        return ctx.order.collect(dx_PD).to(ctx.dtype), None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, order: Order, dtype: torch.dtype) -> Tensor:
        ctx.order, ctx.dtype = order, y_PD.dtype
        return order.collect(y_PD).to(dtype)

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.order.spread(dy_RD.to(ctx.dtype)), None, None


def gather(x_RD: Tensor, order: Order) -> Tensor:
    """-> x_PD in x's dtype. Differentiable in x."""
    return _Gather.apply(x_RD, order)


def combine(y_PD: Tensor, order: Order, dtype: torch.dtype) -> Tensor:
    """-> y_RD in `dtype`, rounded once from the fp32 sums. Differentiable in y."""
    return _Combine.apply(y_PD, order, dtype)


class _WeightedSwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        if batch_invariant.is_for(gate):
            from trinity.ops.batch_invariant.elementwise import gated

            return gated(gate, up, weight)
        kind = accumulator(gate.dtype)
        return F.silu(gate.to(kind)).mul_(up.to(kind)).mul_(weight).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if batch_invariant.is_for(grad):
            from trinity.ops.batch_invariant.elementwise import gated_gradients

            return gated_gradients(grad, *ctx.saved_tensors)
        kind = accumulator(grad.dtype)
        gate, up, weight = (t.to(kind) for t in ctx.saved_tensors)
        silu, grad = F.silu(gate), grad.to(kind)
        dweight = (grad * silu).mul_(up).sum(-1, keepdim=True)
        grad = grad * weight
        dgate = torch.ops.aten.silu_backward(grad * up, gate)
        stored = ctx.saved_tensors[0].dtype
        return dgate.to(stored), grad.mul_(silu).to(stored), dweight.to(ctx.saved_tensors[2].dtype)


def weighted_swiglu(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up * weight in fp32, rounded once to gate's dtype. Differentiable in all three.

    gate and up [..., F] of one dtype; weight [..., 1], of the same leading shape.
    """
    return _WeightedSwiGLU.apply(gate, up, weight)


def feed_forward(
    product: Product,
    x_PD: Tensor,
    weight_P1: Tensor,
    weights: LayerWeights,
    adapters: LayerAdapters | None = None,
    adapted: Adapted | None = None,
) -> Tensor:
    """-> y_PD: rows in expert order through their experts, times their weights, by a backend's product. `adapted`: one that has
    matrices with adapters at once, and several of the same rows."""

    def projected(x: Tensor, *parts: tuple[Tensor, Pair | None]) -> Sequence[Tensor]:
        if adapters is None:
            return [product(x, stack) for stack, _ in parts]
        triples = [(stack, *(part.to(x.dtype) for part in pair)) for stack, pair in parts if pair is not None]
        if adapted is not None:
            return adapted(x, triples, adapters.scale)
        shares = [product(product(x, a) * adapters.scale, b) for _, a, b in triples]
        return [
            product(x, stack).add_(share) for (stack, _), share in zip(parts, shares, strict=True)
        ]  # no other memory

    pairs = (None, None, None) if adapters is None else adapters[:3]
    gate, up = projected(x_PD, (weights.gate_EFD, pairs[0]), (weights.up_EFD, pairs[1]))
    [y_PD] = projected(weighted_swiglu(gate, up, weight_P1), (weights.down_EFD.mT, pairs[2]))
    return y_PD


class _NoRows(Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(x_RD, *others)
        return torch.zeros_like(x_RD)

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> Any:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        return tuple(torch.zeros_like(tensor) if wanted else None for tensor, wanted in needed)


def no_rows(
    x_RD: Tensor, assigned: Assignments, weights: LayerWeights, adapters: LayerAdapters | None = None
) -> Tensor:
    """The answer when there is no assignment: zeros, and zero gradients (grouped_mm's backward refuses 0 rows)."""
    pairs = () if adapters is None else adapters[:3]
    return _NoRows.apply(x_RD, assigned.weight_A, *weights, *(part for pair in pairs for part in pair))
