"""Products whose second factor is read row by row, added to what is there: gradients of rows and of small matrices, on a CPU.

Legend: R rows sorted by matrix, E matrices, K inner dimension, N outputs, A and B widths of two kinds of rows.
Decisions: a sum over K, or over a matrix's rows, is taken in turn, so it does not depend on company; sums are float32. The
extension's kernels (native/kernels/outer.h) take fp32 where there is AVX512, and bf16 where there are products of it. Numba's,
without the extension, have the same bits in fp32: they read matrices where they lie, 64 columns at a time, which pays where a
matrix fits a core's cache, and in sums where one side is narrow; all else, and another processor's, is the library's.
"""

import itertools

import numpy as np
import torch
from torch import Tensor

from trinity.ops import extension
from trinity.ops.batch_invariant.compiled import kernel
from trinity.ops.batch_invariant.simd import LANES, TALL, WIDE, adds, as_array
from trinity.ops.batch_invariant.threads import Job, in_turn

PANEL = WIDE * LANES
MOST_NUMBERS = 1 << 18  # of a matrix that rows are multiplied by: 1 MiB
MOST_WIDTH = 32  # of sums over rows
RUN = 128  # terms that are added up before their sum is added to the others': a longer chain would round more often


def products(p_RK: Tensor, v_EKN: Tensor, end_E: Tensor) -> Tensor:
    """p v: rows up to `end_E[0]` by the first matrix, from there up to `end_E[1]` by the second and so on. No gradients."""
    p_RK = p_RK if p_RK.dtype == v_EKN.dtype else p_RK.to(v_EKN.dtype)
    out_RN = p_RK.new_empty(len(p_RK), v_EKN.shape[2], dtype=sum_type(p_RK))
    in_turn(len(v_EKN), [adding_products(p_RK, v_EKN, end_E, out_RN, is_new=True)])
    return out_RN.to(p_RK.dtype)


