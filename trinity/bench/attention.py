"""`trinity bench attention`: attention in exact mode over long contexts, and torch's with a mask, as processor seconds.

Legend: T queries, S keys, H query heads, G key-value heads, d head dim.
Decisions: shapes are Nano's, keys lie in blocks of 16 in any order, as in a cache; torch is given them side by side, in order,
which costs it nothing here. The last T tokens of S see all before them, as a chunk of a prompt does. Arms take turns, and no
time counts before their answers agree.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from trinity.bench.models import numbers
from trinity.bench.report import Report, Table, alternated, ratio
from trinity.config import num_cpus
from trinity.errors import TrinityError
from trinity.utils.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

USUAL: dict[str, Any] = {"queries": 512, "keys": (8192, 32768, 131072), "rounds": 3}
QUICK: dict[str, Any] = {"queries": 8, "keys": (200,), "rounds": 1}
HEADS, KV_HEADS, DIM, BLOCK = 8, 2, 128, 16
OURS, INT8, TORCH = "exact", "exact, 8 bits", "torch, with a mask"
CLOSE = {"float32": 1e-5, "bfloat16": 2e-2}  # how far answers of the same numbers may be apart


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=int, help=f"tokens of the chunk (default: {USUAL['queries']})")
    parser.add_argument(
        "--keys", type=numbers, metavar="N,…", help=f"tokens that the last one sees (default: {USUAL['keys']})"
    )
    parser.add_argument("--rounds", type=int, help=f"turns of each arm (default: {USUAL['rounds']})")


def measure(arguments: argparse.Namespace) -> Report:
    import torch

    given = {**(QUICK if arguments.quick else USUAL), **{k: v for k, v in vars(arguments).items() if v is not None}}
    torch.set_num_threads(num_cpus())
    report, rows = Report("attention"), []
    for dtype in CLOSE:
        for num_keys in given["keys"]:
            for num_queries in (given["queries"], 1):
                say(f"{dtype}, {num_queries} queries over {num_keys} keys")
                found = alternated(_arms(dtype, num_queries, num_keys), given["rounds"])
                rows += _rows(report, f"{dtype}, {num_queries} queries, {num_keys} keys", found)
                report.results.append({"dtype": dtype, "queries": num_queries, "keys": num_keys, "seconds": found})
    title = f"{HEADS} heads of {DIM}, {KV_HEADS} key heads, on {num_cpus()} cores: processor milliseconds"
    report.tables.append(Table(title, ("what", "arm", "CPU ms", f"times as fast as {TORCH}"), tuple(rows)))
    return report


def _rows(report: Report, what: str, found: Mapping[str, list[float]]) -> list[tuple[Any, ...]]:
    gains = {arm: ratio(found[TORCH], seconds) for arm, seconds in found.items()}
    if " 1 queries" not in what:
        report.target(f"{what}: {TORCH} / {OURS}", gains[OURS], at_least=1)
    return [(what, arm, 1e3 * min(seconds), gains[arm]) for arm, seconds in found.items()]


def _arms(dtype: str, num_queries: int, num_keys: int) -> dict[str, Callable[[], float]]:
    """Each a turn: -> its processor seconds."""
    import torch

    from trinity.engine.kv_pools import rounded
    from trinity.ops.batch_invariant.attention import Seen, attention

    made = torch.Generator().manual_seed(0)
    sizes = ((num_queries, HEADS), (num_keys, KV_HEADS), (num_keys, KV_HEADS))
    q, k, v = (torch.randn(num, heads, DIM, generator=made).to(getattr(torch, dtype)) for num, heads in sizes)
    slot_N = (torch.randperm(num_keys // BLOCK + 1, generator=made)[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    slot_N = slot_N[:num_keys]
    pools = [torch.zeros(num_keys + BLOCK, KV_HEADS, DIM, dtype=x.dtype).index_copy_(0, slot_N, x) for x in (k, v)]
    end_T = torch.arange(num_keys - num_queries, num_keys) + 1
    seen = Seen(slot_N, torch.zeros_like(end_T), end_T, torch.zeros_like(end_T))
    (k_small, k_scale), (v_small, v_scale) = map(rounded, pools)
    runs = {
        OURS: partial(attention, q, pools[0], pools[1], seen),
        INT8: partial(attention, q, k_small, v_small, seen, (k_scale, v_scale)),
        TORCH: partial(_library, q, k, v, end_T),
    }
    gap = (runs[OURS]() - runs[TORCH]()).abs().max().item()
    if gap > CLOSE[dtype]:
        raise TrinityError(f"{OURS} and {TORCH} are {gap:.1e} apart in {dtype}, bound {CLOSE[dtype]}: this is a bug")
    return {arm: partial(_timed, run) for arm, run in runs.items()}


def _library(q_THd: "Tensor", k_SGd: "Tensor", v_SGd: "Tensor", end_T: "Tensor") -> "Tensor":
    import torch
    import torch.nn.functional as F

    q = q_THd.unflatten(1, (KV_HEADS, -1)).permute(1, 2, 0, 3)
    k, v = (x.transpose(0, 1).unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (k_SGd, v_SGd))
    mask_TS = torch.arange(len(k_SGd)) < end_T[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS).permute(2, 0, 1, 3).flatten(1, 2)


def _timed(run: Callable[[], "Tensor"]) -> float:
    import torch

    with torch.inference_mode():
        began = time.process_time()
        run()
        return time.process_time() - began
