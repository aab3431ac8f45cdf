"""Expert compute with MegaBlocks' dropless kernels (Gale et al., 2022, arXiv:2211.15841).

Legend: R rows, A assignments, P rows in expert order (padded per expert to the tile), N non-zero blocks, B = 128 block
edge, E experts, D model, F expert hidden.

Three paths share MegaBlocks' radix sort, histogram, scans and its copy kernel:
- `sparse`: block-sparse products (stk sdd and dsd) over rows padded to 128 per expert; waits for the padded row count.
- `grouped`: torch's grouped multiplication, no padding and no host synchronisation; what decoding wants.
- `gmm`: the multiplication of the `grouped_gemm` package (bf16, row counts on the host); only when asked for.

Decisions:
- Padding to 128 multiplies the work by up to 128 at few rows, so `auto` takes `sparse` from 128 rows per expert on.
- The copy kernel is launched here, not through `ops.gather`: given the rows' own indices it copies each row once for
  each of its experts, whatever their number, and it stores fp32 for the sums. The ops want one top-k for all rows and
  round every term to bf16 before the sum.
- Adapters are always computed by `grouped`: the other products have no room for matrices of low rank.
- Block indices are int32: stk multiplies them by 128 in their own type, and MegaBlocks' int16 overflows at 256 blocks.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "Grouped GEMM not available": optional here
    import megablocks.ops as ops
    import stk
    from megablocks import grouped_gemm_util
    from megablocks.backend import kernels

from trinity.errors import ConfigError
from trinity.experts.base import Assignments, LayerAdapters, LayerWeights
from trinity.experts.rows import combine, gather, no_rows, sum_rows, weighted_swiglu
from trinity.experts.torch_backend import fits_grouped, grouped, looped
from trinity.ops.gradient_sums import Sums

Path = Literal["auto", "sparse", "grouped", "gmm"]
BLOCK = 128
INT32_MAX = 2**31 - 1  # offsets inside the kernels
MAX_BLOCK_COLUMNS = 2**15 - 1  # MegaBlocks writes the topology as int16


class MegaBlocksBackend:
    """Needs CUDA, or Triton's interpreter (megablocks_cpu.py). `path` fixes what the shapes would choose."""

    name = "megablocks"

    def __init__(self, path: Path = "auto"):
        if path == "gmm" and grouped_gemm_util.ops is None:
            raise ConfigError("path gmm needs the grouped_gemm package; install it or use path grouped")
        self.path = path

    def stores_down_transposed(self, device: torch.device) -> bool:
        return False

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
        path: Path = "grouped" if adapters is not None else self._choose(assigned.row_A.numel(), weights)
        order = BinnedOrder.build(assigned, len(x_RD), len(weights.gate_EFD), tile=BLOCK if path == "sparse" else 1)
        x_PD = gather(x_RD, order).to(weights.gate_EFD.dtype)
        weight_P1 = order.spread_weights(assigned.weight_A)
        if adapters is None:
            y_PD = _COMPUTE[path](x_PD, weight_P1, order, weights)
        else:
            y_PD = _grouped(x_PD, weight_P1, order, weights, adapters)
        return combine(y_PD, order, x_RD.dtype)

    def _choose(self, num_assigned: int, weights: LayerWeights) -> Path:
        """The path for this many assignments. Raises ConfigError where the kernels would overflow or do not fit."""
        num_experts, ffn, dim = weights.gate_EFD.shape
        largest = (num_assigned + BLOCK * num_experts) * max(ffn, dim)
        if largest > INT32_MAX:
            raise ConfigError(
                f"{num_assigned} assignments to experts of {ffn} x {dim} exceed MegaBlocks' int32 offsets "
                f"({largest} > {INT32_MAX}); send fewer rows at once (train.micro_batch_size) or use backend torch"
            )
        fits = fits_sparse(weights)
        if self.path == "sparse" and not fits:
            raise ConfigError(
                f"path sparse needs multiples of {BLOCK} and at most {MAX_BLOCK_COLUMNS * BLOCK} hidden units in all; "
                f"{num_experts} experts of {ffn} x {dim} do not fit: use path grouped"
            )
        if self.path != "auto":
            return self.path
        return "sparse" if fits and num_assigned >= BLOCK * num_experts else "grouped"


def fits_sparse(weights: LayerWeights) -> bool:
    """Say whether the block-sparse kernels take this layer: multiples of 128, indices within int16 and int32."""
    num_experts, ffn, dim = weights.gate_EFD.shape
    whole = ffn % BLOCK == 0 and dim % BLOCK == 0
    return whole and num_experts * ffn // BLOCK <= MAX_BLOCK_COLUMNS and weights.gate_EFD.numel() <= INT32_MAX


