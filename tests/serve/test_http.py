"""The OpenAI API over a fake engine: shapes, clients, streaming, errors, disconnects, draining."""

import asyncio
import json

import httpx
import openai
import pytest
from fake import FakeEngine, HeldEngine

from serving.frontend import EngineInfo
from serving.metrics import Exporter
from tests.waiting import WAIT_S, eventually
from trinity.errors import Overloaded

BODY = {"model": "fake", "prompt": "the lazy dog", "max_tokens": 6}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "jumps over"}], "max_tokens": 6}


@pytest.fixture
async def client(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as found:
        yield found


def events(text):
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert found[-1] == "[DONE]"
    return [json.loads(event) for event in found[:-1]]


async def test_completion_with_the_openai_client(client, server):
    ids = server.front.tokenizer.encode("the lazy dog", add_special=True)
    answer = await client.completions.create(model="fake", prompt="the lazy dog", max_tokens=6, logprobs=2)
    expected = [ids[i % len(ids)] for i in range(6)]
    assert answer.choices[0].text == server.front.tokenizer.decode(expected, skip_special=True)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 6)
    assert len(answer.choices[0].logprobs.tokens) == 6
    assert answer.choices[0].logprobs.token_logprobs == [-0.5] * 6
    for name, top in zip(answer.choices[0].logprobs.tokens, answer.choices[0].logprobs.top_logprobs, strict=True):
        assert len(top) == 2 or (len(top) == 3 and top[name] == -0.5), "and the token itself"
    assert answer.system_fingerprint == "weights-12"
    assert answer.choices[0].weights_versions == {"first": 7, "last": 12}


