"""Sums in an order that is fixed by their length alone: the vector code under everything in this folder.

Legend: 16 lanes; K length of a dot product, S keys.
A library chooses how it sums by the number of rows (other kernels for 1, 3 or 11 rows than for 12), and a compiler that may
reassociate chooses anew at each place where a loop is written. Here the order is written down, in LLVM's vector types:

- `dots`: lane l sums w[i] x[i] over i = l, l + 16, ... in turn; lanes are added as a tree (l with l + 8, + 4, + 2, + 1); what
  is left of K comes last, one by one. Every product is fused with its sum. Four rows meet two or four weight rows at a time, so
  that one loaded number serves several products; with fewer rows some of the code's results are not used.
  Of bfloat16 by bfloat16, lane l sums pairs instead: 2 l + 1 and then 2 l of each 32, what is missing of the last 32 being
  zeros, and numbers below the smallest normal one count as zeros (`flushing`): what processors' own instruction for it does.
- `adds`: each lane is one output and sums p[k] v[k] over k in turn; what was there is added last. Six rows meet four vectors.
- `mixes`: each lane is one output and sums p[j] v[j] over the keys j in turn, to which what was there is added last; terms of
  p = 0 change nothing.

The same bits, therefore, on any machine and from any number of threads. Addresses are plain integers: arrays stay alive and
in bounds because the callers, all in this folder, see to it.
"""

import itertools
import platform
from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic
from torch import Tensor

LANES, ROWS, COLUMNS = 16, 4, 2
TALL, WIDE = 6, 4  # of `adds`: with what they are multiplied by, they fill the registers
F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VECTOR, PAIRS = ir.VectorType(F32, LANES), ir.VectorType(I16, 2 * LANES)
HAS_MXCSR, FLUSH = (
    platform.machine().lower() in ("x86_64", "amd64"),
    0x8040,
)  # x86's register of rounding, two bits of it
STORED = {types.float32: F32, types.uint16: I16, types.int8: I8}  # bits of bfloat16 as uint16
intrinsic: Any = numba_intrinsic  # what it makes is called without the first argument, which its type does not say


TYPES = {torch.float32: "<f4", torch.bfloat16: "<u2", torch.int64: "<i8", torch.int32: "<i4", torch.bool: "|b1"}
TYPES |= {torch.int8: "|i1"}


class _Memory:
    """A tensor's memory as numpy's array protocol names it. Keeps the tensor."""

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor, size = tensor, tensor.element_size()
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(size * stride for stride in tensor.stride()),
            "typestr": TYPES[tensor.dtype],
            "version": 3,
        }


def as_array(tensor: Tensor) -> np.ndarray:
    """Its memory, as compiled code takes it: the bits of bfloat16 as uint16.

    `Tensor.numpy` would forbid the storage to be resized for good, which fully_shard does with the weights that it gathers.
    """
    return np.asarray(_Memory(tensor))


@intrinsic
def dots(typing: Any, xs: Any, ws: Any, k: Any, out: Any, weights: Any) -> Any:
    """out[column * len(xs) + row] = w . x for the rows at addresses xs (a tuple of ROWS or 1) and ws (of 2 or 4), of length k.

    xs are float32; ws point into the array `weights`: float32, uint16 that are the bits of bfloat16, or int8.
    """
    return types.void(xs, ws, k, out, weights), partial(_dots, STORED[weights.dtype])


@intrinsic
def dots_of(typing: Any, xs: Any, ws: Any, k: Any, out: Any, weights: Any, rows: Any) -> Any:
    """`dots` of xs that point into the array `rows`: float32, or bfloat16 as the weights are (see `flushing`)."""
    made = _pair_dots if rows.dtype == types.uint16 else partial(_dots, STORED[weights.dtype])
    return types.void(xs, ws, k, out, weights, rows), made


def _dots(stored: Any, context: Any, b: Any, signature: Any, arguments: Any) -> None:
    xs, ws, k, out = arguments[:4]
    rows, columns = _pointers(b, xs), _pointers(b, ws, stored)
    out = b.inttoptr(out, F32.as_pointer())
    pairs = [(column, row) for column in columns for row in rows]
    whole = b.and_(k, I64(-LANES))
    sums = [_variable(b, VECTOR) for _ in pairs]
    with cgutils.for_range_slice(b, I64(0), whole, I64(LANES), intp=I64) as (i, _):
        loaded = {id(p): _loaded(b, b.gep(p, [i]), LANES) for p in (*rows, *columns)}
        for (column, row), total in zip(pairs, sums, strict=True):
            b.store(_fma(b, loaded[id(column)], loaded[id(row)], b.load(total)), total)
    tree = _trees(b, [b.load(total) for total in sums])
    b.store(tree, b.bitcast(out, tree.type.as_pointer()), align=4)
    with cgutils.for_range_slice(b, whole, k, I64(1), intp=I64) as (i, _):
        for at, (column, row) in enumerate(pairs):
            total = b.gep(out, [I64(at)])
            b.store(_fma(b, _loaded(b, b.gep(column, [i])), b.load(b.gep(row, [i])), b.load(total)), total)


