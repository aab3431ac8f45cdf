"""Rows through shared buffers: the same bits, whoever is slow, hostile, declines or is killed; and nothing is left of it.

This file is also the program of a child process, `python test_shared_buffer.py shard|caller ADDRESS`; it talks in JSON lines.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from actors.dataplane import frames, shm
from actors.dataplane.client import Connection, DirectTransport
from actors.dataplane.connection import CPU, Address
from actors.dataplane.frames import BadFrame, FrameLimits, Header, in_shared_buffer, offer, request
from actors.dataplane.server import Combiner, DirectServer
from actors.dataplane.shm import BOX_BYTES, NUM_BOXES, SIZE, CudaSharedBuffer, HostSharedBuffer
from trinity.config import OptimConfig, preset
from trinity.dispatch.transport import LocalTransport
from trinity.errors import InputGone, Unavailable
from trinity.pool.local import local_pool
from trinity.rpc.messages import Backward, Forward, Load, Rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd")
DIM, SECRET, ROOT = 16, b"m" * 32, Path(__file__).parents[2]
MODEL = preset("tiny").model_copy(
    update=dict(hidden_size=DIM, moe_intermediate_size=8, num_experts=8, num_experts_per_tok=3)
)
LAYER = MODEL.moe_layers[0]
LARGE = 64  # rows of fp32 that go into the shared buffer in these tests
THRESHOLD = HostSharedBuffer.min_bytes


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
    return Forward(op, LAYER, 1, 0, time.time() + 60, rows, keep)


class Served:
    """A shard of its own behind sockets, and an equal one in this process."""

    def __init__(self, dtype="float32"):
        self.dtype = getattr(torch, dtype)
        self.server, self.oracle = serve(shard_of(dtype), self.dtype), LocalTransport({"shard-0": shard_of(dtype)})
        self.transport = DirectTransport(self.oracle, lambda shard, deadline_s: self.server.address, SECRET)

    def connect(self):
        return Connection(self.server.address, SECRET, time.time() + 60)

    def both(self, verb, call):
        return [t.send("shard-0", verb, call).result() for t in (self.transport, self.oracle)]

    def is_well(self):
        got, want = self.both("infer", forward(5))
        assert torch.equal(got, want)

    def close(self):
        self.transport.close()
        self.server.close()


@pytest.fixture(autouse=True)
def lower_threshold(monkeypatch):
    monkeypatch.setattr(HostSharedBuffer, "min_bytes", LARGE * DIM * 4)


@pytest.fixture
def served():
    made = Served()
    yield made
    made.close()


@pytest.fixture
def posted(monkeypatch):
    """The boxes that something was put into, on both sides."""
    seen, put = [], HostSharedBuffer.put

    def spy(self, box, tensor):
        seen.append(box)
        put(self, box, tensor)

    monkeypatch.setattr(HostSharedBuffer, "put", spy)
    return seen


def mapped():
    """Shared buffers in this process's memory."""
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:trinity" in line}


@pytest.fixture(autouse=True)
def others():
    """What other files' tests have left in this process, which may go at any time."""
    global OTHERS
    OTHERS = mapped()


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


# -- the same bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_and_backward_are_the_same_bits_on_both_sides_of_the_threshold(dtype, posted, monkeypatch):
    monkeypatch.setattr(HostSharedBuffer, "min_bytes", THRESHOLD)
    served = Served(dtype)
    threshold = THRESHOLD // (served.dtype.itemsize * DIM)
    for i, num_rows in enumerate((threshold - 1, threshold, threshold + 1, 3 * threshold)):
        posted.clear()
        call = forward(num_rows, seed=i, dtype=served.dtype, keep=True, op=f"m:{i}")
        got, want = served.both("infer", call)
        assert torch.equal(got, want)
        dy_RD = torch.randn(num_rows, DIM).to(served.dtype)
        pairs = served.both("backward", Backward(f"m:{i}", LAYER, 1, 0, call.deadline_s, dy_RD))
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
        assert len(posted) == (0 if num_rows < threshold else 4)
    served.close()


