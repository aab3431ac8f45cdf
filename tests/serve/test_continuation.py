"""Answers whose engines are lost on the way, through every door: what is told is what would have been, but for a pause."""

import asyncio
import json
from collections import Counter
from contextlib import aclosing
from types import SimpleNamespace

import grpc
import httpx
import pytest
from fake import FakeEngine, fake_tokenizer
from google.protobuf.json_format import MessageToDict
from mortal import MortalEngine, losses
from test_forced_calls import BODY as CALLS

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from serving import app, continuation, pins
from serving.continuation import MAX_LOSSES, MAX_LOSSES_IN_ALL, NUM_ALONE, Continuing
from serving.pins import Pins
from tests.unit.grammar_cases import checkpoint, random_llm
from tests.waiting import WAIT_S, eventually
from trinity.config import ANYBODY, Config
from trinity.engine.async_engine import AsyncEngine
from trinity.engine.request import Delta, SamplingParams
from trinity.errors import ConfigError, EngineLost, InvalidRequest, Overloaded, Unavailable, VersionGone

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
SAID = [{"role": "user", "content": "the quick brown fox"}]
COMMON = {"max_tokens": 40, "seed": 3}
NAMES = {"id", "created", "item_id", "call_id", "response_id", "created_at", "completed_at"}
JSON = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": {"type": "array", "items": {"type": "boolean"}, "minItems": 9}},
}
ASKED = {
    "greedy": (COMPLETE, {"prompt": "fox", "temperature": 0, "return_token_ids": True}),
    "several, sampled": (COMPLETE, {"prompt": ["fox", "dog"], "n": 2, "top_p": 0.9, "logprobs": 2, "ignore_eos": True}),
    "the best": (COMPLETE, {"prompt": "fox", "n": 1, "best_of": 3, "temperature": 1.5}),
    "a scored prompt": (COMPLETE, {"prompt": "the lazy dog", "echo": True, "logprobs": 1, "prompt_logprobs": 1}),
    "stop strings": (COMPLETE, {"prompt": "fox", "stop": ["\nzz", "e q", "qu", "argument)"], "temperature": 2.0}),
    "penalties": (COMPLETE, {"prompt": "fox", "repetition_penalty": 1.4, "presence_penalty": 1, "frequency_penalty": 0.5}),
    "rules": (COMPLETE, {"prompt": "fox", "min_tokens": 30, "bad_words": ["fox", "e"], "logit_bias": {"5": 4}}),
    "experts": (COMPLETE, {"prompt": "fox", "return_routed_experts": True, "max_tokens": 16}),
    "a chat": (CHAT, {"messages": SAID, "logprobs": True, "top_logprobs": 2, "n": 2, "return_token_ids": True}),
    "reasoning": (CHAT, {"messages": SAID, "thinking_token_budget": 5, "logit_bias": {"THINK": 100}}),
    "a schema": (CHAT, {"messages": SAID, "response_format": JSON, "max_tokens": 80}),
    "a regex": (COMPLETE, {"prompt": "fox", "structured_outputs": {"regex": "[a-f]{9}[0-9]{3,9}x"}}),
    "calls": (CHAT, {**CALLS, "tool_choice": "required", "n": 2, "max_tokens": 80}),
    "a response": ("/v1/responses", {"input": "fox", "seed": 3, "max_output_tokens": 40}),
    "a message": ("/v1/messages", {"messages": SAID, "seed": 3, "max_tokens": 40, "model": "fake"}),
}  # fmt: skip
WHOLE = {"the best", "a scored prompt", "a regex", "a response"}  # not as a stream


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(continuation, "PAUSES_S", (0.0,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("run"), fake_tokenizer())


@pytest.fixture(scope="module")
def llm(folder):
    """Without drafts an event is a token, whoever goes on with it."""
    return random_llm(folder, max_draft_tokens=0)


@pytest.fixture(scope="module")
def drafting(folder):
    return random_llm(folder, max_draft_tokens=4)


@pytest.fixture
async def server(start, llm, request):
    made = AsyncEngine(request.getfixturevalue(getattr(request, "param", "llm")).engine)
    async with start(MortalEngine(made), request_timeout_s=WAIT_S, routed_experts=True) as found:
        yield found
    made.close()


@pytest.fixture
async def http(server):
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
        yield client


def nameless(tree):
    """Without what is new in every answer. Numbers are rounded: batches of another size round differently."""
    if isinstance(tree, dict):
        return {key: nameless(value) for key, value in tree.items() if key not in NAMES}
    if isinstance(tree, list):
        return [nameless(value) for value in tree]
    return round(tree, 3) if isinstance(tree, float) else tree


def events(text):
    """A stream's events by choice: those of one come in order, those of several as they come."""
    found = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert not any("error" in event for event in found), found[-1]
    found = [nameless(event) for event in found]
    choice = lambda event: [each["index"] for each in event.get("choices") or []]  # noqa: E731
    return sorted(found, key=choice)


async def asked(http, name, stream):
    path, body = ASKED[name]
    body = {**({} if path.startswith(("/v1/r", "/v1/m")) else COMMON), **body, "stream": stream}
    if "THINK" in (bias := body.get("logit_bias", {})):
        body |= {"logit_bias": {str(fake_tokenizer().id_of("<think>")): bias["THINK"]}}
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return events(answer.text) if stream else nameless(answer.json())


@pytest.mark.parametrize("name", ASKED)
async def test_over_http(server, http, name):
    for _ in range(2):  # the first leaves its prompt in the cache
        undisturbed = await asked(http, name, name not in WHOLE)
    server.engine.script, server.engine.begun = losses(len(name)), []
    assert await asked(http, name, name not in WHOLE) == undisturbed
    assert any(begun and begun.token_ids for begun in server.engine.begun), "nothing was lost on the way"
    stats = server.engine.stats()
    assert (stats.num_free_blocks, stats.num_running) == (stats.num_total_blocks, 0)


@pytest.mark.parametrize("server", ["drafting"], indirect=True)
@pytest.mark.parametrize("name", ["greedy", "several, sampled", "rules", "a schema", "calls"])
async def test_with_drafts(server, http, name):
    """Events have as many tokens as came true; the whole answer is the same."""
    for _ in range(2):
        undisturbed = await asked(http, name, False)
    server.engine.script, server.engine.begun = losses(len(name)), []
    assert await asked(http, name, False) == undisturbed
    assert any(begun and begun.token_ids for begun in server.engine.begun), "nothing was lost on the way"
    assert server.engine.stats().num_drafted


@pytest.mark.parametrize("kind", ["text", "chat"])
async def test_over_grpc(server, kind):
    sampling = pb.SamplingParams(max_tokens=30, seed=4, logprobs=2, stop=["qu", "zz"])
    said = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="fox")])
    request = pb.GenerateRequest(
        **{kind: "fox" if kind == "text" else said}, n=2, sampling=sampling, return_token_ids=True
    )

    async def ask(channel):
        found = [MessageToDict(event) async for event in rpc.InferenceStub(channel).Generate(request)]
        return sorted(map(nameless, found), key=lambda event: event[next(iter(event))].get("index", 0))

    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        undisturbed = await ask(channel)
        server.engine.script = losses(3)
        assert await ask(channel) == undisturbed
        assert not server.engine.script