def _pair_dots(context: Any, b: Any, signature: Any, arguments: Any) -> None:
    """`dots` of bfloat16 by bfloat16."""
    xs, ws, k, out = arguments[:4]
    rows, columns = _pointers(b, xs, I16), _pointers(b, ws, I16)
    sums = {(c, r): _variable(b, VECTOR) for c in range(len(columns)) for r in range(len(rows))}

    def add(row_pointers: Any, column_pointers: Any) -> None:
        xs, ws = ([_pair(b, p) for p in pointers] for pointers in (row_pointers, column_pointers))
        for (c, r), total in sums.items():
            for w, x in zip(ws[c], xs[r], strict=True):
                b.store(_fma(b, w, x, b.load(total)), total)

    whole = b.and_(k, I64(-2 * LANES))
    with cgutils.for_range_slice(b, I64(0), whole, I64(2 * LANES), intp=I64) as (i, _):
        add([b.gep(p, [i]) for p in rows], [b.gep(p, [i]) for p in columns])
    padded = [[_zeros(b) for _ in pointers] for pointers in (rows, columns)]
    with b.if_then(b.icmp_signed("<", whole, k)):
        for pointer, zeros in zip((*rows, *columns), itertools.chain(*padded), strict=True):
            b.store(ir.Constant(PAIRS, None), b.bitcast(zeros, PAIRS.as_pointer()), align=2)
            with cgutils.for_range(b, b.sub(k, whole), intp=I64) as loop:
                b.store(b.load(b.gep(pointer, [b.add(whole, loop.index)])), b.gep(zeros, [loop.index]))
        add(*padded)
    tree = _trees(b, [b.load(total) for total in sums.values()])
    b.store(tree, b.bitcast(b.inttoptr(out, F32.as_pointer()), tree.type.as_pointer()), align=4)


def _pair(b: Any, pointer: Any) -> tuple[Any, Any]:
    """Two vectors of float32 of 32 bfloat16: those in the odd places, those in the even ones."""
    wide = ir.VectorType(I32, LANES)
    pairs = b.load(b.bitcast(pointer, wide.as_pointer()), align=2)
    odd, even = b.and_(pairs, ir.Constant(wide, [-(1 << 16)] * LANES)), b.shl(pairs, ir.Constant(wide, [16] * LANES))
    return b.bitcast(odd, VECTOR), b.bitcast(even, VECTOR)


def _zeros(b: Any) -> Any:
    """Room for 32 bfloat16."""
    return b.bitcast(cgutils.alloca_once(b, PAIRS), I16.as_pointer())


@intrinsic
def flushing(typing: Any, rows: Any) -> Any:
    """Count numbers below the smallest normal one as zeros from here on, where `rows` are bfloat16 -> what `restore` takes."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        before = cgutils.alloca_once_value(b, I32(0))
        if HAS_MXCSR and rows.dtype == types.uint16:
            _call_on(b, "llvm.x86.sse.stmxcsr", before)
            _call_on(b, "llvm.x86.sse.ldmxcsr", cgutils.alloca_once_value(b, b.or_(b.load(before), I32(FLUSH))))
        return b.load(before)

    return types.int32(rows), generate


@intrinsic
def restore(typing: Any, rows: Any, before: Any) -> Any:
    """Undo `flushing`."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        if HAS_MXCSR and rows.dtype == types.uint16:
            _call_on(b, "llvm.x86.sse.ldmxcsr", cgutils.alloca_once_value(b, arguments[1]))

    return types.void(rows, before), generate


def _call_on(b: Any, name: str, number: Any) -> None:
    """Call an instruction that takes the address of an int32."""
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), [I8.as_pointer()]), name)
    b.call(function, [b.bitcast(number, I8.as_pointer())])


