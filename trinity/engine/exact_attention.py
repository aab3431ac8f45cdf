"""Attention over the paged cache where a token's bits do not depend on its batch, its chunk or its padding: fp32 on a CPU.

Legend: T tokens of the pass, B decoding sequences, N slot numbers, P slots, n tokens of a chunk, S keys that a chunk sees,
H query heads, G key-value heads, d head dim.
Order within a layer as in trinity/engine/attention.py: prefill chunks gather their past, then all new keys and values are
written, then decodes read. They read keys where they lie, only those that they see.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.engine.attention import Flat, KVPools
from trinity.engine.block_table import BlockTable
from trinity.engine.kv_cache import KVCache
from trinity.ops.batch_invariant.attention import Seen, attention


class Reads(NamedTuple):
    """Queries, and the keys that each sees."""

    rows: slice  # of T
    seen: Seen


class Prefill(NamedTuple):
    """A chunk, and the slots of the keys before it that it sees."""

    past_N: Tensor
    reads: Reads


class ExactPlan(NamedTuple):
    """Places that the tokens of one pass read and write, in the layers of one kind."""

    write_rows: Tensor  # of T
    write_slots: Tensor
    decodes: Reads
    prefills: tuple[Prefill, ...]


class ExactAttention:
    """Attend for one forward pass. `cache` must already hold the blocks of every token of the pass."""

    def __init__(self, pools: KVPools, cache: KVCache, flat: Flat):
        self._pools = pools
        self._plans = {kind: make_plan(table, flat, kind.window) for kind, table in cache.tables.items()}

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGe: Tensor | None) -> Tensor:
        assert v_TGe is not None, "latent layers have no kernel here (is_plain)"
        v_TGd = v_TGe  # values are as long as keys
        kind, k_PGd, v_PGd = self._pools.of(layer)
        plan, out_THd = self._plans[kind], torch.empty_like(q_THd)
        for past_N, (rows, seen) in plan.prefills:
            k_SGd, v_SGd = (torch.cat((pool[past_N], new[rows])) for pool, new in ((k_PGd, k_TGd), (v_PGd, v_TGd)))
            out_THd[rows] = attention(q_THd[rows], k_SGd, v_SGd, seen)
        self._pools.write(layer, plan.write_slots, k_TGd[plan.write_rows], v_TGd[plan.write_rows])
        rows, seen = plan.decodes
        if rows.stop:
            out_THd[rows] = attention(q_THd[rows], k_PGd, v_PGd, seen)
        return out_THd


def make_plan(table: BlockTable, flat: Flat, window: int | None) -> ExactPlan:
    """`window` None: every earlier token is seen. Of a long chunk only the end is written."""
    reach = int(flat.end_T.max(initial=0)) if window is None else window
    write_T = np.nonzero(table.is_stored(flat.position_T, flat.end_T))[0]
    slots = table.slots(flat.row_T[write_T], flat.position_T[write_T])
    prefills, at = [], flat.num_decodes
    for row, start, end in flat.prefills:
        prefills.append(_prefill(table, row, start, end, at, reach))
        at += end - start
    return ExactPlan(torch.from_numpy(write_T), torch.from_numpy(slots), _decodes(table, flat, reach), tuple(prefills))


def _decodes(table: BlockTable, flat: Flat, reach: int) -> Reads:
    row_B, length_B = flat.row_T[: flat.num_decodes], flat.end_T[: flat.num_decodes]
    seen_B = np.minimum(length_B, reach)
    end_B = seen_B.cumsum()
    origin_B = end_B - length_B
    position_N = np.arange(seen_B.sum()) - np.repeat(origin_B, seen_B)
    slot_N = table.slots(np.repeat(row_B, seen_B), position_N)
    return Reads(slice(0, flat.num_decodes), Seen(*map(torch.from_numpy, (slot_N, end_B - seen_B, end_B, origin_B))))


def _prefill(table: BlockTable, row: int, start: int, end: int, at: int, reach: int) -> Prefill:
    first = max(0, start - reach + 1)
    past_N = torch.from_numpy(table.slots(row, np.arange(first, start)))
    end_n = torch.arange(start, end) - first + 1
    seen = Seen(torch.arange(end - first), (end_n - reach).clamp_(min=0), end_n, torch.full_like(end_n, -first))
    return Prefill(past_N, Reads(slice(at, at + end - start), seen))
