"""Attention over the paged cache: the `Attend` of the engine's forward passes.

Legend: T tokens of the pass, B decoding sequences, S keys seen, P slots, n tokens of a prefill chunk, H query heads,
G key-value heads, R = H / G, d key dim, e value dim (= d but in latent layers).
The flat T holds the single-token chunks first (longest context first), then the prefill chunks. Slots and masks are
made once per pass and shared by all layers of a kind. Within a layer the order is: prefill chunks gather their past,
then all new keys and values are written, then decodes gather. A ring that turns round within a chunk relies on it.
Grouped heads need no copies of keys: decodes see the R query heads of a group as R queries, prefill as R heads whose
key has stride 0. Padding repeats a sequence's own slots, so one request's numbers can never reach another.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.config import LayerCache
from trinity.engine.block_table import BlockTable
from trinity.engine.kv_cache import KVCache
from trinity.engine.kv_pools import KVPools, Parts

PAD_FREELY = 256  # keys; contexts up to this length share one padded call
MAX_GATHERED = 1 << 18  # padded keys of one decode call: bounds its memory
MAX_MASK = 1 << 22  # entries of one prefill mask


@dataclass(frozen=True)
class Flat:
    """The tokens of a pass, host side. Chunks are in the order of T; `row` is the line in the cache's tables."""

    position_T: np.ndarray
    row_T: np.ndarray
    end_T: np.ndarray  # the end of the token's chunk: the sequence's length after this pass
    num_decodes: int
    prefills: tuple[tuple[int, int, int], ...]  # (row, start, end) of each longer chunk

    @property
    def is_single(self) -> bool:
        """Say whether all its tokens are single ones, or drafts behind them."""
        return not self.prefills

    @property
    def addresses(self) -> tuple[int, int]:
        """Places of `row_T` and `position_T`, for the extension."""
        return address_of(self.row_T), address_of(self.position_T)


def address_of(array: np.ndarray) -> int:
    """The place of its memory, which it keeps; `ctypes.data` takes three times as long."""
    address: int = array.__array_interface__["data"][0]
    return address


class Decodes(NamedTuple):
    rows: slice  # of T
    slots_BS: Tensor
    mask_B11S: Tensor | None  # True: may be seen


class Tile(NamedTuple):
    """Some queries of a chunk, and the keys (past and chunk) that they may see; no mask: plainly causal."""

    queries: slice
    keys: slice
    mask_qS: Tensor | None


class Prefill(NamedTuple):
    rows: slice  # of T
    past_P: Tensor | None  # slots of the keys before the chunk
    tiles: tuple[Tile, ...]


class AttentionPlan(NamedTuple):
    """Places that the tokens of one pass read and write, in the layers of one kind."""

    write_rows: Tensor | None  # of T; None: all
    write_slots: Tensor
    decodes: tuple[Decodes, ...]
    prefills: tuple[Prefill, ...]


class PagedAttention:
    """Attend for one forward pass. `cache` must already hold the blocks of every token of the pass."""

    def __init__(self, pools: KVPools, cache: KVCache, flat: Flat):
        self._pools = pools
        self._plans = {kind: make_plan(table, flat, kind.window, pools.device) for kind, table in cache.tables.items()}

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGe: Tensor | None) -> Tensor:
        kind, stored = self._pools.of(layer)
        plan, new = self._plans[kind], self._pools.stored(k_TGd, v_TGe)
        out_THe = q_THd.new_empty(*q_THd.shape[:2], kind.value_dim)
        for part in plan.prefills:
            own = tuple(each[part.rows] for each in new)
            if part.past_P is not None:
                past = (each.index_select(0, part.past_P) for each in stored)
                own = tuple(map(torch.cat, zip(past, own, strict=True)))
            _prefill(out_THe[part.rows], q_THd[part.rows], *self._pools.widened(kind, own), part.tiles, kind.scale)
        keep = slice(None) if plan.write_rows is None else plan.write_rows
        self._pools.write(layer, plan.write_slots, tuple(each[keep] for each in new))
        for group in plan.decodes:
            out_THe[group.rows] = self._decode(kind, q_THd[group.rows], stored, group)
        return out_THe

    def _decode(self, kind: LayerCache, q_BHd: Tensor, stored: Parts, group: Decodes) -> Tensor:
        shape_BS = group.slots_BS.shape
        parts = tuple(each.index_select(0, group.slots_BS.flatten()).unflatten(0, shape_BS) for each in stored)
        k_BGSd, v_BGSe = (each.transpose(1, 2) for each in self._pools.widened(kind, parts))
        q_BGRd, mask = q_BHd.unflatten(1, (kind.num_heads, -1)), group.mask_B11S
        o_BGRe = F.scaled_dot_product_attention(q_BGRd, k_BGSd, v_BGSe, attn_mask=mask, scale=kind.scale)
        return o_BGRe.flatten(1, 2)


