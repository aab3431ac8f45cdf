"""trinity.v1 over a fake engine, with a plain grpcio client."""

import asyncio
import time
from collections import Counter
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest
from fake import FakeEngine, HeldEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from serving.errors import TABLE
from serving.http.logprobs import PART
from tests.sockets import on_the_way
from tests.waiting import WAIT_S, eventually, sooner_than, until
from trinity.errors import Code, Overloaded

SERVING = health_pb2.HealthCheckResponse


@asynccontextmanager
async def stubs(server):
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        yield rpc.InferenceStub(channel)


@pytest.fixture
async def stub(server):
    async with stubs(server) as found:
        yield found


def request(text="the lazy dog", **sampling):
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParams(**{"max_tokens": 6, **sampling}))


async def collect(call):
    return [response async for response in call]


async def rest(call):
    """What is left of a call whose first message was taken by `read`."""
    return [response async for response in iterate(call)]


async def iterate(call):
    while (response := await call.read()) is not grpc.aio.EOF:
        yield response


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    return caught.value


async def test_deltas_and_one_final(stub, server):
    *deltas, last = await collect(stub.Generate(request(logprobs=2)))
    ids = server.front.tokenizer.encode("the lazy dog", add_special=True)
    tokens = [i for response in deltas for i in response.delta.token_ids]
    assert tokens == [ids[i % len(ids)] for i in range(6)]
    text = "".join(response.delta.text for response in deltas)
    assert text == server.front.tokenizer.decode(tokens, skip_special=True)
    assert [response.delta.version for response in deltas] == [7, 8, 9, 10, 11, 12]
    assert [len(position.top) for r in deltas for position in r.delta.logprobs] == [2] * 6
    final = last.final
    assert (final.finish_reason, final.WhichOneof("stop_reason")) == (pb.FINISH_REASON_LENGTH, None)
    assert (final.usage.prompt_tokens, final.usage.completion_tokens) == (len(ids), 6)
    assert (final.first_version, final.version) == (7, 12)


@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_scores_of_a_prompt_come_first_in_parts(start, max_tokens):
    prompt = [7 + i % 90 for i in range(PART + 9)]
    async with start(FakeEngine(max_model_len=256)) as server, stubs(server) as stub:
        asked = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(max_tokens=max_tokens))
        asked.sampling.prompt_logprobs = 3
        *deltas, last = [getattr(r, r.WhichOneof("event")) for r in await collect(stub.Generate(asked))]
    scores = [position for delta in deltas for position in delta.prompt_logprobs]
    assert [position.token_id for position in scores] == prompt[1:]
    assert [position.logprob for position in scores] == [-p / 2 for p in range(1, len(prompt))]
    assert {(position.rank, len(position.top)) for position in scores} == {(2, 3)}
    assert [bool(delta.prompt_logprobs) for delta in deltas] == [True, True, *[False] * max(1, max_tokens)]
    assert sum(len(delta.token_ids) for delta in deltas) == last.usage.completion_tokens == max_tokens


async def test_three_kinds_of_prompt(stub, server):
    ids = server.front.tokenizer.encode("fox", add_special=True)
    by_text = await collect(stub.Generate(request("fox")))
    by_ids = await collect(
        stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=request().sampling))
    )
    assert by_text == by_ids
    chat = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="fox")])
    *_, last = await collect(stub.Generate(pb.GenerateRequest(chat=chat)))
    assert last.final.usage.prompt_tokens + last.final.usage.completion_tokens == server.engine.max_model_len
    *_, last = await collect(stub.Generate(pb.GenerateRequest(text="fox")))
    assert last.final.usage.completion_tokens == 16


async def test_unset_fields_keep_their_defaults_and_zero_does_not(stub, server):
    await collect(stub.Generate(request()))
    await collect(
        stub.Generate(request(temperature=0, top_k=-1, seed=-5, stop=["x"], logit_bias={5: -3}, ignore_eos=True))
    )
    await collect(stub.Generate(request(version_policy=pb.VERSION_POLICY_PINNED)))
    first, second, third = server.engine.seen
    assert (first.version_policy, third.version_policy) == ("live", "pinned")
    assert (first.temperature, first.stop, first.logprobs) == (1.0, (), None)
    assert first.seed != third.seed, "the gateway draws one where none is given"
    assert (second.temperature, second.top_k, second.seed, second.stop) == (0.0, 0, -5, ("x",))
    assert (second.logit_bias, second.ignore_eos) == ({5: -3.0}, True)


async def test_models_tokenize_detokenize(stub, server):
    found = (await stub.ListModels(pb.ListModelsRequest())).models
    assert [(m.name, m.max_model_len, m.vocab_size) for m in found] == [
        ("fake", 128, server.front.tokenizer.vocab_size)
    ]
    ids = (await stub.Tokenize(pb.TokenizeRequest(text="quick 🦊"))).token_ids
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=ids[1:]))).text == "quick 🦊"