@intrinsic
def mixes(typing: Any, p: Any, slots: Any, vs: Any, stride: Any, num: Any, outs: Any, values: Any) -> Any:
    """outs[row][lane] += sum over j < num of p[j * ROWS + row] * v[slots[j] * stride + lane], for LANES of each v of `vs`, a
    tuple of addresses side by side; outs: of up to ROWS. vs point into the array `values`: of what `dots` takes."""
    stored = STORED[values.dtype]

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        p, slots, vs, stride, num, outs, _ = arguments
        columns, out = _pointers(b, vs, stored), _pointers(b, outs)
        p, slots = b.inttoptr(p, F32.as_pointer()), b.inttoptr(slots, I64.as_pointer())
        sums = [[_variable(b, VECTOR) for _ in columns] for _ in out]
        with cgutils.for_range(b, num, intp=I64) as loop:
            line = b.mul(b.load(b.gep(slots, [loop.index])), stride)
            loaded = [_loaded(b, b.gep(column, [line]), LANES) for column in columns]
            first = b.mul(loop.index, I64(ROWS))
            for row, totals in enumerate(sums):
                spread = _spread(b, b.load(b.gep(p, [b.add(first, I64(row))])))
                for vector, total in zip(loaded, totals, strict=True):
                    b.store(_fma(b, spread, vector, b.load(total)), total)
        for pointer, totals in zip(out, sums, strict=True):
            for at, total in enumerate(totals):
                place = b.gep(pointer, [I64(LANES * at)])
                found = b.fadd(_loaded(b, place, LANES), b.load(total))
                b.store(found, b.bitcast(place, VECTOR.as_pointer()), align=4)

    return types.void(p, slots, vs, stride, num, outs, values), generate


@intrinsic
def highest(typing: Any, scores: Any, num: Any, out: Any) -> Any:
    """out[row] = the highest of scores[j * ROWS + row], j < num, a multiple of LANES / ROWS; NaN is passed over."""

    def greater(b: Any, x: Any, y: Any) -> Any:
        return b.select(b.fcmp_ordered(">", x, y), x, y)

    return types.void(scores, num, out), partial(_reduced, greater, -np.inf)


@intrinsic
def summed(typing: Any, scores: Any, num: Any, out: Any) -> Any:
    """out[row] = the sum of scores[j * ROWS + row], j < num, a multiple of LANES / ROWS: lane l has elements l, l + 16, ...
    in turn, and lanes are added as a tree (l with l + 8, + 4)."""
    return types.void(scores, num, out), partial(_reduced, lambda b, x, y: b.fadd(x, y), 0.0)


@intrinsic
def adds(typing: Any, ps: Any, p_step: Any, v: Any, v_step: Any, num: Any, starts: Any, outs: Any) -> Any:
    """outs[row][lane] = starts[row][lane] + sum over k < num of ps[row][k * p_step] * v[k * v_step + lane], for WIDE * LANES
    lanes; ps, starts, outs: tuples of TALL addresses. All float32."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        ps, p_step, v, v_step, num, starts, outs = arguments
        rows, start, out = (_pointers(b, addresses) for addresses in (ps, starts, outs))
        v, places = b.inttoptr(v, F32.as_pointer()), [I64(LANES * at) for at in range(WIDE)]
        sums = [[_variable(b, VECTOR) for _ in places] for _ in rows]
        with cgutils.for_range(b, num, intp=I64) as loop:
            line = b.gep(v, [b.mul(loop.index, v_step)])
            loaded = [_loaded(b, b.gep(line, [at]), LANES) for at in places]
            for row, totals in zip(rows, sums, strict=True):
                spread = _spread(b, b.load(b.gep(row, [b.mul(loop.index, p_step)])))
                for vector, total in zip(loaded, totals, strict=True):
                    b.store(_fma(b, spread, vector, b.load(total)), total)
        found = [  # all of it, before anything is stored: an address may be there twice
            (b.gep(to, [at]), b.fadd(_loaded(b, b.gep(before, [at]), LANES), b.load(total)))
            for before, to, totals in zip(start, out, sums, strict=True)
            for at, total in zip(places, totals, strict=True)
        ]
        for pointer, vector in found:
            b.store(vector, b.bitcast(pointer, VECTOR.as_pointer()), align=4)

    return types.void(ps, p_step, v, v_step, num, starts, outs), generate


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    one = types.float32
    return one(one, one, one), lambda context, builder, signature, arguments: builder.fma(*arguments)


@intrinsic
def as_float(typing: Any, bits: Any) -> Any:
    """The float32 whose bits an int32 is."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], F32)


@intrinsic
def widened(typing: Any, stored: Any) -> Any:
    """The float32 that a float32, the bits of a bfloat16 as uint16, or an int8 stands for."""
    return types.float32(stored), lambda context, b, signature, arguments: _widened(b, arguments[0])


