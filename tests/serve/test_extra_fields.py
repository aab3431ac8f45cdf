"""What answers have beside OpenAI's fields, and defaults of a checkpoint, over both edges."""

import asyncio
import base64
import io
import json
from dataclasses import replace

import grpc
import httpx
import numpy as np
import pytest
from fake import FakeEngine
from test_grpc import collect, refusal, request, stubs

from protos.trinity.v1 import inference_pb2 as pb
from tests.waiting import WAIT_S
from trinity.engine.defaults import read_defaults

BODY = {"prompt": "the lazy dog", "max_tokens": 3}
CHAT = {"messages": [{"role": "user", "content": "dog"}], "max_tokens": 3}


def events(text):
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return list(map(json.loads, lines))


async def ask(http, body):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return events(answer.text) if body.get("stream") else answer.json()


async def test_token_ids_of_prompts_and_choices(http, server):
    body = {**BODY, "prompt": ["dog", "fox"], "n": 2, "return_token_ids": True}
    prompts = [server.front.tokenizer.encode(text, add_special=True) for text in body["prompt"]]
    choices = (await ask(http, body))["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [prompts[0], prompts[0], prompts[1], prompts[1]]
    assert [choice["token_ids"] for choice in choices] == [prompt[:3] for prompt in prompts for _ in range(2)]
    chat = await ask(http, {**CHAT, "return_token_ids": True})
    assert chat["choices"][0]["token_ids"] == chat["prompt_token_ids"][:3]
    assert "prompt_token_ids" not in chat["choices"][0]
    plain = await ask(http, CHAT)
    assert not {"prompt_token_ids", "token_ids"} & {*plain, *plain["choices"][0]}


@pytest.mark.parametrize("body", [BODY, {**BODY, "echo": True}, CHAT])
async def test_token_ids_in_streams(http, body):
    whole = await ask(http, {**body, "return_token_ids": True})
    chunks = await ask(http, {**body, "return_token_ids": True, "stream": True})
    ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])]
    assert ids == whole["choices"][0]["token_ids"]
    prompts = [part["prompt_token_ids"] for c in chunks for part in (c, c["choices"][0]) if "prompt_token_ids" in part]
    assert prompts == [(whole if "messages" in body else whole["choices"][0])["prompt_token_ids"]]
    assert (
        prompts[0]
        == next(p for p in (chunks[0], chunks[0]["choices"][0]) if "prompt_token_ids" in p)["prompt_token_ids"]
    )