async def test_without_a_seed_the_gateway_draws_one(server, http):
    """Another engine that drew its own would go on with another text: here each of three engines goes on with the first's."""
    server.engine.script = [4, 4]
    body = {"prompt": "fox", "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    [choice] = (await http.post(COMPLETE, json=body)).json()["choices"]
    first, second, third = server.engine.begun
    assert (first, len(second.token_ids), len(third.token_ids)) == (None, 4, 8)
    assert choice["token_ids"][:8] == list(third.token_ids)
    assert len(choice["token_ids"]) == 12
    metrics = (await http.get("/metrics")).text
    assert "trinity_continuation_seconds_count 2.0" in metrics
    assert "trinity_generated_tokens_total 12.0" in metrics


class Scripted:
    """Engines that do what each request's script says: "token", "end" or an error, one after the other. `together` is how many
    were at once before their first token of the n-th try."""

    def __init__(self, **scripts):
        self.scripts = {name: list(script) for name, script in scripts.items()}
        self.before, self.together = Counter(), Counter()

    async def generate(self, request_id, prompt_ids, params, deadline_s, client, adapter=None, begun=None):
        name, _, nth = request_id.partition("-")
        num = len(begun.token_ids) if begun else 0
        self.before[nth] += 1
        self.together[nth] = max(self.together[nth], self.before[nth])
        await asyncio.sleep(0)
        self.before[nth] -= 1
        while (what := self.scripts[name].pop(0)) != "nothing":
            if isinstance(what, Exception):
                raise what
            num += 1
            yield Delta(request_id, "x", (num,), finish_reason="length" if what == "end" else None)
            await asyncio.sleep(0)


LOST = EngineLost("killed")


async def tokens(engines, name="a", observe=lambda paused_s: None):
    streams = engines if isinstance(engines, Continuing) else Continuing(engines, observe, Pins())
    stream = streams.generate(name, [1], SamplingParams(), WAIT_S, ANYBODY)
    return [token async for delta in stream for token in delta.token_ids]


async def test_a_token_in_between_and_it_may_lose_more():
    paused = []
    script = [*["token", *[LOST] * (MAX_LOSSES - 1)] * 3, "token", "token", "token", "end"]
    assert await tokens(Scripted(a=script), observe=paused.append) == [1, 2, 3, 4, 5, 6, 7]
    assert len(paused) == 3
    assert min(paused) >= 0


@pytest.mark.parametrize(
    ("script", "num"),
    [
        ([LOST] * MAX_LOSSES, MAX_LOSSES),
        (["nothing"] * MAX_LOSSES, MAX_LOSSES),
        (["token", LOST] * MAX_LOSSES_IN_ALL, MAX_LOSSES_IN_ALL),
    ],
)
async def test_what_ends_engines_is_given_up(script, num):
    engines = Scripted(a=[*script, "end"])
    with pytest.raises(
        Unavailable, match=f"{num} engines were lost while they worked on this request.*Change it before"
    ):
        await tokens(engines)
    assert engines.scripts["a"] == ["end"]


@pytest.mark.parametrize("error", [Unavailable("none is there"), Overloaded("its queue is full")])
async def test_once_begun_it_waits_for_an_engine(error):
    assert await tokens(Scripted(a=["token", LOST, *[error] * 30, "end"])) == [1, 2]
    for at_once in ([error], ["token", LOST, "token", error]):
        with pytest.raises(type(error)):
            await tokens(Scripted(a=[*at_once, "end"]))


async def test_other_errors_are_told_at_once():
    with pytest.raises(InvalidRequest):
        await tokens(Scripted(a=["token", LOST, InvalidRequest("no"), "end"]))


async def test_the_last_tries_of_each_are_made_alone():
    """Three that were lost twice beside one that ends engines: it goes on doing so, and only it fails."""
    others = {name: [LOST, LOST, "token", "end"] for name in ("one", "two", "three")}
    engines = Scripted(bad=[LOST] * MAX_LOSSES, **others)
    streams = Continuing(engines, lambda paused_s: None, Pins())
    found = await asyncio.gather(*(tokens(streams, name) for name in engines.scripts), return_exceptions=True)
    assert isinstance(found[0], Unavailable)
    assert found[1:] == [[1, 2]] * 3
    assert engines.together == {"": 4, "1": 4} | {str(nth): 1 for nth in range(MAX_LOSSES - NUM_ALONE, MAX_LOSSES)}


class Last(FakeEngine):
    """It gives a token and is lost, and there is no other."""

    async def generate(self, *asked, begun=None):
        if begun is not None:
            raise Unavailable("none is there")
        async with aclosing(super().generate(*asked)) as deltas:
            yield await anext(deltas)
        raise EngineLost("killed")


async def test_whoever_waits_for_an_engine_may_leave_and_has_a_deadline(start):
    body = {"prompt": "fox", "max_tokens": 9, "stream": True}
    async with start(Last(), request_timeout_s=1.0) as server, httpx.AsyncClient(base_url=server.url) as http:
        async with http.stream("POST", COMPLETE, json=body) as answer:
            await anext(answer.aiter_lines())
        await eventually(lambda: server.front.admission.active == 0)
        assert (await http.post(COMPLETE, json=body | {"stream": False})).status_code == 408
        assert server.front.admission.active == 0


async def test_what_answers_are_pinned_to_is_kept_between_engines(monkeypatch):
    """From the first token of the first to the end of the last, and renewed; a server's own version to its end."""
    told = []
    monkeypatch.setattr(pins, "LEASE_S", 0.03)
    held = Pins(lambda *what: told.append(what))
    held.start(3)
    streams = Continuing(FakeEngine(delay_s=0.01), lambda paused_s: None, held)

    async def ask(policy, num):
        stream = streams.generate("a", [1], SamplingParams(max_tokens=num, version_policy=policy), WAIT_S, ANYBODY)
        return [delta.version async for delta in stream]

    await asyncio.gather(ask("pinned", 3), ask("pinned", 6), ask("live", 9))
    await eventually(lambda: told[-1][:2] == ("pin", 3))
    held.stop()
    await eventually(lambda: told[-1] == ("unpin", told[0][2]))
    kept, released = [what for what in told if what[:2] == ("pin", 7)], told.index(("unpin", f"{told[0][2][:-2]}/7"))
    assert len(kept) > 1, "it is renewed"
    assert told.index(kept[0]) > told.index(("unpin", pins.STARTING))
    assert not [what for what in told[released:] if what[:2] == ("pin", 7)]


async def test_a_service_that_is_away_holds_nobody_up():
    def tell(*what):
        raise Unavailable("there is no such service")

    held = Pins(tell)
    held.start(3)
    engines = Scripted(a=["token", LOST, "token", "end"])
    stream = Continuing(engines, lambda paused_s: None, held).generate(
        "a", [1], SamplingParams(version_policy="pinned"), WAIT_S, ANYBODY
    )
    assert len([delta async for delta in stream]) == 3
    held.stop()


def test_engines_of_a_pinned_server_are_told_the_version(monkeypatch):
    """One that starts later would take what is the newest then."""
    asked = []

    def pin(*what):
        asked.append(what)
        if what[0] == 4:
            raise VersionGone("version 4 is not kept")
        return what[0] or 7

    monkeypatch.setattr(app, "placement", lambda placement_json, namespace: SimpleNamespace(pin=pin))
    config = Config.load(model="tiny")
    for weights, told in (("pinned", "pinned:7"), ("pinned:5", "pinned:5"), ("live", "live")):
        assert app.of_one_version(config.replace(serve={"weights": weights})).serve.weights == told
    with pytest.raises(ConfigError, match="--weights pinned:4: version 4 is not kept; or serve that step's checkpoint"):
        app.of_one_version(config.replace(serve={"weights": "pinned:4"}))
    assert asked == [(step, pins.STARTING, 180.0) for step in (None, 5, 4)]