def _prefill(
    out_nHe: Tensor, q_nHd: Tensor, k_SGd: Tensor, v_SGe: Tensor, tiles: tuple[Tile, ...], scale: float
) -> None:
    num_groups = k_SGd.shape[1]
    for tile in tiles:
        q_GRnd = q_nHd[tile.queries].unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)
        k_GRSd, v_GRSe = (
            x[tile.keys].transpose(0, 1).unsqueeze(1).expand(-1, q_GRnd.shape[1], -1, -1) for x in (k_SGd, v_SGe)
        )
        o_GRne = F.scaled_dot_product_attention(
            q_GRnd, k_GRSd, v_GRSe, attn_mask=tile.mask_qS, is_causal=tile.mask_qS is None, scale=scale
        )
        out_nHe[tile.queries] = o_GRne.permute(2, 0, 1, 3).flatten(1, 2)


def make_plan(table: BlockTable, flat: Flat, window: int | None, device: torch.device) -> AttentionPlan:
    """`window` None: every earlier token is seen. Of a long chunk only the end is written, and what is kept for others."""
    written, slots = table.written(flat.row_T, flat.position_T)
    write_rows = None if len(written) == len(flat.row_T) else _to(written, device)
    decodes = tuple(_plan_decodes(table, flat, window, device))
    return AttentionPlan(write_rows, _to(slots, device), decodes, tuple(_plan_prefills(table, flat, window, device)))


def _plan_decodes(table: BlockTable, flat: Flat, window: int | None, device: torch.device) -> list[Decodes]:
    length_B = flat.end_T[: flat.num_decodes]
    seen_B = length_B if window is None else np.minimum(length_B, window)
    groups = []
    for lo, hi in _groups(seen_B):
        length_G1, seen_G1 = length_B[lo:hi, None], seen_B[lo:hi, None]
        column_S = np.arange(seen_G1.max())
        position_GS = np.minimum(length_G1 - seen_G1 + column_S, length_G1 - 1)
        slots = _to(table.slots(flat.row_T[lo:hi, None], position_GS), device)
        mask_GS = column_S < seen_G1
        mask = None if mask_GS.all() else _to(mask_GS[:, None, None, :], device)
        groups.append(Decodes(slice(lo, hi), slots, mask))
    return groups


def _groups(seen_B: np.ndarray) -> list[tuple[int, int]]:
    """Cut descending lengths into runs whose padding at most doubles the work and whose gathered keys stay bounded."""
    cuts = []
    lo = 0
    for i in range(len(seen_B) + 1):
        if i == len(seen_B) or _must_cut(int(seen_B[lo]), int(seen_B[i]), i - lo):
            cuts.append((lo, i))
            lo = i
    return [(a, b) for a, b in cuts if b > a]


def _must_cut(longest: int, this: int, count: int) -> bool:
    return (longest > PAD_FREELY and this * 2 < longest) or (count + 1) * longest > MAX_GATHERED


def _plan_prefills(table: BlockTable, flat: Flat, window: int | None, device: torch.device) -> list[Prefill]:
    parts, at = [], flat.num_decodes
    for row, start, end in flat.prefills:
        first = 0 if window is None else max(0, start - window + 1)
        past = _to(table.slots(row, np.arange(first, start)), device) if first < start else None
        rows = slice(at, at + end - start)
        parts.append(Prefill(rows, past, tuple(_tiles(first, start, end, window, device))))
        at = rows.stop
    return parts


def _tiles(first: int, start: int, end: int, window: int | None, device: torch.device) -> list[Tile]:
    """Cut the queries at [start, end), whose keys are at [first, end), so that masks stay small and windows narrow."""
    size = max(64, MAX_MASK // (end - first))
    if window is not None:
        size = min(size, max(64, window))
    tiles = []
    for lo in range(start, end, size):
        hi = min(end, lo + size)
        key = first if window is None else max(first, lo - window + 1)
        plain = key == lo and (window is None or hi - lo <= window)
        mask = None if plain else _mask(lo, hi, key, window, device)
        tiles.append(Tile(slice(lo - start, hi - start), slice(key - first, hi - first), mask))
    return tiles


def _mask(lo: int, hi: int, key: int, window: int | None, device: torch.device) -> Tensor:
    """bool [hi - lo, hi - key]: query t in [lo, hi) sees s in [key, hi) iff t - window < s <= t."""
    ahead = torch.arange(lo, hi, device=device)[:, None] - torch.arange(key, hi, device=device)
    return ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
