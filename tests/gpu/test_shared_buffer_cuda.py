"""Rows of a GPU: through memory that both processes map, or staged through the host; the same bits each way.

This file is also the program of the child process: `python test_shared_buffer_cuda.py DEVICE` is a shard that does sums.
"""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

from actors.dataplane import shm
from actors.dataplane.client import DirectTransport
from actors.dataplane.connection import Address
from actors.dataplane.frames import FrameLimits
from actors.dataplane.server import Combiner, DirectServer
from actors.dataplane.shm import BOX_BYTES, NUM_BOXES, SIZE
from tests.gpu.children import environment
from trinity.errors import Unavailable
from trinity.rpc.messages import Backward, Forward, Rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DIM, SECRET = 64, b"g" * 32
SIZES = (1, 100, 4096, BOX_BYTES // (2 * DIM) + 1)  # the last fits in no box


class Sums:
    """A shard whose answers are exact, on any device."""

    def __init__(self, device):
        self.device, self.kept = device, {}

    def infer(self, call):
        x_RD = call.rows.x_RD.to(self.device)
        if call.keep:
            self.kept[call.op_id] = x_RD
        return 2 * x_RD

    def backward(self, call):
        dy_RD = call.dy_RD.to(self.device)
        return dy_RD + self.kept[call.op_id], dy_RD.float()[:, :2]


class Child:
    def __init__(self, device):
        self.process = subprocess.Popen(
            [sys.executable, __file__, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self.address = Address(**json.loads(self.process.stdout.readline()))

    def connect(self, near=True):
        address = self.address if near else replace(self.address, machine="elsewhere")
        return DirectTransport(None, lambda shard, deadline_s: address, SECRET)

    def end(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def children():
    made = {device: Child(device) for device in ("cpu", "cuda")}
    yield made
    for child in made.values():
        child.end()


def forward(x_RD, keep=False, op="g:1"):
    slots = torch.zeros(len(x_RD), 2)
    return Forward(op, 0, 1, 0, time.monotonic() + 60, Rows(x_RD, slots.long(), slots), keep)


def ways(transport):
    return [connection.ways for connection in transport._connections.values()]


@pytest.mark.parametrize(
    ("mine", "theirs", "near", "way"),
    [
        ("cuda", "cuda", True, "CUDA memory"),
        ("cpu", "cuda", True, "shared memory"),
        ("cuda", "cpu", True, "shared memory"),
        ("cuda", "cuda", False, "TCP"),
        ("cpu", "cuda", False, "TCP"),
        ("cuda", "cpu", False, "TCP"),
    ],
)
def test_forward_and_backward_are_the_same_bits(children, mine, theirs, near, way):
    transport = children[theirs].connect(near)
    for num_rows in SIZES:
        rng = torch.Generator().manual_seed(num_rows)
        x_RD, dy_RD = torch.randn(2, num_rows, DIM, generator=rng).to(mine, torch.bfloat16)
        op = f"{mine}{near}:{num_rows}"
        y_RD = transport.send("s", "infer", forward(x_RD, keep=True, op=op)).result()
        for _ in range(2):  # the box is used again: neither what is kept nor y may change
            transport.send("s", "infer", forward(dy_RD)).result()
        assert (y_RD.device.type, torch.equal(y_RD, 2 * x_RD)) == (mine, True)
        dx_RD, dweights_RK = transport.send(
            "s", "backward", Backward(op, 0, 1, 0, time.monotonic() + 60, dy_RD)
        ).result()
        assert (dx_RD.device.type, torch.equal(dx_RD, dy_RD + x_RD)) == (mine, True)
        assert torch.equal(dweights_RK.cpu(), dy_RD[:, :2].float().cpu())
    assert [large for _, large in ways(transport)] == [way]
    transport.close()


def test_without_cuda_memory_gpus_share_the_host_s(children, monkeypatch):
    def refuse(name, *arguments):
        raise OSError(f"{name} is not supported here")

    monkeypatch.setattr(shm, "driver", refuse)
    transport, x_RD = children["cuda"].connect(), torch.randn(8192, DIM, device="cuda").bfloat16()
    assert torch.equal(transport.send("s", "infer", forward(x_RD)).result(), 2 * x_RD)
    assert [large for _, large in ways(transport)] == ["shared memory"]
    transport.close()


def test_rows_that_a_stream_has_yet_to_compute(children):
    transport, wide = children["cuda"].connect(), torch.randn(4096, 4096, device="cuda")
    for _ in range(5):
        with torch.cuda.stream(torch.cuda.Stream()):
            late = wide
            for _ in range(20):
                late = (late @ wide).clamp(-1, 1)
            x_RD = late[:, :DIM].bfloat16()
            y_RD = transport.send("s", "infer", forward(x_RD)).result()
            assert torch.equal(y_RD, 2 * x_RD)
    transport.close()


def test_more_requests_than_boxes(children):
    transport = children["cuda"].connect()
    sent = [torch.full((512, DIM), i, device="cuda", dtype=torch.bfloat16) for i in range(3 * NUM_BOXES)]
    replies = [transport.send("s", "infer", forward(x_RD)) for x_RD in sent]
    for x_RD, reply in reversed(list(zip(sent, replies, strict=True))):
        assert torch.equal(reply.result(), 2 * x_RD)
    transport.close()


def free_bytes():
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_memory_comes_back_when_connections_are_dropped_and_when_the_shard_is_killed(children):
    x_RD = torch.ones(512, DIM, device="cuda", dtype=torch.bfloat16)
    before = free_bytes()
    for _ in range(5):
        transport = children["cuda"].connect()
        transport.send("s", "infer", forward(x_RD)).result()
        transport.close()
    time.sleep(1.0)
    assert before - free_bytes() < SIZE
    child = Child("cuda")
    transport = child.connect()
    transport.send("s", "infer", forward(x_RD)).result()
    child.end()
    with pytest.raises(Unavailable):
        transport.send("s", "infer", forward(x_RD)).result()
    time.sleep(1.0)
    assert before - free_bytes() < SIZE


if __name__ == "__main__":
    server = DirectServer(
        Combiner(Sums(sys.argv[1])), FrameLimits(DIM, 8, torch.bfloat16), SECRET, "127.0.0.1", device=sys.argv[1]
    )
    print(json.dumps(asdict(server.address)), flush=True)
    sys.stdin.read()
