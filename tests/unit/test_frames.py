"""Frames of the direct transport: what is packed is what arrives, and what cannot be one is refused."""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.dataplane import frames, ray_transport
from actors.dataplane.frames import HEADER, BadFrame, Header, answer, call_of, request, value_of
from tests.unit.test_direct import LAYER, LIMITS, forward, rows_of
from trinity.errors import InputGone
from trinity.rpc import messages
from trinity.rpc.messages import Backward, Fetch, Load


def clock_at(now_s, module=frames):
    return mock.patch.object(module, "time", SimpleNamespace(monotonic=lambda: now_s))


@given(st.integers(0, 7), st.integers(0, 4), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_frames_round_trip(num_rows, seed, keep, dtype):
    limits = replace(LIMITS, dtype=dtype)
    call = replace(forward("abc:12", deadline_s=12.5, keep=keep), rows=rows_of(num_rows, seed, dtype))
    for sent in (
        call,
        Backward("b:1", 3, 9, 7, 2.5, call.rows.x_RD),
        Backward("b:1", 3, 9, 7, 2.5, call.rows.x_RD, call.rows),
    ):
        with clock_at(2.0):
            header, tensors = request(4, sent)
        head = Header.unpack(header)
        head.check(limits)
        assert head.payload_bytes == sum(t.nbytes for t in tensors)
        got = call_of(head, tensors, limits, 1002.0)  # by another host's clock
        assert flat(got) == flat(replace(sent, deadline_s=sent.deadline_s + 1000))
    for value in (call.rows.x_RD, (call.rows.x_RD, call.rows.weights_RK), InputGone("gone")):
        header, tensors = answer(9, value)
        got = value_of(Header.unpack(header), tensors)
        assert flat(got) == flat(value)


def flat(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, tuple):
        return [flat(v) for v in value]
    if isinstance(value, Exception):
        return type(value), str(value)
    return {k: flat(v) for k, v in vars(value).items()} if hasattr(value, "__dict__") else value


@pytest.mark.parametrize("giant", ["num_rows", "dim", "num_slots"])
def test_giant_frames_are_refused_before_they_are_allocated(giant):
    head = Header.unpack(request(1, forward())[0])
    with pytest.raises(BadFrame, match="over the limit"):
        Header.unpack(HEADER.pack(*head._replace(**{giant: 2**31})))


def test_time_that_is_left_travels_through_ray():
    for sent in (forward(deadline_s=12.5), Fetch(LAYER, 0, 1, 12.5), 5, Load("somewhere")):
        with clock_at(2.0, messages):
            packed = ray_transport.pack(messages.departing(sent))
        with clock_at(1002.0, messages):
            got = messages.arrived(ray_transport.unpack(packed))
        assert getattr(got, "deadline_s", 1012.5) == 1012.5
        assert type(got) is type(sent)