async def test_log_probabilities_name_tokens_by_their_ids(http, server):
    named = {"logprobs": 2, "return_tokens_as_token_ids": True}
    found = (await ask(http, {**BODY, **named}))["choices"][0]["logprobs"]
    ids = server.front.tokenizer.encode("the lazy dog", add_special=True)[:3]
    assert found["tokens"] == [f"token_id:{i}" for i in ids]
    assert set(found["top_logprobs"][0]) == {"token_id:0", "token_id:1"}
    assert found["text_offset"] == (await ask(http, {**BODY, "logprobs": 2}))["choices"][0]["logprobs"]["text_offset"]
    chat = {**CHAT, "logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    content = (await ask(http, chat))["choices"][0]["logprobs"]["content"]
    assert content[0]["top_logprobs"][0]["token"] == "token_id:0"
    assert bytes(content[0]["top_logprobs"][0]["bytes"]) == server.front.tokenizer.token_bytes[0]


async def test_usage_in_every_chunk(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = await ask(http, {**BODY, "stream": True, "stream_options": options})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]
    assert chunks[-1]["usage"] == last["usage"]
    alone = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    assert not any("usage" in chunk for chunk in await ask(http, {**BODY, **alone}))


def array(text):
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


async def test_routed_experts_where_the_server_tells(start, http):
    asked = {**BODY, "return_routed_experts": True}
    refused = await http.post("/v1/completions", json=asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "return_routed_experts")
    async with start(routed_experts=True) as server, stubs(server) as stub:
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
            whole = await ask(client, asked)
            *_, last = await ask(client, {**asked, "stream": True})
            assert "routed_experts" not in (await ask(client, BODY))["choices"][0]
        found = array(whole["choices"][0]["routed_experts"])
        num = whole["usage"]["total_tokens"]
        assert (found.shape, found.dtype) == ((num - 1, 3, 2), np.uint8)
        assert array(last["choices"][0]["routed_experts"]).shape == found.shape
        *_, final = await collect(stub.Generate(pb.GenerateRequest(text="dog", return_routed_experts=True)))
        assert np.load(io.BytesIO(final.final.routed_experts), allow_pickle=False).shape[1:] == (3, 2)


async def test_routed_experts_count_for_the_size_of_an_answer(start):
    settings = {"routed_experts": True, "max_answer_bytes": 2048}
    async with start(FakeEngine(max_model_len=1000), **settings) as server:
        for stream, num, status in ((False, 200, 400), (True, 300, 400), (True, 200, 200)):
            asked = {**BODY, "max_tokens": num, "return_routed_experts": True, "stream": stream}
            answer = await asyncio.to_thread(httpx.post, f"{server.url}/v1/completions", json=asked, timeout=WAIT_S)
            assert answer.status_code == status
            assert status == 200 or "serve.max_answer_bytes" in answer.text


class Unlike(FakeEngine):
    """The continuation of seed s has log-probabilities of -s for each token."""

    def _delta(self, request_id, prompt_ids, params, at, last):
        delta = super()._delta(request_id, prompt_ids, params, at, last)
        logprobs = delta.logprobs and tuple(lp._replace(logprob=-float(abs(params.seed - 12))) for lp in delta.logprobs)
        return replace(delta, logprobs=logprobs, text=f"{params.seed} ")


async def test_the_best_of_several(start):
    async with start(Unlike()) as server, stubs(server) as stub:
        asked = {"prompt": ["a", "b"], "max_tokens": 2, "seed": 10, "n": 2, "best_of": 4}
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
            answer = await ask(client, asked)
            assert [(c["index"], c["text"]) for c in answer["choices"]] == list(enumerate(["12 12 ", "11 11 "] * 2))
            assert answer["choices"][0]["logprobs"] is None
            assert answer["usage"]["completion_tokens"] == 16, "what was drawn counts"
            streamed = await client.post("/v1/completions", json={**asked, "stream": True})
            assert (streamed.status_code, streamed.json()["error"]["param"]) == (400, "best_of")
        sampling = pb.SamplingParams(max_tokens=2, seed=10, best_of=4)
        found = await collect(stub.Generate(pb.GenerateRequest(text="a", n=2, sampling=sampling)))
        assert [r.WhichOneof("event") for r in found] == ["delta", "final"] * 2
        assert [(r.delta.index, r.delta.text) for r in found[::2]] == [(0, "12 12 "), (1, "11 11 ")]
        assert not found[0].delta.logprobs


async def test_several_continuations_over_grpc(start):
    async with start() as server, stubs(server) as stub:
        sampling = pb.SamplingParams(max_tokens=3, seed=5)
        asked = pb.GenerateRequest(text="dog", n=3, sampling=sampling, return_token_ids=True)
        found = await collect(stub.Generate(asked))
        finals = [response.final for response in found if response.WhichOneof("event") == "final"]
        ids = server.front.tokenizer.encode("dog", add_special=True)
        assert sorted(final.index for final in finals) == [0, 1, 2]
        assert [list(final.prompt_token_ids) for final in finals] == [ids] * 3
        assert sorted(params.seed for params in server.engine.seen) == [5, 6, 7]
        for index in range(3):
            deltas = [r.delta for r in found if r.WhichOneof("event") == "delta" and r.delta.index == index]
            assert [i for delta in deltas for i in delta.token_ids] == ids[:3]
        error = await refusal(stub.Generate(pb.GenerateRequest(text="dog", n=129)))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_prompts_are_cut_from_the_left_at_both_edges(http, server):
    async with stubs(server) as stub:
        long = list(range(5, 205))
        for body in ({"prompt": long}, {"prompt": [long]}):
            answer = await ask(http, {**body, "max_tokens": 5, "truncate_prompt_tokens": -1, "return_token_ids": True})
            assert answer["choices"][0]["prompt_token_ids"] == long[-123:]
        prompt = pb.TokenIds(ids=long)
        sampling = pb.SamplingParams(truncate_prompt_tokens=4, max_tokens=2)
        *_, last = await collect(
            stub.Generate(pb.GenerateRequest(token_ids=prompt, sampling=sampling, return_token_ids=True))
        )
        assert list(last.final.prompt_token_ids) == long[-4:]
    chat = await ask(http, {**CHAT, "truncate_prompt_tokens": 2})
    assert chat["usage"]["prompt_tokens"] == 2


async def test_a_checkpoints_number_of_tokens_is_the_default(start):
    engine = FakeEngine(defaults=read_defaults({"max_new_tokens": 9}, "here"))
    async with start(engine) as server, stubs(server) as stub:
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
            for body, count in (({"prompt": "a"}, 9), ({"messages": CHAT["messages"]}, 9), (BODY, 3)):
                assert (await ask(client, body))["usage"]["completion_tokens"] == count
        chat = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="fox")])
        for asked, count in ((pb.GenerateRequest(text="a"), 9), (pb.GenerateRequest(chat=chat), 9), (request(), 6)):
            *_, last = await collect(stub.Generate(asked))
            assert last.final.usage.completion_tokens == count
