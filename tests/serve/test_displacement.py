"""Urgent requests in a full server: they take the place of less urgent ones that have not begun to answer, and of no others."""

import asyncio
import random

import grpc
import pytest
from fake import HeldEngine
from test_clients import BODY, CLIENTS, KEYS, headers, http_of

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from serving.limits import CLAIM, Admission, over
from tests.waiting import eventually
from trinity.config import Client, ServeConfig
from trinity.errors import Overloaded

LATER, SOONER = {"priority": 5}, {"priority": -5}


@pytest.fixture
async def full(start):
    """Eight slots and no answers: four of one request of priority 9, four of requests of priority 5."""
    async with start(HeldEngine(), max_concurrent_requests=8) as server, http_of(server) as http:
        calls = [asyncio.create_task(http.post("/v1/completions", json={**BODY, **LATER})) for _ in range(4)]
        await eventually(lambda: server.front.admission.active == 4)
        pairs = [{**BODY, "n": 2, "priority": 9}, {**BODY, "n": 2, "priority": 8}]
        calls += [asyncio.create_task(http.post("/v1/completions", json=body)) for body in pairs]
        await eventually(lambda: len(server.engine.held) == 8)
        yield server, http, calls


async def over_grpc(server, num, **fields):
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        asked = pb.GenerateRequest(text="the lazy dog", sampling=pb.SamplingParams(max_tokens=2), n=num, **fields)
        return [answer async for answer in rpc.InferenceStub(channel).Generate(asked)]


async def test_the_least_urgent_request_gives_way_with_all_its_sequences(full):
    server, http, calls = full
    urgent = asyncio.create_task(http.post("/v1/completions", json={**BODY, **SOONER}))
    answer = await calls[4]
    assert (answer.status_code, "retry-after" in answer.headers) == (429, True)
    assert "a more urgent request has its place" in answer.json()["error"]["message"]
    assert not any(call.done() for call in (*calls[:4], calls[5], urgent))
    await eventually(lambda: len(server.engine.held) == server.front.admission.active == 7)
    urgent_too = asyncio.create_task(over_grpc(server, 2, priority=-5))
    assert (await calls[5]).status_code == 429
    server.engine.go.set()
    assert {each.status_code for each in await asyncio.gather(*calls[:4], urgent)} == {200}
    assert sum(each.HasField("final") for each in await urgent_too) == 2
    assert "trinity_displaced_total 2.0" in (await http.get("/metrics")).text