def test_rows_that_are_sent_again_for_a_backward_are_the_same(served, posted):
    call = forward(LARGE)
    again = Backward("m:9", LAYER, 1, 0, call.deadline_s, torch.ones(LARGE, DIM))
    with pytest.raises(InputGone):
        served.transport.send("shard-0", "backward", again).result()
    pairs = served.both("backward", replace(again, rows=call.rows))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
    assert len(posted) == 3  # dy twice, dx


def test_what_is_kept_for_the_backward_does_not_change_with_the_box(served, posted):
    """And neither does an answer that the caller keeps."""
    kept, want = served.both("infer", forward(LARGE, keep=True))
    for seed in range(2 * NUM_BOXES):
        served.both("infer", forward(LARGE, seed=1 + seed))
    assert set(posted) == {NUM_BOXES - 1}  # the box that was used last
    assert torch.equal(kept, want)
    pairs = served.both("backward", Backward("m:1", LAYER, 1, 0, time.time() + 60, torch.ones(LARGE, DIM)))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_more_requests_than_boxes_and_answers_nobody_takes(served, posted):
    connection = served.connect()
    calls = [forward(LARGE, seed=i) for i in range(NUM_BOXES + 3)]
    with served.server.combiner.inference.lock:  # none is answered while they are sent
        numbers = [connection.send(call) for call in calls]
    connection.forget(numbers[0])
    for number, call in reversed(list(zip(numbers, calls, strict=True))[1:]):
        got = connection.take(number, time.time() + 60)
        assert torch.equal(got, served.oracle.send("shard-0", "infer", call).result())
    assert sorted(posted) == sorted(2 * list(range(NUM_BOXES)))
    assert sorted(connection.wire.buffer.free) == list(range(NUM_BOXES))


def test_rows_that_fit_in_no_box_go_over_the_socket(served, posted, monkeypatch):
    monkeypatch.setattr(shm, "BOX_BYTES", LARGE * DIM * 4)
    for num_rows, times in ((LARGE, 2), (LARGE + 1, 0)):
        posted.clear()
        got, want = served.both("infer", forward(num_rows))
        assert torch.equal(got, want)
        assert len(posted) == times


def test_an_error_comes_back_instead_of_rows(served):
    for _ in range(NUM_BOXES + 1):
        with pytest.raises(InputGone):
            served.transport.send(
                "shard-0", "backward", Backward("no:1", LAYER, 1, 0, time.time() + 9, torch.ones(LARGE, DIM))
            ).result()
    served.is_well()


def test_a_connection_made_while_inferring_is_good_for_training(served, posted):
    with torch.inference_mode():
        served.both("infer", forward(LARGE))
    got, want = served.both("infer", forward(LARGE, keep=True))
    assert torch.equal(got, want)
    assert len(posted) == 4
    assert not got.is_inference()


# -- who has one


def test_over_tcp_there_is_none(served, posted, monkeypatch):
    monkeypatch.setattr("actors.dataplane.client.machine_id", lambda: "elsewhere")
    got, want = served.both("infer", forward(LARGE))
    assert torch.equal(got, want)
    (connection,) = served.transport._connections.values()
    assert (connection.ways, posted) == (("TCP", "TCP"), [])


@pytest.mark.parametrize("side", [1, 2], ids=["caller", "shard"])
def test_without_the_means_rows_go_over_the_socket(served, posted, monkeypatch, side):
    attach, calls = HostSharedBuffer.attach, []

    def refuse(fd, device):
        calls.append(fd)
        if len(calls) == side:
            raise OSError("no memory left for maps")
        return attach(fd, device)

    monkeypatch.setattr(HostSharedBuffer, "attach", refuse)
    got, want = served.both("infer", forward(LARGE))
    assert torch.equal(got, want)
    (connection,) = served.transport._connections.values()
    assert (connection.ways, posted, num_mapped()) == (("a Unix socket", "a Unix socket"), [], 0)


