"""The extension's kernels (native/kernels/) as functions of tensors; `lib` is None where there is none, or it is switched off.

Legend: A rows sorted by expert, E experts (1 for a dense layer), D model, F hidden, K inner dimension, N outputs; U units: some
rows of an expert.
Decisions: here sizes are checked and memory is kept, there nothing is. Bits are those of the functions that call this, which go
on without it. Float32 is the extension's where it has vectors of AVX512; elsewhere numba's kernels are faster.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trinity import native
from trinity.ops.batch_invariant.threads import Job, in_threads

lib: Any = native.lib
FLOAT32, BFLOAT16, INT8, FP8, NVFP4 = range(5)  # native/kernels/kernels.h
UNIT_ROWS = 256  # native/kernels/outer.h
SOME_ROWS = 192  # native/kernels/kept.h
ROUNDED = {BFLOAT16: torch.bfloat16, INT8: torch.uint8}  # rows of other formats are float32
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}  # of values as they are stored
STORED = {*KINDS, torch.uint8}  # the last of fp8 and nvfp4
HAS_FLOAT32 = lib is not None and lib.isa.startswith("avx512")  # as fast as numba's


class Matrices(NamedTuple):
    """[E, N, K] in a format: the values, and of int8 scales and totals [E, N]; of fp8 bytes, and a scale for each block; of
    nvfp4 bytes [E, N, K / 2], what scales are divided by [E, 1], and the scales."""

    values: Tensor
    scale: Tensor | None = None
    more: Tensor | None = None

    @property
    def kind(self) -> int:
        if self.values.dtype != torch.uint8:
            return KINDS[self.values.dtype]
        return FP8 if self.more is None else NVFP4

    @property
    def sides(self) -> tuple[int, int]:
        """N and K."""
        n, k = self.values.shape[-2:]
        return n, 2 * k if self.kind == NVFP4 else k

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Matrices":
        """The same of parts that are changed."""
        values, scale, more = (part if part is None else change(part) for part in self)
        assert values is not None, "there always are values"
        return Matrices(values, scale, more)

    def described(self) -> tuple[int, ...]:
        """Addresses and sizes. The caller keeps the tensors."""
        parts = [part if part is None else _whole(part) for part in self]
        return (*(0 if part is None else part.data_ptr() for part in parts), *self.sides)


class Rows(NamedTuple):
    """[A, K] as a format multiplies them: the values, and of int8 a scale for each."""

    values: Tensor
    scale: Tensor | None = None

    def described(self) -> tuple[int, ...]:
        return self.values.data_ptr(), 0 if self.scale is None else self.scale.data_ptr(), 0


def takes(dtype: torch.dtype) -> bool:
    """Say whether rows and matrices of that type are for the extension."""
    return lib is not None and (dtype == torch.bfloat16 or HAS_FLOAT32)


def rounded(kind: int, x_AK: Tensor) -> Rows:
    """Rows as the format has them."""
    dtype = ROUNDED.get(kind, torch.float32)
    if x_AK.dtype == dtype or dtype == torch.float32:
        return Rows(x_AK.to(dtype).contiguous())
    x_AK = x_AK.float().contiguous()
    (num, k), values = x_AK.shape, torch.empty(x_AK.shape, dtype=dtype)
    scale = torch.empty(num) if kind == INT8 else None

    def run(first: int, last: int) -> None:
        at = 0 if scale is None else scale[first:].data_ptr()
        lib.round_rows(kind, x_AK[first:].data_ptr(), last - first, k, values[first:].data_ptr(), at)

    in_threads(num, 8 * num * k, run)
    return Rows(values, scale)


def multiplying(kind: int, x: Rows, w: Matrices, end_E: Tensor, y_AN: Tensor) -> Job:
    """The job of rows up to `end_E[0]` times the transpose of w[0], from there up to `end_E[1]` of w[1] and so on, into y."""
    (num, k), n, end_E = x.values.shape, w.values.shape[-2], end_E.contiguous()
    _check(y_AN.dtype == torch.float32 and y_AN.stride(-1) == 1 and y_AN.shape == (num, n), "y", y_AN)
    _check((len(w.values), *w.sides) == (len(end_E), n, k), "w", w.values)
    described = kind, *x.described(), *w.described(), end_E.data_ptr(), y_AN.data_ptr(), y_AN.stride(0)
    run = partial(_run, lib.multiply, (x, w, end_E, y_AN), described)
    return Job(lib.num_units(kind, n, k), 2 * num * n * k, run)


def has_outer(*factors: Tensor) -> bool:
    """Say whether this processor multiplies rows and columns of such tensors by the extension: `adding_products`, `summing`."""
    kind = KINDS.get(factors[0].dtype)
    alike = all(t.is_cpu and t.dtype == factors[0].dtype and t.stride(-1) == 1 for t in factors)
    return lib is not None and alike and kind is not None and lib.has_outer(kind)


def adding_products(p_RK: Tensor, v_EKN: Tensor, end_E: Tensor, out_RN: Tensor, is_new: bool) -> Job:
    """The job of adding p v to `out`, float32, or of putting it there, for what `has_outer` says yes to."""
    (num, k), n, end_E = p_RK.shape, v_EKN.shape[2], end_E.contiguous()
    _check(v_EKN.is_contiguous() and v_EKN.shape == (len(end_E), k, n), "v", v_EKN)
    _check(out_RN.is_contiguous() and out_RN.shape == (num, n), "out", out_RN)
    pointers = [t.data_ptr() for t in (p_RK, v_EKN, end_E, out_RN)]
    units = _units_of_each(end_E, num, UNIT_ROWS)
    described = (KINDS[p_RK.dtype], *pointers, p_RK.stride(0), k, n, int(is_new), units)
    return Job(units, 2 * num * k * n, partial(_run, lib.add_products, (p_RK, v_EKN, end_E, out_RN), described))


def multiplying_rounded(x_AK: Tensor, w_ENK: Tensor, end_E: Tensor, y_AN: Tensor) -> Job:
    """The job of `multiplying` many rows with y in x's type, for what `has_outer` says yes to."""
    (num, k), n, end_E = x_AK.shape, w_ENK.shape[1], end_E.contiguous()
    _check(x_AK.is_contiguous() and w_ENK.is_contiguous() and w_ENK.shape == (len(end_E), n, k), "w", w_ENK)
    _check(y_AN.is_contiguous() and y_AN.dtype == x_AK.dtype and y_AN.shape == (num, n), "y", y_AN)
    units, kept = _units_of_each(end_E, num, SOME_ROWS), (x_AK, w_ENK, end_E, y_AN)
    described = (KINDS[x_AK.dtype], *(t.data_ptr() for t in kept), k, n, units)
    return Job(units, 2 * num * k * n, partial(_run, lib.multiply_rounded, kept, described))