async def test_of_equal_ones_the_latest_gives_way_over_grpc_too(start):
    async with start(HeldEngine(), max_concurrent_requests=8) as server, http_of(server) as http:
        waiting = []
        for _ in range(8):
            waiting.append(asyncio.create_task(over_grpc(server, 1, priority=3)))
            await eventually(lambda: len(server.engine.held) == len(waiting))
        urgent = asyncio.create_task(http.post("/v1/completions", json={**BODY, "n": 2}))
        for last in waiting[6:]:
            with pytest.raises(grpc.aio.AioRpcError) as lost:
                await last
            assert lost.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "grpc-retry-pushback-ms" in dict(lost.value.trailing_metadata())
        server.engine.go.set()
        assert (await urgent).status_code == 200
        assert len(await asyncio.gather(*waiting[:6])) == 6


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"stream": True}, {"n": 2, "stream": True}])
async def test_what_has_begun_to_answer_stays_and_urgent_ones_come_in_beside_it(start, more):
    """Engines have what has begun give way, so there is a quarter more room for those that are more urgent; and no more."""
    async with start(HeldEngine(num_free=1), max_concurrent_requests=8) as server, http_of(server) as http:
        body = {**BODY, **LATER, **more}
        calls = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(8 // more.get("n", 1))]
        await eventually(lambda: server.front.admission.active == 8)
        await eventually(lambda: all(claim.has_begun for claim in server.front.admission._claims))
        urgent = asyncio.create_task(http.post("/v1/completions", json={**BODY, **SOONER, "n": 2}))
        await eventually(lambda: server.front.admission.active == 10)
        await eventually(lambda: all(claim.has_begun for claim in server.front.admission._claims))
        for priority in (-6, -5, 5, 9):
            answer = await http.post("/v1/completions", json={**BODY, "priority": priority})
            assert answer.status_code == 429
            assert "10 requests are running" in answer.json()["error"]["message"]
        server.engine.go.set()
        answers = await asyncio.gather(*calls)
        assert {each.status_code for each in (*answers, await urgent)} == {200}
        assert all(("[DONE]" in each.text) == ("stream" in more) and "error" not in each.text for each in answers)


async def test_a_client_is_over_its_share_beside_its_own_less_urgent_ones_alone(start):
    async with (
        start(HeldEngine(num_free=1), clients=CLIENTS, max_concurrent_requests=8, **KEYS) as server,
        http_of(server) as http,
    ):

        def ask(key, priority):
            body = {**BODY, "priority": priority}
            return asyncio.create_task(http.post("/v1/completions", json=body, headers=headers(key)))

        calls = [ask("key-of-bob", 0), ask("key-of-bob", 0), *(ask("key-of-ann", 7) for _ in range(4))]
        await eventually(lambda: sum(claim.has_begun for claim in server.front.admission._claims) == 6)
        assert (await ask("key-of-bob", 0)).status_code == 429, "two slots are free, and none of bob's"
        calls.append(ask("key-of-ann", 0))
        await eventually(lambda: server.front.admission.held["ann"] == 5)
        assert (await ask("key-of-ann", 0)).status_code == 429
        server.engine.go.set()
        assert {each.status_code for each in await asyncio.gather(*calls)} == {200}


async def test_equals_take_nobodys_place(full):
    server, http, calls = full
    for more in ({"priority": 9}, {"priority": 9, "n": 2}):
        assert (await http.post("/v1/completions", json={**BODY, **more})).status_code == 429
    with pytest.raises(grpc.aio.AioRpcError):
        await over_grpc(server, 1, priority=9)
    assert not any(call.done() for call in calls)
    server.engine.go.set()
    assert {each.status_code for each in await asyncio.gather(*calls)} == {200}


async def test_a_client_whose_share_is_used_up_displaces_its_own(start):
    async with (
        start(HeldEngine(), clients=CLIENTS, max_concurrent_requests=8, **KEYS) as server,
        http_of(server) as http,
    ):

        def ask(key, priority):
            return asyncio.create_task(
                http.post("/v1/completions", json={**BODY, "priority": priority}, headers=headers(key))
            )

        others = [ask(key, 50) for key in ("key-of-bob", "key-of-bob", "key-of-all", "key-of-all")]
        own = [ask("key-of-ann", priority) for priority in (1, 2, 3, 3)]
        await eventually(lambda: len(server.engine.held) == 8)
        urgent = ask("key-of-ann", 0)
        await eventually(lambda: sum(call.done() for call in own) == 1)
        [gone] = [call for call in own[2:] if call.done()]
        assert gone.result().status_code == 429
        assert (await ask("key-of-ann", 9)).status_code == 429
        admins = ask("key-of-admin", 0)  # all slots are taken, so anybody's latest goes
        await eventually(lambda: sum(call.done() for call in others) == 1)
        server.engine.go.set()
        left = [call for call in (*others, *own) if not call.done()]
        assert {each.status_code for each in await asyncio.gather(*left, urgent, admins)} == {200}
        await eventually(lambda: not server.front.admission.active)


async def test_displaced_streams_have_the_status_of_an_error(full):
    server, http, calls = full
    server.engine.go.set()
    await asyncio.gather(*calls)
    server.engine.go.clear()
    bodies = [{**BODY, **LATER, "stream": True}] * 8
    calls = [asyncio.create_task(http.post("/v1/completions", json=body)) for body in bodies]
    await eventually(lambda: len(server.engine.held) == 8)
    urgent = asyncio.create_task(http.post("/v1/completions", json={**BODY, "stream": True}))
    await eventually(lambda: any(call.done() for call in calls))
    [gone] = [call.result() for call in calls if call.done()]
    assert (gone.status_code, gone.headers["content-type"]) == (429, "application/json")
    server.engine.go.set()
    answers = await asyncio.gather(*(call for call in calls if not call.done()), urgent)
    assert {each.status_code for each in answers} == {200}


class Model:
    """Requests that come and go in any order, each sequence of them as Frontend.generate holds it."""

    def __init__(self, seed):
        self.drawn = random.Random(seed)
        self.admission = Admission(ServeConfig(max_concurrent_requests=16, clients=CLIENTS, api_key="key-of-all"))
        self.clients = [*ServeConfig(clients=CLIENTS, api_key="key-of-all").client_by_key.values()]
        self.open = []  # (slot, its context manager)

    def come(self):
        client, num, priority = self.drawn.choice(self.clients), self.drawn.randint(1, 3), self.drawn.randint(0, 3)
        self.admission.check(num, client)
        before = {slot.claim: slot.claim.error for slot, _ in self.open}
        try:
            for _ in range(self.drawn.randint(1, num)):  # the rest may never begin
                self.open.append(self.enter(client, priority))
        except Overloaded:
            assert before == {slot.claim: slot.claim.error for slot, _ in self.open}, "all, or nobody is displaced"
            return
        displaced = [claim for claim in before if claim.error is not None and before[claim] is None]
        if self.admission.active > self.admission.limit or self.admission.held[client.name] > self.admission.most(
            client
        ):
            assert any(claim.priority > priority and claim.has_begun for claim in self.admission._claims)
        assert all(claim.priority > priority and not claim.has_begun for claim in displaced)
        left = [slot.claim for slot, _ in self.open if not slot.claim.error and not slot.claim.has_begun]
        if displaced and all(claim.client != client.name for claim in displaced):
            assert max((claim.priority for claim in left), default=0) <= max(claim.priority for claim in displaced)

    def enter(self, client, priority):
        entered = self.admission.slot(client, priority)
        return entered.__enter__(), entered

    def begin(self):
        if waiting := [slot for slot, _ in self.open if slot.claim.error is None]:
            self.drawn.choice(waiting).claim.has_begun = True

    def go(self):
        if self.open:
            _, entered = self.open.pop(self.drawn.randrange(len(self.open)))
            entered.__exit__(None, None, None)

    def check(self):
        held = sum(1 for slot, _ in self.open if slot.claim.error is None)
        assert held <= self.admission.active <= self.admission.limit + over(self.admission.limit)
        for client in self.clients:
            most = self.admission.most(client)
            assert self.admission.held[client.name] <= most + over(most)


@pytest.mark.parametrize("seed", range(20))
async def test_any_order_of_comings_and_goings_keeps_the_limits_and_ends_at_nothing(seed):
    model = Model(seed)
    for _ in range(400):
        model.drawn.choice([model.come, model.come, model.begin, model.go])()
        model.check()
    while model.open:
        model.go()
    assert not model.admission.active
    assert not model.admission._claims
    assert await model.admission.drain(0.1)
    CLAIM.set(None)


@pytest.mark.parametrize(("num_gateways", "share"), [(1, 12), (3, 4), (5, 2), (99, 1)])
def test_gateways_divide_the_slots(num_gateways, share):
    admission = Admission(ServeConfig(max_concurrent_requests=12))
    admission.num_gateways = num_gateways
    assert admission.limit == share
    assert num_gateways * share <= 12 or share == 1
    held = [admission.slot(Client("anybody")) for _ in range(share)]
    for each in held:
        each.__enter__()
    words = f"{share} requests are running.*" + (f"one of {num_gateways} gateways" if num_gateways > 1 else "")
    with pytest.raises(Overloaded, match=words):
        admission.slot(Client("anybody")).__enter__()
    for each in held:
        each.__exit__(None, None, None)