async def test_streamed_text_is_the_whole_text(client):
    whole = await client.completions.create(**BODY)
    stream = await client.completions.create(**BODY, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == "length"
    assert [c.choices[0].weights_version for c in chunks[:-1]] == [7, 8, 9, 10, 11, 12]


async def test_chat_with_the_openai_client(client, server):
    whole = await client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    stream = await client.chat.completions.create(**CHAT, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert whole.choices[0].message.content == text
    content = whole.choices[0].logprobs.content
    assert bytes(content[0].bytes) == server.front.tokenizer.token_bytes[0]
    assert len(content[0].top_logprobs) == 3
    assert whole.choices[0].weights_versions == {"first": 7, "last": 12}
    assert [c.choices[0].weights_version for c in chunks[1:]] == [7, 8, 9, 10, 11, 12]


async def test_chat_defaults_to_the_rest_of_the_context(client, server):
    answer = await client.chat.completions.create(model="fake", messages=CHAT["messages"])
    assert answer.usage.total_tokens == server.engine.max_model_len


async def test_n_continuations_of_several_prompts_have_their_own_seeds(http, server):
    body = {"prompt": ["dog", "fox"], "n": 3, "seed": 5, "max_tokens": 2}
    answer = (await http.post("/v1/completions", json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [params.seed for params in server.engine.seen] == [5, 6, 7, 5, 6, 7]
    assert answer["choices"][0]["text"] == answer["choices"][2]["text"] != answer["choices"][3]["text"]
    assert answer["usage"]["completion_tokens"] == 12
    prompts = [server.front.tokenizer.encode(text, add_special=True) for text in body["prompt"]]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_first(http, stream):
    answer = await http.post("/v1/completions", json={**BODY, "echo": True, "stream": stream})
    choices = [event["choices"][0] for event in events(answer.text)] if stream else answer.json()["choices"]
    assert "".join(choice["text"] for choice in choices).startswith("the lazy dog")


async def test_every_sampling_field_reaches_the_engine(http, server):
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "presence_penalty": 0.1}
    fields |= {"frequency_penalty": 0.2, "repetition_penalty": 1.5, "ignore_eos": True}
    fields |= {"version_policy": "pinned"}
    more = {
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "logit_bias": {"4": -2},
        "logprobs": 1,
        "user": "me",
        "metadata": {},
    }
    assert (await http.post("/v1/completions", json={**BODY, **fields, **more})).status_code == 200
    params = server.engine.seen[-1]
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a", "b"), (5,), {4: -2.0})


async def test_tokenize_and_back(http):
    for prompt in ("", "quick", "emoji 🦊 and \0", "x" * 7000):
        ids = (await http.post("/tokenize", json={"prompt": prompt, "add_special_tokens": False})).json()["tokens"]
        assert (await http.post("/detokenize", json={"tokens": ids})).json() == {"prompt": prompt}


async def test_small_routes(http, server):
    assert (await http.get("/health")).json() == {"status": "alive"}
    assert (await http.get("/ready")).status_code == 200
    assert (await http.get("/v1/models")).json()["data"][0]["id"] == "fake"
    assert (await http.get("/v1/models/fake")).json()["max_model_len"] == 128
    assert (await http.get("/v1/models/other/one")).status_code == 404
    versions = (await http.get("/version")).json()
    assert versions["version"] == "0.1.0"
    assert versions["weights_version"] == 7, "known before the first request"
    await http.post("/v1/completions", json=BODY)
    text = (await http.get("/metrics")).text
    assert "trinity_generated_tokens_total 6.0" in text
    assert 'trinity_requests_total{code="200",route="/v1/completions"} 1.0' in text
    assert 'trinity_requests_total{code="404",route="/v1/models/{name:path}"} 1.0' in text


@pytest.mark.parametrize("path", ["/health", "/ready", "/-/healthz", "/v1/models", "/metrics"])
async def test_head_is_get_without_its_body(http, path):
    whole, head = await http.get(path), await http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


async def test_what_clients_read_of_a_model(server, http, client):
    [model] = (await client.models.list()).data
    assert (model.id, model.object, model.owned_by) == ("fake", "model", "trinity")
    assert 1_700_000_000 < model.created == server.front.started_s
    told = (await http.get("/v1/models")).json()["data"][0]
    assert (told["root"], told["parent"], told["max_model_len"]) == ("fake", None, 128)
    assert told["permission"][0]["allow_sampling"] is True
    assert (await http.get("/v1/models/fake")).json() == told


def test_what_engines_say_of_their_weights_is_exported():
    exporter = Exporter()
    for engine in "ab":
        stats = {"num_versions_held": 2, "num_quarantined": 1, "num_repeats": 5, "switch_seconds": 0.25}
        exporter.engine(engine, 3, {})
        exporter.engine(engine, 4, stats)
        exporter.engine(engine, 4, stats)
    text = exporter.render()[0].decode()
    for line in (
        "trinity_weights_version 4.0",
        "trinity_weights_versions_held 4.0",
        "trinity_weights_quarantined_total 2.0",
        "trinity_passes_repeated_total 10.0",
        "trinity_weights_switch_seconds 0.25",
    ):
        assert f"\n{line}\n" in text


def test_engines_that_have_gone_hold_nothing_and_what_they_counted_is_not_counted_again():
    """For a minute /metrics said that a killed engine's requests ran and held blocks, beside the same ones elsewhere."""
    exporter = Exporter()
    stats = {"num_running": 3, "num_free_blocks": 1, "num_total_blocks": 8}
    before, a, b = ([EngineInfo("m", 64, 1, name, kept)] for name, kept in (("a", {}), ("a", stats), ("b", stats)))
    a[0].stats["num_computed_tokens"] = 5
    for infos, running, usage in (
        (before, 0, 0.0),
        ([*a, *b], 6, 0.875),
        (b, 3, 0.875),
        ((), 0, 0.0),
        (a, 3, 0.875),
    ):
        exporter.engines(infos)
        lines = exporter.render()[0].decode().splitlines()
        assert f"trinity_requests_running {running}.0" in lines
        assert f"trinity_kv_usage {usage}" in lines
    assert "trinity_computed_tokens_total 10.0" in lines


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_has_its_status(start, stream):
    engine = FakeEngine(fail_after=0, error=Overloaded("the queue is full", retry_after_s=2.5))
    async with start(engine) as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        answer = await http.post("/v1/completions", json={**BODY, "stream": stream})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["type"] == "rate_limit_error"


async def test_f14_an_error_in_the_middle_is_an_event(start):
    async with start(FakeEngine(fail_after=3)) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
            found = events((await http.post("/v1/completions", json={**BODY, "stream": True})).text)
        assert len(found) == 4
        assert found[-1]["error"]["code"] == "unavailable"
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.APIError, match="shard is gone"):
                async for _ in await client.completions.create(**BODY, stream=True):
                    pass


async def test_unexpected_errors_are_opaque(start, caplog):
    engine = FakeEngine(fail_after=0, error=RuntimeError("/secret/path at 0xdeadbeef"))
    async with start(engine) as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        answer = await http.post("/v1/completions", json=BODY)
        streamed = await http.post("/v1/completions", json={**BODY, "stream": True})
    for found in (answer, streamed):
        assert found.status_code == 500
        assert "secret" not in found.text
        assert found.headers["x-request-id"] in found.text
    assert "secret" in caplog.text


async def test_f15_disconnects_free_everything(start):
    """Long before the answers would have ended by themselves: 100,000 tokens take half an hour."""
    async with start(FakeEngine(max_model_len=200_000, delay_s=0.02)) as server:
        before = len(asyncio.all_tasks())

        async def leave(stream):
            body = {**BODY, "max_tokens": 100_000, "stream": stream}
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, limits=limits) as http:
                with pytest.raises(httpx.ReadTimeout):
                    await http.post("/v1/completions", json=body, timeout=httpx.Timeout(WAIT_S, read=0.3))

        async def leave_stream():
            async with (
                httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
                http.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 100_000, "stream": True}) as r,
            ):
                await anext(r.aiter_bytes())

        await asyncio.gather(*(leave(False) for _ in range(50)), *(leave_stream() for _ in range(50)))
        await eventually(lambda: not server.engine.held and not server.front.admission.active)
        await eventually(lambda: len(asyncio.all_tasks()) <= before)


