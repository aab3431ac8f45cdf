"""What a row's way to its expert and back takes: in this process, to another process on the same device, and as a graph.

Legend: R rows, D model. Two processes on one GPU take turns on it, so theirs is no figure for two GPUs.
This file is also the program of the other process: `python3 hop.py DEVICE DIM` is a shard that doubles rows.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from timing import median_s, wait_for
from torch import Tensor

from actors.dataplane.client import DirectTransport
from actors.dataplane.connection import Address
from actors.dataplane.frames import FrameLimits
from actors.dataplane.server import Combiner, DirectServer
from trinity.dispatch.transport import LocalTransport, Transport
from trinity.rpc.messages import Backward, Forward, Rows

SECRET, BLOCK, MAX_LOOKS = b"h" * 32, 1024, 1 << 20


class Doubler:
    def __init__(self, device: str):
        self.device = device

    def infer(self, call: Forward) -> Tensor:
        return 2 * call.rows.x_RD.to(self.device)

    def backward(self, call: Backward) -> Tensor:
        raise NotImplementedError("this shard only serves")


def measure(run: Any) -> Iterator[dict[str, Any]]:
    """Raises RuntimeError where an answer is wrong."""
    dim, sizes, rounds = (256, (1, 8), 20) if run.is_small else (3072, (1, 8, 64, 256, 2048), 200)
    other = subprocess.Popen(
        [sys.executable, __file__, run.device, str(dim)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        address = Address(**json.loads(other.stdout.readline()))
        direct = DirectTransport(None, lambda shard, deadline_s: address, SECRET)  # type: ignore[arg-type]
        local = LocalTransport({"s": Doubler(run.device)})
        for rows, (way, transport) in itertools.product(sizes, {"in process": local, "two processes": direct}.items()):
            x_RD = torch.randn(rows, dim, device=run.device).bfloat16()
            yield {"way": way, "rows": rows, "dim": dim, "us": 1e6 * _hop_s(transport, x_RD, run.device, rounds)}
        yield {"large rows between processes": [c.ways[1] for c in direct._connections.values()]}
        direct.close()
    finally:
        other.kill()
        other.wait()
    for rows in sizes[:2] if run.is_small else sizes:
        yield {"way": "put, ring, wait, take", "rows": rows, "dim": dim, **_rung(rows, dim, run.device, rounds)}


def _hop_s(transport: Transport, x_RD: Tensor, device: str, rounds: int) -> float:
    """Time by the host's clock, from idle to idle: what a decode pass pays."""
    slots_RK = torch.zeros(len(x_RD), 4)
    rows = Rows(x_RD, slots_RK.long(), slots_RK)
    laps = []
    for _ in range(rounds):
        wait_for(device)
        started = time.perf_counter()
        y_RD = transport.send("s", "infer", Forward("h:1", 0, 1, 0, time.monotonic() + 30, rows)).result()
        wait_for(device)
        laps.append(time.perf_counter() - started)
    if not torch.equal(y_RD, 2 * x_RD):
        raise RuntimeError(f"{len(x_RD)} rows came back wrong")
    return sorted(laps)[len(laps) // 2]


def _rung(rows: int, dim: int, device: str, rounds: int) -> dict[str, Any]:
    """The kernels of ring.py: one after the other, and on a GPU replayed as a graph."""
    from ring import put_and_ring, wait_and_take

    x, n = torch.randn(rows * dim, device=device).bfloat16(), rows * dim
    slot, y = torch.empty_like(x), torch.empty_like(x)
    flag, late = torch.zeros(2, 1, dtype=torch.int32, device=device)
    grid = (-(-n // BLOCK),)

    def step() -> None:
        flag.zero_()
        put_and_ring[grid](slot, x, flag, n, BLOCK=BLOCK)
        wait_and_take[grid](y, slot, flag, late, n, grid[0], MAX_LOOKS, BLOCK=BLOCK)

    step()
    if not torch.equal(x, y) or int(late):
        raise RuntimeError(f"{rows} rows did not arrive through the window")
    found = {"us": 1e6 * median_s(step, device, 3 if device == "cpu" else rounds)}
    return found if device == "cpu" else {**found, "graph us": 1e6 * median_s(_graph(step).replay, device, rounds)}


def _graph(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


if __name__ == "__main__":
    limits = FrameLimits(int(sys.argv[2]), 8, torch.bfloat16)
    server = DirectServer(Combiner(Doubler(sys.argv[1])), limits, SECRET, "127.0.0.1", device=sys.argv[1])
    print(json.dumps(asdict(server.address)), flush=True)
    sys.stdin.read()