def adding_products(p_RK: Tensor, v_EKN: Tensor, end_E: Tensor, out_RN: Tensor, is_new: bool = False) -> Job:
    """The job of adding p v to `out`, or of putting it there. Rows of p may be parts of longer ones."""
    (num, k), n = p_RK.shape, v_EKN.shape[2]
    p_RK, v_EKN = p_RK.detach(), v_EKN.detach().contiguous()
    if extension.has_outer(p_RK, v_EKN) and out_RN.dtype == torch.float32:
        return extension.adding_products(p_RK, v_EKN, end_E, out_RN, is_new)

    def with_library(first: int, last: int) -> None:
        for e, lo, hi in _runs(end_E)[first:last]:
            torch.addmm(out_RN[lo:hi], p_RK[lo:hi], v_EKN[e], beta=float(not is_new), out=out_RN[lo:hi])

    if k * n > MOST_NUMBERS or not _has_panels(p_RK, v_EKN, out_RN):
        return Job(1, 2 * num * k * n, with_library, is_compiled=False)
    arrays = [as_array(t) for t in (p_RK, v_EKN, out_RN, end_E)]
    return Job(n // PANEL, 2 * num * k * n, lambda first, last: _products(*arrays, is_new, first, last))


def sums(a_RA: Tensor, b_RB: Tensor, end_E: Tensor) -> Tensor:
    """a^T b of each matrix's rows, out_EAB; zeros where it has none. No gradients."""
    out_EAB = a_RA.new_empty(len(end_E), a_RA.shape[1], b_RB.shape[1], dtype=sum_type(a_RA))
    in_turn(len(end_E), [summing(a_RA, b_RB, end_E, out_EAB)])
    return out_EAB.to(a_RA.dtype)


def add_to(out_AB: Tensor, a_RA: Tensor, b_RB: Tensor) -> None:
    """Add a^T b to `out`, which is float32. No gradients."""
    if sum_type(a_RA) == torch.float32:
        in_turn(1, [summing(a_RA, b_RB, torch.tensor([len(a_RA)]), out_AB[None], is_new=False)])
    else:
        out_AB += a_RA.T @ b_RB


def sum_type(factor: Tensor) -> torch.dtype:
    """The type of sums of products of that, as jobs make them."""
    return torch.float32 if extension.has_outer(factor) else factor.dtype


def summing(a_RA: Tensor, b_RB: Tensor, end_E: Tensor, out_EAB: Tensor, is_new: bool = True) -> Job:
    """`sums` put into `out`, or added to it, as a job. The rows of a may be parts of longer ones."""
    (num, a), b = a_RA.shape, b_RB.shape[1]
    if extension.has_outer(a_RA, b_RB) and out_EAB.dtype == torch.float32:
        return extension.summing(a_RA, b_RB, end_E, out_EAB, is_new)

    def with_library(first: int, last: int) -> None:
        for e, lo, hi in _runs(end_E)[first:last]:
            if is_new:
                torch.mm(a_RA[lo:hi].T, b_RB[lo:hi], out=out_EAB[e])
            else:
                out_EAB[e].addmm_(a_RA[lo:hi].T, b_RB[lo:hi])

    if a > MOST_WIDTH or not _has_panels(a_RA, b_RB):
        return Job(1, 2 * num * a * b, with_library, is_compiled=False)
    arrays = [as_array(t) for t in (a_RA, b_RB.contiguous(), out_EAB, end_E)]
    return Job(b // PANEL, 2 * num * a * b, lambda first, last: _sums(*arrays, is_new, first, last))


def _has_panels(*tensors: Tensor) -> bool:
    """Say whether the kernel takes them: without AVX512 its sums would not fit the registers."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return tensors[-1].shape[-1] % PANEL == 0 and all(t.dtype == torch.float32 for t in tensors)


def _runs(end_E: Tensor) -> list[tuple[int, int, int]]:
    """(matrix, first row, end) of each."""
    return [(e, lo, hi) for e, (lo, hi) in enumerate(itertools.pairwise([0, *end_E.tolist()]))]


@kernel
def _products(p, v, out, end, is_new, first, last):  # type: ignore[no-untyped-def]
    k, n = v.shape[1:]
    panels, zeros = n // PANEL, np.zeros(PANEL, np.float32)
    none = _addresses(zeros.ctypes.data, 0, 0)
    for u in range(first, last):
        e, column = u // panels, u % panels * PANEL
        lo, hi = end[e - 1] if e else 0, end[e]
        for r in range(lo, hi, TALL):
            rows = min(TALL, hi - r) - 1
            outs = _addresses(out.ctypes.data + 4 * (n * r + column), 4 * n, rows)
            starts = none if is_new else outs
            for at in range(0, k, RUN):
                ps = _addresses(p.ctypes.data + p.strides[0] * r + 4 * at, p.strides[0], rows)
                adds(ps, 1, v.ctypes.data + 4 * (n * (k * e + at) + column), n, min(RUN, k - at), starts, outs)
                starts = outs


@kernel
def _sums(a, b, out, end, is_new, first, last):  # type: ignore[no-untyped-def]
    num, n = a.shape[1], b.shape[1]
    panels, zeros = n // PANEL, np.zeros(PANEL, np.float32)
    none = _addresses(zeros.ctypes.data, 0, 0)
    for u in range(first, last):
        e, column = u // panels, u % panels * PANEL
        lo, hi = end[e - 1] if e else 0, end[e]
        for i in range(0, num, TALL):
            rows = min(TALL, num - i) - 1
            outs = _addresses(out.ctypes.data + 4 * (n * (num * e + i) + column), 4 * n, rows)
            starts = none if is_new else outs
            for at in range(lo, max(hi, lo + 1), RUN):  # once without rows: zeros
                ps = _addresses(a.ctypes.data + a.strides[0] * at + 4 * i, 4, rows)
                adds(ps, a.strides[0] // 4, b.ctypes.data + 4 * (n * at + column), n, min(RUN, hi - at), starts, outs)
                starts = outs


@kernel
def _addresses(first, step, last):  # type: ignore[no-untyped-def]
    """Addresses of TALL rows in turn; those past the last repeat it."""
    at, step = np.int64(first), np.int64(step)
    return (
        at,
        at + step * min(1, last),
        at + step * min(2, last),
        at + step * min(3, last),
        at + step * min(4, last),
        at + step * min(5, last),
    )