async def test_overload_says_when_to_come_back(start):
    engine = HeldEngine()
    busy = start(engine, max_concurrent_requests=2)
    async with busy as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        calls = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(5)]
        await eventually(lambda: sum(call.done() for call in calls) == 3)
        engine.go.set()
        answers = await asyncio.gather(*calls)
    assert sorted(a.status_code for a in answers) == [200, 200, 429, 429, 429]
    assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 429)


async def test_request_timeout(start):
    async with start(FakeEngine(delay_s=5), request_timeout_s=0.2) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
            answer = await http.post("/v1/completions", json=BODY)
        assert answer.status_code == 408
        assert not server.engine.held


async def test_f16_draining_finishes_what_runs_and_refuses_the_rest(start):
    engine = HeldEngine()
    async with start(engine, drain_timeout_s=WAIT_S) as server:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S, limits=limits) as http:
            body = {**BODY, "max_tokens": 30}
            running = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(100)]
            await eventually(lambda: server.front.admission.active == 100)
            stopping = asyncio.create_task(server.gateway.stop())
            await asyncio.sleep(0)
            late = await http.post("/v1/completions", json=body)
            assert (late.status_code, late.headers["retry-after"]) == (503, "1")
            assert (await http.get("/ready")).status_code == 503
            assert (await http.get("/health")).status_code == 200
            engine.go.set()
            assert {answer.status_code for answer in await asyncio.gather(*running)} == {200}
            await stopping
            with pytest.raises(httpx.ConnectError):
                await httpx.AsyncClient().get(f"{server.url}/health")


async def test_requests_that_outlast_the_draining_end_in_an_error_not_in_silence(start):
    async with start(FakeEngine(delay_s=0.4), drain_timeout_s=0.6) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
            body = {**BODY, "max_tokens": 30}
            whole = asyncio.create_task(http.post("/v1/completions", json=body))
            stream = asyncio.create_task(http.post("/v1/completions", json={**body, "stream": True}))
            await eventually(lambda: server.front.admission.active == 2)
            await server.gateway.stop()
            assert (await whole).status_code == 503
            events = (await stream).text
            assert '"error"' in events
            assert events.rstrip().endswith("data: [DONE]")
        assert not server.engine.held


async def test_probes_that_are_late_take_no_gateway_out(start, monkeypatch):
    """Of late probes alone a balancer hears nothing for SILENT_S; else busy gateways would all be taken out at once."""
    monkeypatch.setattr("serving.frontend.SILENT_S", 1e6)
    async with start() as server:
        server.engine.healthy = False
        await server.front.probe(1)
        assert server.front.ready
        monkeypatch.setattr("serving.frontend.SILENT_S", 0)
        await server.front.probe(1)
        assert not server.front.ready


async def test_not_ready_without_an_engine(start, monkeypatch):
    monkeypatch.setattr("serving.frontend.SILENT_S", 0)
    async with start() as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        server.engine.healthy = False
        await eventually(lambda: not server.front.ready)
        assert (await http.get("/ready")).status_code == 503
        server.engine.healthy = True
        await eventually(lambda: server.front.ready)
        assert (await http.get("/ready")).status_code == 200
