"""What worker 0 finds out reaches every worker as it is, and what fails there is tried again by all."""

import math
import queue
import struct
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trinity.errors import ConfigError, InputGone, StepConflict, Unavailable
from trinity.train.collectives import NOTE_BYTES, Alone, on_rank0, said_by_rank0
from trinity.train.retry import RETRY_REASONS, RetryStep, WorkerFailed, reason_of


class Together:
    """Comms of workers that are threads; notes which collective each of them was in."""

    def __init__(self, world):
        self.world, self.calls = world, [[] for _ in range(world)]
        self._inboxes = [queue.Queue() for _ in range(world)]

    def comm(self, rank):
        found = Alone()
        found.rank, found.world = rank, self.world
        found.from_first = lambda tensor: self._from_first(rank, tensor)
        return found

    def _from_first(self, rank, tensor):
        self.calls[rank].append((tensor.dtype, tuple(tensor.shape)))
        if rank == 0:
            for inbox in self._inboxes[1:]:
                inbox.put(tensor.clone())
            return tensor
        received = self._inboxes[rank].get(timeout=10)
        assert (received.dtype, received.shape) == (tensor.dtype, tensor.shape), "one collective for all"
        return received

    def run(self, work):
        """-> what `work(comm)` returned or raised on each worker."""
        outcomes = [None] * self.world

        def worker(rank):
            try:
                outcomes[rank] = work(self.comm(rank))
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        assert all(calls == self.calls[0] for calls in self.calls[1:]), "the same collectives in the same order"
        return outcomes


def bits(value):
    return struct.pack("d", value)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -0.0, 0.1, 1e-310, 2**53 + 1.0, 1.7976931348623157e308]
)
def test_numbers_keep_their_bits_on_every_worker(value):
    for said in Together(3).run(lambda comm: on_rank0(comm, lambda: (value, True))):
        assert said[1] is True
        assert bits(said[0]) == bits(value) or (math.isnan(value) and math.isnan(said[0]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=NOTE_BYTES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(JSON)
def test_any_plain_value_arrives_in_one_broadcast_or_two(value):
    together = Together(2)
    assert together.run(lambda comm: said_by_rank0(comm, value if comm.rank == 0 else None)) == [value, value]
    assert len(together.calls[0]) <= 2


def test_what_is_short_takes_one_broadcast():
    together = Together(2)
    together.run(lambda comm: on_rank0(comm, lambda: [3, 1_764_360_000_123_456, [4, 5]]))
    assert together.calls[1] == [(torch.uint8, (NOTE_BYTES,))]


@pytest.mark.parametrize("kind", RETRY_REASONS)
def test_what_may_succeed_later_is_a_retry_everywhere_with_its_reason(kind):
    error = kind("the shard is away; " + "long story " * 100)

    def fail():
        raise error

    first, *others = Together(3).run(lambda comm: on_rank0(comm, fail))
    for each in (first, *others):
        assert isinstance(each, RetryStep)
        assert (each.reason, each.why) == (RETRY_REASONS[kind], error.message)
    assert first.__cause__ is error
    assert all(each.__cause__ is None for each in others)


def test_reasons_are_short_labels_and_a_subclass_has_its_own():
    assert len(set(RETRY_REASONS.values())) == len(RETRY_REASONS)
    assert all(reason.isascii() and len(reason) <= 16 for reason in RETRY_REASONS.values())
    assert reason_of(WorkerFailed("x")) == "worker_failed"
    assert reason_of(Unavailable("x")) == "unavailable"
    assert reason_of(InputGone("x")) == "input_gone"


def test_only_worker_0_does_it_and_the_others_learn_the_result():
    done = []
    said = Together(3).run(lambda comm: on_rank0(comm, lambda: done.append(comm.rank) or "done"))
    assert (said, done) == (["done"] * 3, [0])


def test_other_errors_are_raised_where_they_are():
    for error in (ConfigError("wrong"), ZeroDivisionError()):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)):
            on_rank0(Alone(), fail)
    with pytest.raises(TypeError):
        on_rank0(Alone(), lambda: torch.zeros(1))
    with pytest.raises(RetryStep) as retried:
        on_rank0(Alone(), lambda: (_ for _ in ()).throw(StepConflict("void")))
    assert retried.value.reason == "step_conflict"
