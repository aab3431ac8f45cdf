"""Shards behind sockets whose rows go through shared buffers, for the tests of them; and what is left of buffers afterwards.

This file is also the program of a child process, `python shared_buffers.py shard|caller ADDRESS`; it talks in JSON lines.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from actors.dataplane.client import Connection, DirectTransport
from actors.dataplane.connection import Address
from actors.dataplane.frames import FrameLimits
from actors.dataplane.server import Combiner, DirectServer
from actors.dataplane.shm import NUM_BOXES, HostSharedBuffer
from trinity.config import OptimConfig, preset
from trinity.dispatch.transport import LocalTransport
from trinity.pool.local import local_pool
from trinity.rpc.messages import Forward, Load, Rows

DIM, SECRET = 16, b"m" * 32
MODEL = preset("tiny").model_copy(
    update=dict(hidden_size=DIM, moe_intermediate_size=8, num_experts=8, num_experts_per_tok=3)
)
LAYER = MODEL.moe_layers[0]
LARGE = 64  # rows of fp32 that go into the shared buffer in these tests


def shard_of(dtype="float32"):
    model = MODEL.model_copy(update={"dtype": dtype})
    return local_pool(model, Load(seed=5), optim=OptimConfig(), backend="torch").transport.shards["shard-0"]


def serve(shard, dtype=torch.float32):
    return DirectServer(Combiner(shard), FrameLimits(DIM, 8, dtype), SECRET, "127.0.0.1")


def forward(num_rows, seed=0, dtype=torch.float32, keep=False, op="m:1"):
    rng = torch.Generator().manual_seed(seed)
    ids_RK = torch.rand(num_rows, 8, generator=rng).topk(3).indices
    x_RD = torch.randn(num_rows, DIM, generator=rng).to(dtype)
    rows = Rows(x_RD, ids_RK, torch.rand(num_rows, 3, generator=rng))
    return Forward(op, LAYER, 1, 0, time.monotonic() + 60, rows, keep)


class Served:
    """A shard of its own behind sockets, and an equal one in this process."""

    def __init__(self, dtype="float32"):
        self.dtype = getattr(torch, dtype)
        self.server, self.oracle = serve(shard_of(dtype), self.dtype), LocalTransport({"shard-0": shard_of(dtype)})
        self.transport = DirectTransport(self.oracle, lambda shard, deadline_s: self.server.address, SECRET)

    def connect(self):
        return Connection(self.server.address, SECRET, time.monotonic() + 60)

    def both(self, verb, call):
        return [t.send("shard-0", verb, call).result() for t in (self.transport, self.oracle)]

    def is_well(self):
        got, want = self.both("infer", forward(5))
        assert torch.equal(got, want)

    def close(self):
        self.transport.close()
        self.server.close()


def begin_test(monkeypatch):
    """Few rows are enough for a buffer; those that other files' tests have left in this process, which may go at any time, do
    not count."""
    global OTHERS
    OTHERS = mapped()
    monkeypatch.setattr(HostSharedBuffer, "min_bytes", LARGE * DIM * 4)


def mapped():
    """Shared buffers in this process's memory."""
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:trinity" in line}


def num_mapped():
    """Shared buffers in this process's memory since the test began."""
    return len(mapped() - OTHERS)


def num_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def eventually(holds, within_s=60.0):
    end_s = time.monotonic() + within_s
    while not holds() and time.monotonic() < end_s:
        time.sleep(0.01)
    return holds()


def child_shard():
    server = serve(shard_of())
    print(json.dumps(asdict(server.address)), flush=True)
    sys.stdin.read()


def child_caller(address):
    connection = Connection(Address(**json.loads(address)), SECRET, time.monotonic() + 60)
    for i in range(NUM_BOXES):
        connection.send(forward(LARGE, seed=i))
    print(json.dumps("sent"), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    HostSharedBuffer.min_bytes = LARGE * DIM * 4
    {"shard": child_shard, "caller": child_caller}[sys.argv[1]](*sys.argv[2:])
