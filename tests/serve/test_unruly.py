"""The soak in small (tests/chaos/soak.py): after each unruly client the server answers as before, and holds nothing of it."""

import asyncio
import random

import httpx
import pytest
from fake import FakeEngine

from serving.bodies import NUM_WORKERS, read
from tests.chaos import unruly
from tests.chaos.idle import streams
from tests.chaos.soak import Traffic
from tests.chaos.unruly import BROKEN, UNRULY, Target
from tests.unit.fuzzed_port import num_descriptors
from tests.waiting import WAIT_S, eventually

BODY = {"prompt": "the lazy dog", "max_tokens": 4}


@pytest.fixture
async def target(start, monkeypatch):
    monkeypatch.setattr(unruly, "STAY_S", 0.05)
    for _ in range(NUM_WORKERS):  # the processes that read large bodies stay
        read("TokenizeRequest", b"{}", 1)
    async with start(FakeEngine(delay_s=0.001)) as server:
        yield server, Target(server.url, server.grpc_address)


@pytest.mark.parametrize("client", UNRULY)
async def test_an_unruly_client_leaves_nothing(target, client):
    server, where = target
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        want = (await http.post("/v1/completions", json=BODY)).json()["choices"]
        before = num_descriptors()
        for seed in range(3):
            try:
                await client(where, random.Random(seed))
            except BROKEN:
                continue
        assert (await http.post("/v1/completions", json=BODY)).json()["choices"] == want
        await eventually(lambda: not server.front.admission.active and not server.engine.held)
        await eventually(lambda: num_descriptors() <= before)


async def test_mixed_traffic_is_counted_and_right(target):
    _, where = target
    traffic = Traffic(where, random.Random(0))
    await traffic.run(1.0, rate=40, unruly_rate=10)
    assert traffic.num_answers > 10
    assert traffic.unruly.total() > 2
    assert not +traffic.failures


async def test_streams_that_get_nothing_are_open_until_their_clients_leave(start):
    """The idle streams in small (tests/chaos/idle.py)."""
    async with start(FakeEngine(delay_s=3600)) as server:
        opened = streams(Target(server.url, server.grpc_address), num=20, of_grpc=0.5)
        await asyncio.to_thread(opened.__enter__)
        await eventually(lambda: server.front.admission.active == len(server.engine.held) == 20)
        await asyncio.to_thread(opened.__exit__, None, None, None)
        await eventually(lambda: not server.front.admission.active and not server.engine.held)