def test_who_offers_what():
    gpu = torch.device("cuda", 1)
    assert shm.possible(False, gpu, "cuda") == []
    assert shm.possible(True, gpu, "cuda") == [CudaSharedBuffer, HostSharedBuffer]
    for mine, theirs in ((CPU, "cpu"), (CPU, "cuda"), (gpu, "cpu")):
        assert shm.possible(True, mine, theirs) == [HostSharedBuffer]


def test_both_sides_close_what_they_have(served, monkeypatch):
    """A GPU's memory is let go of by nobody else."""
    closed, close = [], HostSharedBuffer.close
    monkeypatch.setattr(HostSharedBuffer, "close", lambda self: (closed.append(self), close(self)))
    served.both("infer", forward(LARGE))
    served.transport.close()
    assert eventually(lambda: len(set(closed)) == 2)


def test_nothing_is_left_of_closed_connections(served):
    served.both("infer", forward(LARGE))
    served.transport.close()
    assert eventually(lambda: num_mapped() == 0)
    before = num_descriptors()
    for _ in range(20):
        served.both("infer", forward(LARGE))
        assert num_mapped() == 2
        assert num_descriptors() <= before + 2  # a socket's two ends
        served.transport.close()
        assert eventually(lambda: num_mapped() == 0)
    assert eventually(lambda: num_descriptors() <= before)


# -- hostile peers


def refusal(connection):
    with pytest.raises(BadFrame) as caught:
        connection._read(time.time() + 60)
    with contextlib.suppress(ConnectionResetError):
        assert connection.wire.sock.recv(1) == b""
    connection.wire.close()
    return str(caught.value)


