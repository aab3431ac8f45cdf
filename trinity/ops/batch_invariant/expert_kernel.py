"""The experts of a layer as a function that threads of native/ring call: fused_mlp.py's arithmetic, without Python.

Legend: A assignments by expert, E experts, D model, F expert hidden.
Decision: only what is compiled is called in there; a thread that Python did not start may run it, and nothing in it raises.
"""

import functools
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types

from trinity.ops.batch_invariant.compiled import kernel
from trinity.ops.batch_invariant.fused_mlp import MOST_ROWS, _units
from trinity.ops.batch_invariant.simd import intrinsic

carray: Any = numba.carray  # type: ignore[attr-defined]
NUM_FIELDS = 16  # of native/ring/expert_call.h:ExpertCall, eight bytes each


@functools.cache
def address() -> int:
    """Address of the function: a trinity::ExpertKernel for float32. Compiled at the first call, or read from beside the
    source."""
    compiled: Any = numba.cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")(_called)
    return int(compiled.address)


@intrinsic
def _pointer(typing: Any, at: Any) -> Any:
    """A pointer to floats from an address."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.inttoptr(arguments[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def _integers(typing: Any, at: Any) -> Any:
    """A pointer to integers from an address."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.inttoptr(arguments[0], ir.IntType(64).as_pointer())

    return types.CPointer(types.int64)(types.int64), generate


@kernel
def _run(field):  # type: ignore[no-untyped-def]
    num_rows, num, experts, dim, hidden = field[0], field[1], field[2], field[3], field[4]
    x = carray(_pointer(field[5]), (num_rows, dim))
    row, end = carray(_integers(field[6]), (num,)), carray(_integers(field[7]), (experts,))
    weight = carray(_pointer(field[8]), (num,))
    gate, up = carray(_pointer(field[9]), (experts, hidden, dim)), carray(_pointer(field[10]), (experts, hidden, dim))
    down, y = carray(_pointer(field[11]), (experts, dim, hidden)), carray(_pointer(field[15]), (num, dim))
    gathered = np.empty((num, dim), np.float32)
    for a in range(num):
        gathered[a] = x[row[a]]
    expert, begin, last = np.empty(num, np.int64), np.empty(num, np.int64), np.empty(num, np.int64)
    units, first = 0, 0
    for e in range(experts):
        while first < end[e]:
            expert[units], begin[units], last[units] = e, first, min(first + MOST_ROWS, end[e])
            first = last[units]
            units += 1
    _units(gathered, gate, up, down, weight, y, expert, begin, last, 0, units)


def _called(call):  # type: ignore[no-untyped-def]
    _run(carray(call, (NUM_FIELDS,)))
