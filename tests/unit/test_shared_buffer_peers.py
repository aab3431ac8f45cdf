"""Shared buffers and peers that are hostile or killed: refused by name, and nothing is left with those who stay."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from actors.dataplane import frames
from actors.dataplane.client import DirectTransport
from actors.dataplane.connection import CPU, Address
from actors.dataplane.frames import BadFrame, Header, in_shared_buffer, offer, request
from actors.dataplane.shm import BOX_BYTES, NUM_BOXES, SIZE, CudaSharedBuffer, HostSharedBuffer
from tests.unit import shared_buffers
from tests.unit.shared_buffers import (
    DIM,
    LARGE,
    SECRET,
    Served,
    begin_test,
    eventually,
    forward,
    num_descriptors,
    num_mapped,
    shard_of,
)
from trinity.errors import InputGone, Unavailable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _begun(monkeypatch):
    begin_test(monkeypatch)


@pytest.fixture
def served():
    made = Served()
    yield made
    made.close()


# -- hostile peers


def refusal(connection):
    with pytest.raises(BadFrame) as caught:
        connection._read(time.monotonic() + 60)
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
            connection._read(time.monotonic() + 60)
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
    connection.wire.send(offer(HostSharedBuffer.kind), [], time.monotonic() + 60)
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
    connection.wire.send(offer(HostSharedBuffer.kind), [], time.monotonic() + 60)
    socket.send_fds(connection.wire.sock, [b"\0"], fds)
    assert connection.wire.header(time.monotonic() + 60) == Header.unpack(offer(HostSharedBuffer.kind))
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
    connection.wire.send(b"", tensors, time.monotonic() + 60)
    connection._expected.add(1)
    assert connection.take(1, time.monotonic() + 60).shape == (5, DIM)
    assert num_descriptors() <= before  # of others some may be closed meanwhile


# -- killed peers


class Child:
    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, shared_buffers.__file__, *arguments],
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
