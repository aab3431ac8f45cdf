"""Rows through shared buffers: the same bits, whoever is slow or declines; and nothing is left of it. Peers that are hostile or
killed are in test_shared_buffer_peers.py.
"""

import sys
import time
from dataclasses import replace

import pytest
import torch

from actors.dataplane import shm
from actors.dataplane.connection import CPU
from actors.dataplane.shm import NUM_BOXES, CudaSharedBuffer, HostSharedBuffer
from tests.unit.shared_buffers import (
    DIM,
    LARGE,
    LAYER,
    Served,
    begin_test,
    eventually,
    forward,
    num_descriptors,
    num_mapped,
)
from trinity.errors import InputGone
from trinity.rpc.messages import Backward

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd")
THRESHOLD = HostSharedBuffer.min_bytes


@pytest.fixture(autouse=True)
def _begun(monkeypatch):
    begin_test(monkeypatch)


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
    pairs = served.both("backward", Backward("m:1", LAYER, 1, 0, time.monotonic() + 60, torch.ones(LARGE, DIM)))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_more_requests_than_boxes_and_answers_nobody_takes(served, posted):
    connection = served.connect()
    calls = [forward(LARGE, seed=i) for i in range(NUM_BOXES + 3)]
    with served.server.combiner.inference.lock:  # none is answered while they are sent
        numbers = [connection.send(call) for call in calls]
    connection.forget(numbers[0])
    for number, call in reversed(list(zip(numbers, calls, strict=True))[1:]):
        got = connection.take(number, time.monotonic() + 60)
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
                "shard-0", "backward", Backward("no:1", LAYER, 1, 0, time.monotonic() + 9, torch.ones(LARGE, DIM))
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