BAD = {
    "no prompt": pb.GenerateRequest(),
    "empty chat": pb.GenerateRequest(chat=pb.Chat()),
    "unknown role": pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role=99, content="x")])),
    "no role": pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(content="x")])),
    "no ids": pb.GenerateRequest(token_ids=pb.TokenIds()),
    "id beyond": pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**31])),
    "too long": pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 128)),
    "max_tokens -1": request(max_tokens=-1),
    "temperature nan": request(temperature=float("nan")),
    "temperature inf": request(temperature=float("inf")),
    "top_p 0": request(top_p=0),
    "logprobs 21": request(logprobs=21),
    "prompt_logprobs 21": request(prompt_logprobs=21),
    "prompt_logprobs -1": request(prompt_logprobs=-1),
    "stops": request(stop=["a"] * 17),
    "empty stop": request(stop=[""]),
    "bias": request(logit_bias={5: 1000}),
    "unknown policy": request(version_policy=9),
    "bias id": request(logit_bias={2**31: 1}),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_requests(stub, server, name):
    error = await refusal(stub.Generate(BAD[name]))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details()
    await collect(stub.Generate(request()))
    assert not server.engine.held


async def test_other_model_and_detokenize_beyond(stub):
    assert (await refusal(stub.Generate(pb.GenerateRequest(model="x", text="a")))).code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError, match="ids are 0 to"):
        await stub.Detokenize(pb.DetokenizeRequest(token_ids=[9999]))


async def test_message_size_is_bounded(start):
    async with start(max_body_bytes=2048) as server, stubs(server) as stub:
        error = await refusal(stub.Generate(request("x" * 4096)))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await collect(stub.Generate(request()))


async def test_deadlines(start):
    async with start(FakeEngine(delay_s=0.05), request_timeout_s=0.3) as server, stubs(server) as stub:
        error = await refusal(stub.Generate(request(max_tokens=100), timeout=0.15))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: not server.engine.held)
        error = await refusal(stub.Generate(request(max_tokens=100)))  # no deadline: the server's own
        assert (error.code(), "0.3 s" in error.details()) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
        assert (await refusal(stub.Generate(request(), timeout=0))).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: not server.engine.held and not server.front.admission.active)


async def test_cancelled_calls_free_everything(start):
    """Long before the answers would have ended by themselves: 100,000 tokens take hours."""
    async with start(FakeEngine(max_model_len=200_000, delay_s=0.1)) as server, stubs(server) as stub:
        calls = [stub.Generate(request(max_tokens=100_000)) for _ in range(200)]
        await asyncio.gather(*(call.read() for call in calls))
        assert len(server.engine.held) == 200
        for call in calls:
            call.cancel()
        await eventually(lambda: not server.engine.held and not server.front.admission.active)


async def test_a_thousand_streams_on_one_connection(start):
    async with start(FakeEngine(delay_s=0.2)) as server, stubs(server) as stub:
        found = await asyncio.gather(*(collect(stub.Generate(request(max_tokens=2))) for _ in range(1000)))
    assert all(responses[-1].WhichOneof("event") == "final" for responses in found)


@asynccontextmanager
async def waiting_calls(server, num):
    """So many calls that have come while the server's loop was blocked, as by a slow machine: none of them has begun."""
    with grpc.insecure_channel(server.grpc_address) as channel:
        await asyncio.to_thread(grpc.channel_ready_future(channel).result)
        check = health_pb2_grpc.HealthStub(channel).Check
        calls = [check.future(health_pb2.HealthCheckRequest()) for _ in range(num)]
        until(lambda: not on_the_way(server.gateway.grpc.port))
        yield calls


async def test_of_many_calls_that_wait_to_begin_grpc_ends_none(start):
    """By itself it ended 50 of these 1,500, as CANCELLED."""
    async with start(max_concurrent_requests=1500) as server, waiting_calls(server, 1500) as calls:
        codes = await asyncio.to_thread(lambda: Counter(call.code() for call in calls))
    assert codes[grpc.StatusCode.CANCELLED] == 0, codes


async def test_calls_wait_to_begin_as_long_as_a_request_may_last(start):
    """gRPC's own bound is 30 s, whatever that is. The server looks when it comes to a call."""
    async with start(request_timeout_s=0.5) as server, waiting_calls(server, 20) as calls:
        began_s = time.monotonic()
        until(lambda: time.monotonic() - began_s > 1.2)
        codes = await asyncio.to_thread(lambda: [call.code() for call in calls])
    assert codes.count(grpc.StatusCode.CANCELLED) >= 19, "one has been handed over"