@dataclass(frozen=True)
class BinnedOrder:
    """Assignments sorted by expert, each expert's rows padded to a multiple of the tile. All counts are int32."""

    num_rows: int
    num_padded: int
    row_A: Tensor  # in the caller's order
    sorted_A: Tensor  # the assignment at each sorted position
    source_A: Tensor  # its row
    expert_A: Tensor  # its expert
    size_E: Tensor
    end_E: Tensor
    padded_end_E: Tensor

    @classmethod
    def build(cls, assigned: Assignments, num_rows: int, num_experts: int, tile: int) -> "BinnedOrder":
        """Sorts on the device; waits for it only where rows are padded (`tile` > 1)."""
        expert_A, sorted_A = ops.sort(assigned.expert_A.int(), max((num_experts - 1).bit_length(), 1))
        size_E = ops.histogram(expert_A, num_experts)
        end_E = _running_sum(size_E)
        padded_end_E = _running_sum(ops.round_up(size_E, tile)) if tile > 1 else end_E
        num_padded = int(padded_end_E[-1]) if tile > 1 else len(expert_A)
        source_A = assigned.row_A.int().index_select(0, sorted_A)
        return cls(num_rows, num_padded, assigned.row_A, sorted_A, source_A, expert_A, size_E, end_E, padded_end_E)

    def spread(self, x_RD: Tensor) -> Tensor:
        make = x_RD.new_zeros if self.num_padded > len(self.row_A) else x_RD.new_empty
        x_PD = make(self.num_padded, x_RD.shape[1])
        self._copy(x_RD.contiguous(), x_PD, self.source_A, to_sorted=True)
        return x_PD

    def collect(self, y_PD: Tensor) -> Tensor:
        y_AD = y_PD.new_empty(len(self.row_A), y_PD.shape[1], dtype=torch.float32)
        self._copy(y_AD, y_PD.contiguous(), self.sorted_A, to_sorted=False)
        return sum_rows(y_AD, self.row_A, self.num_rows)

    def spread_weights(self, weight_A: Tensor) -> Tensor:
        """-> weight_P1, zero where padded. Differentiable."""
        if self.num_padded == len(self.row_A):
            return weight_A.index_select(0, self.sorted_A).unsqueeze(1)
        bins = (self.sorted_A, self.expert_A, self.end_E, self.padded_end_E)
        return ops.padded_gather(weight_A.unsqueeze(1), *bins, 1)

    def _copy(self, caller: Tensor, by_expert: Tensor, index_A: Tensor, to_sorted: bool) -> None:
        """caller[index_A[i]] -> by_expert[i moved to its padded bin], or the other way."""
        bins = (self.end_E, self.padded_end_E)
        kernels._padded_copy[(len(index_A),)](
            caller,
            by_expert,
            index_A,
            self.expert_A,
            None,
            *bins,
            NUM_COLUMNS=caller.shape[1],
            A_TO_B=to_sorted,
            TOP_K=1,
            SCALE=False,
        )


def _running_sum(size_E: Tensor) -> Tensor:
    return ops.inclusive_cumsum(size_E, 0).view(-1)  # MegaBlocks squeezes a single expert to a scalar


def _sparse(x_PD: Tensor, weight_P1: Tensor, order: BinnedOrder, weights: LayerWeights) -> Tensor:
    num_experts, ffn, dim = weights.gate_EFD.shape
    layout = _topology(order, num_experts, ffn, x_PD.dtype)
    gate = stk.ops.sdd(x_PD, weights.gate_EFD.view(-1, dim).t(), layout)
    up = stk.ops.sdd(x_PD, weights.up_EFD.view(-1, dim).t(), layout)
    weight_NB1 = weight_P1.view(-1, 1, BLOCK, 1).expand(-1, ffn // BLOCK, -1, -1).reshape(-1, BLOCK, 1)
    hidden = _matrix(layout, weighted_swiglu(gate.data, up.data, weight_NB1))
    return stk.ops.dsd(hidden, weights.down_EFD.view(-1, dim))


def _topology(order: BinnedOrder, num_experts: int, ffn: int, dtype: torch.dtype) -> stk.Matrix:
    """The pattern [P, E*F] of the hidden activations: each expert's rows meet only its own columns."""
    block_rows, blocks, block_columns = order.num_padded // BLOCK, ffn // BLOCK, num_experts * ffn // BLOCK
    column_N = ops.topology(order.padded_end_E, BLOCK, block_rows, blocks).int()
    offsets = torch.arange(0, len(column_N) + 1, blocks, dtype=torch.int32, device=column_N.device)
    shape = (order.num_padded, num_experts * ffn)
    data = torch.empty(len(column_N), BLOCK, BLOCK, dtype=dtype, device="meta")
    row_N = stk.ops.row_indices(shape, data, offsets, column_N)
    by_column, transposed_N = ops.sort(column_N, max((block_columns - 1).bit_length(), 1))
    offsets_t = F.pad(_running_sum(ops.histogram(by_column, block_columns)), (1, 0))
    row_t_N = row_N.index_select(0, transposed_N)
    return stk.Matrix(shape, data, row_N, column_N, offsets, row_t_N, offsets_t, transposed_N)


def _matrix(layout: stk.Matrix, data: Tensor) -> stk.Matrix:
    transposed = (layout.column_indices_t, layout.offsets_t, layout.block_offsets_t)
    return stk.Matrix(layout.size(), data, layout.row_indices, layout.column_indices, layout.offsets, *transposed)


def _grouped(
    x_AD: Tensor, weight_A1: Tensor, order: BinnedOrder, weights: LayerWeights, adapters: LayerAdapters | None = None
) -> Tensor:
    compute = grouped if fits_grouped(weights, adapters) else looped
    return compute(x_AD, weight_A1, order.end_E, weights, adapters)


def _gmm(x_AD: Tensor, weight_A1: Tensor, order: BinnedOrder, weights: LayerWeights) -> Tensor:
    size_E = order.size_E.cpu().long()
    gmm = grouped_gemm_util.ops.gmm  # type: ignore[union-attr]
    gate_AF = gmm(x_AD, weights.gate_EFD, size_E, trans_b=True)
    up_AF = gmm(x_AD, weights.up_EFD, size_E, trans_b=True)
    return gmm(weighted_swiglu(gate_AF, up_AF, weight_A1), weights.down_EFD, size_E)


_COMPUTE: dict[Path, Callable[..., Tensor]] = {"sparse": _sparse, "grouped": _grouped, "gmm": _gmm}