def forward_and_keep(
    x_AD: Tensor, weights: Sequence[Tensor], weight_A: Tensor, units: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """-> products of the rows with gate and up, and what comes out of the feed-forward, all in their type, for what `has_outer`
    says yes to. `weights`: gate, up and down [E, F, D], [E, F, D] and [E, N, F]; `units`: see `feed_forward`."""
    (num, dim), (_, n, f) = x_AD.shape, weights[2].shape
    _check([w.shape[1:] for w in weights] == [(f, dim), (f, dim), (n, f)], "gate", weights[0])
    _check(x_AD.is_contiguous() and all(w.is_contiguous() for w in weights), "x", x_AD)
    gate_AF, up_AF, y_AN = (x_AD.new_empty(num, width) for width in (f, f, n))
    weight_A = weight_A.float().contiguous()
    kept = (x_AD, *weights, weight_A, *units, gate_AF, up_AF, y_AN)
    described = (KINDS[x_AD.dtype], *(t.data_ptr() for t in kept), dim, f, n)
    run = partial(_run, lib.forward_and_keep, kept, described)
    in_threads(len(units[0]), 2 * num * f * (2 * dim + n), run)
    return gate_AF, up_AF, y_AN


def _units_of_each(end_E: Tensor, num: int, rows: int) -> int:
    """Units of so many rows that the matrix with most of them has."""
    return -(-int(end_E.diff(prepend=end_E.new_zeros(1)).max()) // rows) if num else 1


def summing(a_RA: Tensor, b_RB: Tensor, end_E: Tensor, out_EAB: Tensor, is_new: bool) -> Job:
    """The job of adding a^T b of each matrix's rows to `out`, float32, or of putting it there, for what `has_outer` takes."""
    (num, a), b, end_E = a_RA.shape, b_RB.shape[1], end_E.contiguous()
    _check(len(b_RB) == num, "b", b_RB)
    _check(out_EAB.is_contiguous() and out_EAB.shape == (len(end_E), a, b), "out", out_EAB)
    pointers = [t.data_ptr() for t in (a_RA, b_RB, end_E, out_EAB)]
    units = -(-a // UNIT_ROWS)
    described = (KINDS[a_RA.dtype], *pointers, a_RA.stride(0), b_RB.stride(0), a, b, int(is_new), units)
    return Job(units, 2 * num * a * b, partial(_run, lib.add_row_sums, (a_RA, b_RB, end_E, out_EAB), described))


def _run(kernel: Any, kept: tuple[object, ...], described: tuple[int, ...], first: int, last: int) -> None:
    """`kept`: whose memory is described."""
    kernel(*described, first, last)


def feed_forward(
    kind: int,
    x: Rows,
    parts: Sequence[Matrices],
    weight_A: Tensor | None,
    units: tuple[Tensor, Tensor, Tensor],
    y_AN: Tensor,
) -> None:
    """Rows through gate, up and down [E, F, D], [E, F, D] and [E, N, F] into y; `units`: expert, first row and end of each."""
    (num, dim), f, n = x.values.shape, parts[0].values.shape[1], parts[2].values.shape[1]
    _check([part.sides for part in parts] == [(f, dim), (f, dim), (n, f)], "gate", parts[0].values)
    _check(y_AN.is_contiguous() and y_AN.shape == (num, n), "y", y_AN)
    weight_A = None if weight_A is None else weight_A.float().contiguous()
    matrices = [number for part in parts for number in part.described()]
    pointers = [0 if t is None else t.data_ptr() for t in (weight_A, y_AN, *units)]
    described = (kind, *x.described(), *matrices, *pointers)
    in_threads(len(units[0]), 2 * num * f * (2 * dim + n), lambda lo, hi: lib.feed_forward(*described, lo, hi))


def _whole(part: Tensor) -> Tensor:
    _check(part.is_contiguous() and part.is_cpu, "a matrix", part)
    return part


def _check(is_right: bool, name: str, tensor: Tensor) -> None:
    if not is_right:
        raise ValueError(
            f"{name} of {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype} does not fit its rows"
        )