async def test_overload_has_a_retry_time(start):
    engine = FakeEngine(fail_after=0, error=Overloaded("full", retry_after_s=2.5))
    async with start(engine) as server, stubs(server) as stub:
        error = await refusal(stub.Generate(request()))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "2500"


async def test_f14_the_engine_fails_in_the_middle(start):
    async with start(FakeEngine(fail_after=3)) as server, stubs(server) as stub:
        call = stub.Generate(request())
        error = await refusal(call)
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "a shard is gone")


async def test_unexpected_errors_are_opaque(start):
    async with start(FakeEngine(fail_after=0, error=RuntimeError("/secret/path"))) as server, stubs(server) as stub:
        error = await refusal(stub.Generate(request()))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    "name", ["trinity.v1.Inference/Generate", "trinity.v1.Inference/Tokenize", "grpc.health.v1.Health/Check"]
)
async def test_a_message_that_is_none_is_refused(server, name):
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=r"the message is no \S+Request") as refused:
            await channel.unary_unary(f"/{name}")(b"\xff" * 10)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def code_of_a_newcomer(stub):
    """Asked again where gRPC ends a call as CANCELLED that met it while it stops (its issue 41785)."""
    while (code := (await refusal(stub.Generate(request()))).code()) == grpc.StatusCode.CANCELLED:
        pass
    return code


async def test_calls_on_their_way_when_the_server_stops_hear_unavailable(start, monkeypatch):
    monkeypatch.setattr("serving.grpc.server.QUIET_S", 0.5)  # a busy machine brings them late
    async with start(drain_timeout_s=WAIT_S) as server, stubs(server) as stub:
        await collect(stub.Generate(request()))
        calls = [stub.Generate(request()) for _ in range(20)]
        stopping = asyncio.create_task(server.gateway.stop())
        codes = {await call.code() for call in calls}
        assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        await stopping


async def test_f16_draining_says_not_serving_first(start):
    channel_to, engine = grpc.aio.insecure_channel, HeldEngine(num_free=1)
    async with (
        start(engine, drain_timeout_s=WAIT_S) as server,
        stubs(server) as stub,
        channel_to(server.grpc_address) as other,
    ):
        asked = health_pb2.HealthCheckRequest(service="trinity.v1.Inference")
        watch = health_pb2_grpc.HealthStub(other).Watch(asked)
        while (await watch.read()).status != SERVING.SERVING:
            pass
        running = [stub.Generate(request(max_tokens=20)) for _ in range(50)]
        await asyncio.gather(*(call.read() for call in running))
        stopping = asyncio.create_task(server.gateway.stop())
        assert (await watch.read()).status == SERVING.NOT_SERVING
        assert len(server.engine.held) == 50
        assert await code_of_a_newcomer(stub) == grpc.StatusCode.UNAVAILABLE
        engine.go.set()
        ends = await asyncio.gather(*(rest(call) for call in running))
        assert all(responses[-1].WhichOneof("event") == "final" for responses in ends)
        watch.cancel()
        await stopping


async def test_balancers_hear_of_the_end_before_a_request_is_refused(start):
    async with (
        start(drain_delay_s=2, drain_timeout_s=100) as server,
        stubs(server) as stub,
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
        grpc.aio.insecure_channel(server.grpc_address) as other,
    ):
        watch = health_pb2_grpc.HealthStub(other).Watch(health_pb2.HealthCheckRequest())
        while (await watch.read()).status != SERVING.SERVING:
            pass
        stopping = asyncio.create_task(server.gateway.stop())
        assert (await watch.read()).status == SERVING.NOT_SERVING
        body = {"prompt": "the lazy dog", "max_tokens": 2}
        asked = http.get("/ready"), http.get("/-/healthz"), http.post("/v1/completions", json=body)
        *answers, events = await asyncio.gather(*asked, collect(stub.Generate(request())))
        assert [answer.status_code for answer in answers] == [503, 503, 200]
        assert events[-1].HasField("final")
        with sooner_than(60):
            await stopping  # whoever watches health does not hold it up


async def test_health_follows_the_engine(server, monkeypatch):
    monkeypatch.setattr("serving.frontend.SILENT_S", 0)
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        while (await watch.read()).status != SERVING.SERVING:
            pass
        server.engine.healthy = False
        assert (await watch.read()).status == SERVING.NOT_SERVING
        server.engine.healthy = True
        assert (await watch.read()).status == SERVING.SERVING
        watch.cancel()


def test_every_code_has_a_place_in_the_table():
    assert set(TABLE) == set(Code)
    assert all(400 <= mapping.http < 600 for mapping in TABLE.values())