@pytest.mark.parametrize(
    ("box", "num_rows", "message"),
    [(NUM_BOXES, 1, "64 bytes in box 4"), (255, 0, "in box 255"), (0, BOX_BYTES // 64 + 1, "16777280 bytes in box 0")],
)
def test_a_place_that_is_not_in_the_shared_buffer(served, box, num_rows, message):
    connection = served.connect()
    head = Header.unpack(request(1, forward(1))[0])._replace(num_rows=num_rows)
    connection.wire.sock.sendall(in_shared_buffer(frames.HEADER.pack(*head), box))
    with pytest.raises(BadFrame, match=message):
        raise BadFrame(refusal(connection))
    served.is_well()


def test_a_box_where_there_is_no_shared_buffer(served, monkeypatch):
    monkeypatch.setattr("actors.dataplane.client.possible", lambda *_: [])
    connection = served.connect()
    connection.wire.sock.sendall(in_shared_buffer(request(1, forward(1))[0], 0))
    assert "a shared buffer that it does not have" in refusal(connection)


def test_an_answer_that_names_no_box(served):
    connection, (here, there) = served.connect(), socket.socketpair()
    connection.wire.sock = here
    for head in (frames.answer(1, torch.zeros(1, DIM))[0], frames.answer(1, InputGone("x"))[0]):
        there.sendall(in_shared_buffer(head, 9))
        with pytest.raises(BadFrame, match="box 9"):
            connection._read(time.time() + 60)
    there.close()


def memory(size=SIZE, seals=True):
    fd = HostSharedBuffer.make(CPU) if seals and size == SIZE else os.memfd_create("other", os.MFD_ALLOW_SEALING)
    if os.fstat(fd).st_size != size:
        os.ftruncate(fd, size)
    return fd


def regular_file():
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        return os.dup(file.fileno())


WRONG = {
    "short": lambda: memory(SIZE - 4096),
    "long": lambda: memory(SIZE + 4096),
    "not sealed": lambda: memory(seals=False),
    "a file": regular_file,
    "a pipe": lambda: os.pipe()[0],
}


@pytest.mark.parametrize("what", WRONG)
def test_a_descriptor_of_something_else(served, monkeypatch, what):
    monkeypatch.setattr("actors.dataplane.client.possible", lambda *_: [])
    connection, fd = served.connect(), WRONG[what]()
    connection.wire.send(offer(HostSharedBuffer.kind), [], time.time() + 60)
    socket.send_fds(connection.wire.sock, [b"\0"], [fd])
    os.close(fd)
    assert "bytes of sealed memory" in refusal(connection)
    served.is_well()


def test_no_descriptor_and_many(served, monkeypatch):
    """The kernel, of many, hands over the first."""
    monkeypatch.setattr("actors.dataplane.client.possible", lambda *_: [])
    before = num_descriptors()
    connection = served.connect()
    connection.wire.sock.sendall(offer(HostSharedBuffer.kind) + b"\0")
    assert "without its descriptor" in refusal(connection)
    connection, fds = served.connect(), [memory() for _ in range(20)]
    connection.wire.send(offer(HostSharedBuffer.kind), [], time.time() + 60)
    socket.send_fds(connection.wire.sock, [b"\0"], fds)
    assert connection.wire.header(time.time() + 60) == Header.unpack(offer(HostSharedBuffer.kind))
    for fd in fds:
        os.close(fd)
    connection.wire.close()
    assert eventually(lambda: num_descriptors() <= before)


@pytest.mark.parametrize("kind", [0, HostSharedBuffer.kind, CudaSharedBuffer.kind, 2**63])
def test_an_offer_that_nobody_wants(served, kind):
    connection = served.connect()  # which has one already
    connection.wire.sock.sendall(offer(kind) + b"\0")
    assert f"no shared buffer of kind {kind} is wanted" in refusal(connection)


def test_descriptors_with_other_frames_are_not_kept(served):
    connection, before = served.connect(), num_descriptors()
    head, tensors = request(1, forward(5))
    socket.send_fds(connection.wire.sock, [head], [0] * 50)
    connection.wire.send(b"", tensors, time.time() + 60)
    connection._expected.add(1)
    assert connection.take(1, time.time() + 60).shape == (5, DIM)
    assert num_descriptors() == before


# -- killed peers


class Child:
    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def hear(self):
        return json.loads(self.process.stdout.readline())

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def test_a_caller_that_is_killed_leaves_nothing_with_the_shard(served):
    assert num_mapped() == 0
    with served.server.combiner.inference.lock:
        child = Child("caller", json.dumps(asdict(served.server.address)))
        assert child.hear() == "sent"
        assert num_mapped() == 1
        child.kill()
    assert eventually(lambda: num_mapped() == 0)
    served.is_well()


def test_a_shard_that_is_killed_leaves_nothing_with_the_caller():
    child = Child("shard")
    address = Address(**child.hear())
    transport, call = DirectTransport(None, lambda shard, deadline_s: address, SECRET), forward(LARGE)
    got = transport.send("shard-0", "infer", call).result()
    assert torch.equal(got, shard_of().infer(call))
    child.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.process.pid, os.WSTOPPED | os.WNOWAIT)  # until every thread of it stands
    replies = [transport.send("shard-0", "infer", call) for _ in range(NUM_BOXES)]
    child.kill()
    for reply in replies:
        with pytest.raises(Unavailable):
            reply.result()
    assert num_mapped() == 0
    assert torch.equal(got, shard_of().infer(call))


def child_shard():
    server = serve(shard_of())
    print(json.dumps(asdict(server.address)), flush=True)
    sys.stdin.read()


def child_caller(address):
    connection = Connection(Address(**json.loads(address)), SECRET, time.time() + 60)
    for i in range(NUM_BOXES):
        connection.send(forward(LARGE, seed=i))
    print(json.dumps("sent"), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    HostSharedBuffer.min_bytes = LARGE * DIM * 4
    {"shard": child_shard, "caller": child_caller}[sys.argv[1]](*sys.argv[2:])
