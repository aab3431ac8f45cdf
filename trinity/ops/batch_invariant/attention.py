"""Softmax attention, on a CPU, where a query's result depends on the query and the keys that it sees, and on nothing else.

Legend: T queries, H query heads, G key-value heads, d head dim, P slots of keys, N slot numbers.
Decisions: training, prefill and decoding are one function, told which keys each query sees. Keys are taken BLOCK at a time, and
blocks begin at multiples of BLOCK from the sequence's first position, whatever a query, its window or its chunk begins with:
so the order of a query's sums is that of positions, and a key that it does not see changes nothing (weight 0, scale 1). A line
is a query and one of its heads; four lines of a key-value head, a panel, are computed together, and all panels of a tile meet a
block before the next one comes. What many lines share is widened and laid side by side first; few read it where it lies.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trinity.ops.batch_invariant.compiled import kernel
from trinity.ops.batch_invariant.elementwise import exp
from trinity.ops.batch_invariant.simd import LANES, ROWS, as_array, dots, fma, highest, mixes, summed, widened
from trinity.ops.batch_invariant.threads import CHUNKS_PER_THREAD, in_threads

BLOCK = 64  # keys; their scores with a panel are 4 KiB
LEAST_LINES, MOST_LINES = 32, 256  # of a tile, where there are as many
FEW_LINES = 12  # of a tile that reads keys where they lie
KEYS, WIDE = 4, 4  # keys that meet a panel at once, and vectors of a value that do
HAS_REGISTERS = (
    torch.backends.cpu.get_cpu_capability() == "AVX512"
)  # for so many sums; the order of each is the same without
NONE = np.float32(-np.inf)
ZERO = np.float32(0)
NO_SCALES = (torch.empty(0, 1),) * 2


class Seen:
    """Keys that each query sees: query t those at slot_N[first_T[t]:end_T[t]], at least one; all int64. Made once, for
    all layers.

    The key at slot_N[j] has the position j - origin_T[t], which is not negative for those that it sees. Neighbouring queries
    had better see neighbouring keys.
    """

    def __init__(self, slot_N: Tensor, first_T: Tensor, end_T: Tensor, origin_T: Tensor):
        self.tensors = (slot_N, first_T, end_T, origin_T)
        self.arrays = tuple(map(as_array, self.tensors))
        self.num = int((end_T - first_T).sum())  # pairs of a query and a key

    def cuts(self, most: int) -> np.ndarray:
        """Queries at which tiles of up to `most` begin, and the end."""
        found: np.ndarray = _cuts(*self.arrays[1:], most)
        return found


def attention(q_THd: Tensor, k_PGd: Tensor, v_PGd: Tensor, seen: Seen, scales: Sequence[Tensor] = NO_SCALES) -> Tensor:
    """-> o_THd, scale d**-0.5. float32 or bfloat16; query head h uses key head h // (H / G). No gradients.

    Keys and values may be int8, with the `scales` [P, G], float32, that make them what they stand for.
    """
    return _attended(q_THd, k_PGd, v_PGd, seen, scales or NO_SCALES)[0]


def _attended(
    q_THd: Tensor, k_PGd: Tensor, v_PGd: Tensor, seen: Seen, scales: Sequence[Tensor] = NO_SCALES
) -> tuple[Tensor, Tensor]:
    """-> o_THd, and lse_TH: the logarithm of the sum of a query's exponentiated scores, float32."""
    out_THd, lse_TH = torch.empty(q_THd.shape), torch.empty(q_THd.shape[:2])
    arrays = [as_array(t.contiguous()) for t in (q_THd, k_PGd, v_PGd, *scales, out_THd, lse_TH)]
    (num, heads, dim), groups = q_THd.shape, k_PGd.shape[1]
    even = num * heads // (CHUNKS_PER_THREAD * torch.get_num_threads())  # lines, so that every thread has some tiles
    cuts = seen.cuts(max(1, min(MOST_LINES, max(even, LEAST_LINES)) * groups // heads))
    tiles, operations = groups * (len(cuts) - 1), 4 * heads * dim * seen.num
    in_threads(tiles, operations, lambda first, last: _tiles(*arrays, *seen.arrays, cuts, first, last))
    return out_THd.to(q_THd.dtype), lse_TH


class Gradients(Protocol):
    """Gradients of attention by q, k and v, of a result that is there: somebody's that computes the same."""

    def __call__(
        self, do_THd: Tensor, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, o_THd: Tensor, lse_TH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def differentiable(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, seen: Seen, gradients: Gradients) -> Tensor:
    """`attention` among the queries' own keys, with these gradients."""
    out_THd: Tensor = _Attention.apply(q_THd, k_TGd, v_TGd, seen, gradients)
    return out_THd


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Seen, gradients: Gradients) -> Tensor:
        o_THd, lse_TH = _attended(q, k, v, seen)
        ctx.save_for_backward(q, k, v, o_THd, lse_TH)
        ctx.gradients = gradients
        return o_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THd: Tensor) -> Any:
        return *ctx.gradients(do_THd, *ctx.saved_tensors), None, None


@kernel
def _cuts(first_of, end_of, origin_of, most):  # type: ignore[no-untyped-def]
    """Beginnings of tiles, and the end: each has up to `most` neighbouring queries of one sequence."""
    cuts, num = np.zeros(len(first_of) + 1, np.int64), 1
    for t in range(1, len(first_of)):
        is_near = origin_of[t] == origin_of[t - 1] and first_of[t] < end_of[t - 1] and end_of[t] > first_of[t - 1]
        if not is_near or t - cuts[num - 1] >= most:
            cuts[num] = t
            num += 1
    cuts[num] = len(first_of)
    return cuts[: num + 1]


@kernel
def _tiles(q, k, v, k_scale, v_scale, out, lse, slot, first_of, end_of, origin_of, cuts, first, last):  # type: ignore[no-untyped-def]
    """Tiles [first, last): tile u has the queries from cuts[u % tiles] on, and key-value head u // tiles."""
    (groups, dim), tiles = k.shape[1:], len(cuts) - 1
    share, most = q.shape[1] // groups, 0
    for u in range(tiles):
        most = max(most, cuts[u + 1] - cuts[u])
    panels = (most * share + ROWS - 1) // ROWS
    lines, mixed = np.empty((panels * ROWS, dim), np.float32), np.empty((panels * ROWS, dim), np.float32)
    tops, sums = np.empty((panels, LANES), np.float32), np.empty((panels, ROWS), np.float32)
    scores, spare = np.empty((panels, BLOCK * ROWS), np.float32), np.empty(ROWS, np.float32)
    ranges, scales = np.empty((panels, 4), np.int64), np.zeros((2, BLOCK * ROWS if len(k_scale) else 0), np.float32)
    keys, values, in_turn = (
        np.empty((BLOCK, 1, dim), np.float32),
        np.empty((BLOCK, 1, dim), np.float32),
        np.arange(BLOCK),
    )
    for u in range(first, last):
        group, lo, hi = u // tiles, cuts[u % tiles], cuts[u % tiles + 1]
        num = (hi - lo) * share
        _line_up(q, lo, group, share, num, lines)
        mixed[:], tops[:], sums[:] = 0, NONE, 0
        begin, end = _ranges(first_of, end_of, lo, share, num, ranges)
        for at in range(begin - (begin - origin_of[lo]) % BLOCK, end, BLOCK):
            seen = max(at, begin), min(at + BLOCK, end)
            tile = at, lo, share, num, first_of, end_of, ranges, spare, scales
            if len(k_scale):
                _lay_scales(k_scale, slot, group, at, seen, scales[0])
                _lay_scales(v_scale, slot, group, at, seen, scales[1])
            if num <= FEW_LINES:
                _meet(lines, k, v, group, slot, at, tile, scores, tops, sums, mixed)
            else:
                _lay(k, slot, group, at, seen, keys)
                _lay(v, slot, group, at, seen, values)
                _meet(lines, keys, values, 0, in_turn, 0, tile, scores, tops, sums, mixed)
        _finish(mixed, tops, sums, lo, group, share, num, out, lse)


@kernel
def _ranges(first_of, end_of, lo, share, num, ranges):  # type: ignore[no-untyped-def]
    """Keys of each panel that any of its lines sees, [begin, end), and those that all of them see. -> The tile's range."""
    begin, end = first_of[lo], end_of[lo]
    for panel in range((num + ROWS - 1) // ROWS):
        first, last = lo + panel * ROWS // share, lo + min(num - 1, panel * ROWS + ROWS - 1) // share
        mine = ranges[panel]
        mine[0], mine[1], mine[2], mine[3] = first_of[first], end_of[first], first_of[first], end_of[first]
        for query in range(first + 1, last + 1):
            mine[0], mine[1] = min(mine[0], first_of[query]), max(mine[1], end_of[query])
            mine[2], mine[3] = max(mine[2], first_of[query]), min(mine[3], end_of[query])
        begin, end = min(begin, mine[0]), max(end, mine[1])
    return begin, end


@kernel
def _line_up(q, lo, group, share, num, lines):  # type: ignore[no-untyped-def]
    """lines[i]: head group * share + i % share of query lo + i // share, times d**-0.5; the last one again to a panel's end."""
    scale = np.float32(1 / np.sqrt(np.float64(q.shape[2])))
    for i in range((num + ROWS - 1) // ROWS * ROWS):
        at = min(i, num - 1)
        head, line = q[lo + at // share, group * share + at % share], lines[i]
        for c in range(len(line)):
            line[c] = widened(head[c]) * scale


@kernel
def _lay(stored, slot, group, at, seen, laid):  # type: ignore[no-untyped-def]
    for j in range(seen[0], seen[1]):
        one, line = stored[slot[j], group], laid[j - at, 0]
        for c in range(len(line)):
            line[c] = widened(one[c])


@kernel
def _lay_scales(scale, slot, group, at, seen, laid):  # type: ignore[no-untyped-def]
    """Those of keys, once for each line of a panel."""
    for j in range(seen[0], seen[1]):
        one = scale[slot[j], group]
        for i in range(ROWS):
            laid[ROWS * (j - at) + i] = one


@kernel
def _meet(lines, k, v, group, slot, base, tile, scores, tops, sums, mixed):  # type: ignore[no-untyped-def]
    """A tile's panels meet the block `at`, whose i-th key is at slot[base + i]."""
    at, _, _, num, _, _, ranges, spare, _ = tile
    panels = (num + ROWS - 1) // ROWS
    for panel in range(panels):
        begin, end = max(0, ranges[panel, 0] - at), min(BLOCK, ranges[panel, 1] - at)
        if begin < end:
            _score(lines, panel, k, group, slot, base, begin, end, scores[panel], num == 1, spare)
    for panel in range(panels):
        begin, end = max(0, ranges[panel, 0] - at), min(BLOCK, ranges[panel, 1] - at)
        if begin < end:
            _soften(scores[panel], tile, panel, end, tops[panel], sums[panel], mixed)
            _mix(v, group, slot, base, begin, end, scores[panel], mixed, panel, num == 1)


@kernel
def _score(lines, panel, k, group, slot, base, begin, end, score, is_one, one):  # type: ignore[no-untyped-def]
    """score[ROWS * j + i] = line i . key j, for keys from begin to end, in fours from the block's first; `is_one`: line 0's."""
    groups, dim = k.shape[1:]
    at, size, last = k.ctypes.data + k.itemsize * dim * group, k.itemsize * dim * groups, end - 1
    x = lines.ctypes.data + 4 * dim * ROWS * panel
    xs = x, x + 4 * dim, x + 8 * dim, x + 12 * dim
    for j in range(begin // KEYS * KEYS, end, KEYS):
        ws = (
            at + size * slot[base + max(j, begin)],
            at + size * slot[base + min(max(j + 1, begin), last)],
            at + size * slot[base + min(max(j + 2, begin), last)],
            at + size * slot[base + min(j + 3, last)],
        )
        if is_one:
            dots((x,), ws, dim, one.ctypes.data, k)
            for i in range(KEYS):
                score[ROWS * (j + i)] = one[i]
        elif HAS_REGISTERS:
            dots(xs, ws, dim, score.ctypes.data + 4 * ROWS * j, k)
        else:
            dots(xs, ws[:2], dim, score.ctypes.data + 4 * ROWS * j, k)
            dots(xs, ws[2:], dim, score.ctypes.data + 4 * ROWS * (j + 2), k)


@kernel
def _soften(score, tile, panel, end, top, total, mixed):  # type: ignore[no-untyped-def]
    """Scores become their exponentials, relative to the highest so far, and what was summed before is made relative to it."""
    at, ranges, found, scales, address = tile[0], tile[6], tile[7], tile[8], score.ctypes.data
    end = (end + KEYS - 1) // KEYS * KEYS
    _times(score, scales[0], end)
    is_whole = ranges[panel, 2] <= at and ranges[panel, 3] >= at + end
    if not is_whole:
        _hide(score, tile, panel, end, NONE)
    highest(address, end, found.ctypes.data)
    for i in range(ROWS):
        if found[i] > top[i]:
            scale = exp(top[i] - found[i])
            total[i] *= scale
            line = mixed[ROWS * panel + i]
            for c in range(len(line)):
                line[c] *= scale
            for lane in range(i, LANES, ROWS):
                top[lane] = found[i]
    for at in range(0, end * ROWS, LANES):
        some = score[at : at + LANES]
        for lane in range(LANES):
            some[lane] = exp(some[lane] - top[lane])
    if not is_whole:
        _hide(score, tile, panel, end, ZERO)
    summed(address, end, found.ctypes.data)
    for i in range(ROWS):
        total[i] += found[i]
    _times(score, scales[1], end)


@kernel
def _times(score, scale, end):  # type: ignore[no-untyped-def]
    for i in range(min(ROWS * end, len(scale))):
        score[i] *= scale[i]


@kernel
def _hide(score, tile, panel, end, value):  # type: ignore[no-untyped-def]
    """Put the value in the place of every key before `end` that a line does not see."""
    at, lo, share, num, first_of, end_of, _, _, _ = tile
    for i in range(ROWS):
        query = lo + min(panel * ROWS + i, num - 1) // share
        for j in range(min(end, first_of[query] - at)):
            score[ROWS * j + i] = value
        for j in range(max(0, end_of[query] - at), end):
            score[ROWS * j + i] = value


@kernel
def _mix(v, group, slot, base, begin, end, score, mixed, panel, is_one):  # type: ignore[no-untyped-def]
    """Add to a panel's lines the values from begin to end, each times its line's weight."""
    groups, dim = v.shape[1:]
    size, stride, p = v.itemsize, groups * dim, score.ctypes.data + 4 * ROWS * begin
    data, slots, num = v.ctypes.data + size * dim * group, slot.ctypes.data + 8 * (base + begin), end - begin
    out, whole, wide = mixed.ctypes.data + 4 * dim * ROWS * panel, dim // LANES * LANES, LANES * size
    narrow = whole - whole % (WIDE * LANES) if HAS_REGISTERS else 0
    for at in range(0, narrow, WIDE * LANES):
        one, to = data + size * at, out + 4 * at
        vs = one, one + wide, one + 2 * wide, one + 3 * wide
        if is_one:
            mixes(p, slots, vs, stride, num, (to,), v)
        else:
            mixes(p, slots, vs, stride, num, (to, to + 4 * dim, to + 8 * dim, to + 12 * dim), v)
    for at in range(narrow, whole, LANES):
        to = out + 4 * at
        mixes(p, slots, (data + size * at,), stride, num, (to, to + 4 * dim, to + 8 * dim, to + 12 * dim), v)
    for i in range(ROWS):
        line = mixed[ROWS * panel + i]
        for at in range(whole, dim):
            found = ZERO
            for j in range(begin, end):
                found = fma(score[ROWS * j + i], widened(v[slot[base + j], group, at]), found)
            line[at] += found


@kernel
def _finish(mixed, tops, sums, lo, group, share, num, out, lse):  # type: ignore[no-untyped-def]
    for i in range(num):
        panel, row = i // ROWS, i % ROWS
        query, head = lo + i // share, group * share + i % share
        total, line, to = sums[panel, row], mixed[i], out[query, head]
        lse[query, head] = tops[panel, row] + np.float32(np.log(total))
        for c in range(len(line)):
            to[c] = line[c] / total