@intrinsic
def narrowed(typing: Any, value: Any, stored: Any) -> Any:
    """A float32 as the array `stored` has numbers: as it is, or the bits of the nearest bfloat16, halves to even."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        if stored.dtype != types.uint16:
            return arguments[0]
        bits = b.bitcast(arguments[0], I32)
        odd = b.and_(b.lshr(bits, I32(16)), I32(1))
        rounded = b.lshr(b.add(bits, b.add(odd, I32(0x7FFF))), I32(16))
        is_nan = b.fcmp_unordered("uno", arguments[0], arguments[0])
        return b.trunc(b.select(is_nan, I32(0x7FC0), rounded), I16)

    return (types.uint16 if stored.dtype == types.uint16 else types.float32)(types.float32, stored), generate


def _pointers(b: Any, addresses: Any, kind: Any = F32) -> list[Any]:
    return [b.inttoptr(address, kind.as_pointer()) for address in cgutils.unpack_tuple(b, addresses)]


def _loaded(b: Any, pointer: Any, num: int = 1) -> Any:
    """A float32, or a vector of `num`, of what is stored there."""
    stored = pointer.type.pointee
    if num > 1:
        pointer = b.bitcast(pointer, ir.VectorType(stored, num).as_pointer())
    return _widened(b, b.load(pointer, align=stored.width // 8 if isinstance(stored, ir.IntType) else 4))


def _widened(b: Any, value: Any) -> Any:
    """float32 of a number, or a vector of them. A bfloat16 is the upper half of one."""
    num = value.type.count if isinstance(value.type, ir.VectorType) else 0
    stored = value.type.element if num else value.type
    if stored == F32:
        return value
    wide, real = (ir.VectorType(kind, num) if num else kind for kind in (I32, F32))
    if stored == I8:
        return b.sitofp(b.sext(value, wide), real)
    return b.bitcast(b.shl(b.zext(value, wide), ir.Constant(wide, [16] * num if num else 16)), real)


def _variable(b: Any, kind: Any, value: Any = None) -> Any:
    """A local variable; the compiler keeps it in a register. Zeros at first."""
    made = cgutils.alloca_once(b, kind)
    b.store(ir.Constant(kind, [0.0] * LANES if kind is VECTOR else 0.0) if value is None else value, made)
    return made


def _fma(b: Any, v: Any, w: Any, total: Any) -> Any:
    name = f"llvm.fma.v{LANES}f32" if v.type == VECTOR else "llvm.fma.f32"
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(v.type, [v.type] * 3), name), [v, w, total])


def _reduced(merged: Any, empty: float, context: Any, b: Any, signature: Any, arguments: Any) -> None:
    scores, num, out = arguments
    scores, out = b.inttoptr(scores, F32.as_pointer()), b.inttoptr(out, F32.as_pointer())
    found = _variable(b, VECTOR, ir.Constant(VECTOR, [empty] * LANES))
    with cgutils.for_range_slice(b, I64(0), b.mul(num, I64(ROWS)), I64(LANES), intp=I64) as (i, _):
        b.store(merged(b, _loaded(b, b.gep(scores, [i]), LANES), b.load(found)), found)
    vector = b.load(found)
    for width in (8, 4):
        low, high = (ir.Constant(ir.VectorType(I32, width), list(range(at, at + width))) for at in (0, width))
        vector = merged(b, b.shuffle_vector(vector, vector, low), b.shuffle_vector(vector, vector, high))
    b.store(vector, b.bitcast(out, vector.type.as_pointer()), align=4)


def _spread(b: Any, number: Any) -> Any:
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = b.insert_element(undefined, number, I32(0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))


def _trees(b: Any, vectors: list[Any]) -> Any:
    """The sum of all lanes of each of up to LANES vectors, halves added to halves; -> a vector of that many sums.

    Two vectors are folded into one that has the halves of both, so that no lane is idle.
    """
    width = LANES
    while len(vectors) > 1:
        vectors = [
            _folded(b, first, second, width, 2 * LANES)
            for first, second in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width //= 2
    while width > 1:
        vectors = [_folded(b, vectors[0], vectors[0], width, vectors[0].type.count)]
        width //= 2
    return vectors[0]


def _folded(b: Any, first: Any, second: Any, width: int, num: int) -> Any:
    """Fold the first `num` lanes of two vectors, in runs of `width`: the front half of each run plus its back half."""
    runs = range(0, num, width)
    front, back = ([run + at + i for run in runs for i in range(width // 2)] for at in (0, width // 2))
    kind = ir.VectorType(I32, len(front))
    halves = (b.shuffle_vector(first, second, ir.Constant(kind, lanes)) for lanes in (front, back))
    return b.fadd(*halves)
