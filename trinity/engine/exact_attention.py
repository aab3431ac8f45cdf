"""Attention over the paged cache where a token's bits do not depend on its batch, its chunk or its padding: fp32 on a CPU.

Legend: T tokens of the pass, B decoding sequences, N slot numbers, P slots, n tokens of a chunk, S keys that a chunk sees,
H query heads, G key-value heads, d head dim.
Order within a layer: chunks of windowed layers gather their past, because what is written may take its place; then all new keys
and values are written, then all others read. They read keys where they lie, only those that they see.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.config import LayerCache
from trinity.engine.attention import Flat, address_of
from trinity.engine.block_table import BlockTable
from trinity.engine.kv_cache import KVCache
from trinity.engine.kv_pools import KVPools
from trinity.models.common.native_model import Memories
from trinity.models.common.native_step import ATTEND, Stored
from trinity.ops.batch_invariant.attention import Seen, attention
from trinity.ops.extension import KINDS


class Reads(NamedTuple):
    """Queries, and the keys that each sees."""

    rows: slice  # of T
    seen: Seen


class Gathered(NamedTuple):
    """A chunk, and the slots of the keys before it that it sees: with its own behind them they are what `reads` counts."""

    past_N: Tensor
    reads: Reads


class ExactPlan(NamedTuple):
    """Places that the tokens of one pass read and write, in the layers of one kind."""

    write_rows: Tensor  # of T
    write_slots: Tensor
    gathered: tuple[Gathered, ...]
    reads: tuple[Reads, ...]  # after the write


class ExactAttention:
    """Attend for one forward pass. `cache` must already hold the blocks of every token of the pass.

    Where tokens lie is looked up when Python first attends: the extension finds single tokens' keys by the tables themselves.
    """

    def __init__(self, pools: KVPools, cache: KVCache, flat: Flat):
        self._pools, self._cache, self._flat = pools, cache, flat
        self._plans: dict[LayerCache, ExactPlan] = {}

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGe: Tensor | None) -> Tensor:
        assert v_TGe is not None, "latent layers have no kernel here (is_plain)"
        kind, stored = self._pools.of(layer)
        plan, new, out_THd = self._plan(kind), self._pools.stored(k_TGd, v_TGe), torch.empty_like(q_THd)
        for past_N, (rows, seen) in plan.gathered:
            k, v, *scales = (torch.cat((pool[past_N], part[rows])) for pool, part in zip(stored, new, strict=True))
            out_THd[rows] = attention(q_THd[rows], k, v, seen, scales)
        self._pools.write(layer, plan.write_slots, tuple(part[plan.write_rows] for part in new))
        for rows, seen in plan.reads:
            out_THd[rows] = attention(q_THd[rows], stored[0], stored[1], seen, stored[2:])
        return out_THd

    def _plan(self, kind: LayerCache) -> ExactPlan:
        if kind not in self._plans:
            self._plans[kind] = make_plan(self._cache.tables[kind], self._flat, kind.window)
        return self._plans[kind]

    def stored(self, layer: int, q_THd: Tensor) -> Stored | None:
        """Places for the extension, of passes of single tokens."""
        if not self._flat.is_single:
            return None
        kind, parts = self._pools.addresses[layer]
        description = packed(self._cache.tables[kind], kind, q_THd.dtype, q_THd.shape[1], self._pools.is_int8)
        return Stored(description, self._flat.addresses, parts)

    def memories(self, heads_L: Sequence[int], dtype: torch.dtype) -> Memories | None:
        """Places of all layers for the extension, whose queries have so many heads, in passes of single tokens."""
        if not self._flat.is_single:
            return None
        key = (*heads_L, dtype)
        if key not in self._pools.described:  # tables and pools stay where they are
            self._pools.described[key] = self._described(heads_L, dtype)
        return Memories(*self._pools.described[key], self._flat.addresses)

    def _described(self, heads_L: Sequence[int], dtype: torch.dtype) -> tuple[int, bytes, bytes]:
        found, memory_L = dict[tuple[LayerCache, int], int](), list[int]()
        for heads, (kind, parts) in zip(heads_L, self._pools.addresses, strict=True):
            memory_L += (found.setdefault((kind, heads), len(found)), *parts)
        own = [packed(self._cache.tables[k], k, dtype, heads, self._pools.is_int8) for k, heads in found]
        return len(found), b"".join(own), struct.pack(f"<{len(memory_L)}q", *memory_L)


def packed(table: BlockTable, kind: LayerCache, dtype: torch.dtype, heads: int, is_int8: bool) -> bytes:
    """An Attend of native/step/step.h; the table keeps its memory."""
    stored, block_NC = KINDS[torch.int8 if is_int8 else dtype], table.block_NC
    sizes = (heads, kind.num_heads, kind.key_dim, kind.window or 0, table.block_size, block_NC.shape[1])
    return struct.pack(ATTEND, dtype == torch.bfloat16, stored, *sizes, address_of(block_NC))


def make_plan(table: BlockTable, flat: Flat, window: int | None) -> ExactPlan:
    """`window` None: every earlier token is seen. Of a long chunk only the end is written, and what is kept for others."""
    reach = int(flat.end_T.max(initial=0)) if window is None else window
    written, slots = table.written(flat.row_T, flat.position_T)
    gathered, reads, at = [], [_decodes(table, flat, reach)] if flat.num_decodes else [], flat.num_decodes
    for row, start, end in flat.prefills:
        rows, first = slice(at, at + end - start), max(0, start - reach + 1)
        if window is None:
            slot_N = torch.from_numpy(table.slots(row, np.arange(end)))
            reads.append(Reads(rows, _chunk(slot_N, start, end, first, reach)))
        else:
            past_N, every = torch.from_numpy(table.slots(row, np.arange(first, start))), torch.arange(end - first)
            gathered.append(Gathered(past_N, Reads(rows, _chunk(every, start, end, first, reach))))
        at = rows.stop
    return ExactPlan(torch.from_numpy(written), torch.from_numpy(slots), tuple(gathered), tuple(reads))


def _decodes(table: BlockTable, flat: Flat, reach: int) -> Reads:
    row_B, length_B = flat.row_T[: flat.num_decodes], flat.end_T[: flat.num_decodes]
    seen_B = np.minimum(length_B, reach)
    end_B = seen_B.cumsum()
    origin_B = end_B - length_B
    position_N = np.arange(seen_B.sum()) - np.repeat(origin_B, seen_B)
    slot_N = table.slots(np.repeat(row_B, seen_B), position_N)
    return Reads(slice(0, flat.num_decodes), Seen(*map(torch.from_numpy, (slot_N, end_B - seen_B, end_B, origin_B))))


def _chunk(slot_N: Tensor, start: int, end: int, first: int, reach: int) -> Seen:
    """Keys that positions from start to end see, of those from the position `first` on, at these slots."""
    end_n = torch.arange(start, end) - first + 1
    return Seen(slot_N, (end_n - reach).clamp_(min=0), end_n, torch.full_like(end_n, -first))
