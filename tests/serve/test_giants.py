"""One client's giant: refused at its first mistake, or its own request is slow; nobody else stands still for it.

The measure is what this machine needs to read the same bytes as JSON, once: a stall is so many times that, on any machine, and
less than once where the reading is done elsewhere. What was here before stalled for hundreds of times as long.
"""

import asyncio
import base64
import functools
import io
import json
import threading
import time
from contextlib import suppress

import h11
import httpx
import numpy as np
import pytest
from fake import FakeEngine

from serving.frontend import INLINE_CHARS, LARGE_CHAT_CHARS
from serving.http import routes
from serving.http.openai import encoded, sse
from serving.http.server import FED_BYTES
from tests.serve.standstill import FEWEST_S, least_standstill
from tests.waiting import WAIT_S
from trinity.engine.request import Delta, TokenLogprobs

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"


def message(content):
    return f'{{"messages":[{{"role":"user","content":{content}}}]}}'


QUESTION = message('"a"')[:-1]
CALL = '{"function":{"name":"f","arguments":"x"}}'


def tool(parameters):
    return f'{QUESTION},"tools":[{{"type":"function","function":{{"name":"f","parameters":{parameters}}}}}]}}'


def many(piece, num, last=""):
    return f"[{','.join([piece] * num + [last] * bool(last))}]"


ITEM, PART = '{"role":"user","content":"a"}', '{"type":"input_text","text":""}'
FUNCTION, BLOCK = '{"type":"function","name":"f","parameters":{}}', '{"type":"text","text":"","citations":[]}'
USE = '{"type":"tool_use","id":"a","name":"f","input":{"a":1}}'
RESULT = '{"type":"tool_result","tool_use_id":"a","content":[{"type":"text","text":"a"}]}'
GIANTS = {  # -> path, body, status
    "ids, the last one wrong": (COMPLETE, f'{{"prompt":{many("1", 990_000, chr(34) * 2)}}}', 400),
    "ids, the first one wrong": (COMPLETE, f'{{"prompt":[1.5,{many("1", 990_000)[1:]}}}', 400),
    "floats": (COMPLETE, f'{{"prompt":{many("1.5", 500_000)}}}', 400),
    "objects": (COMPLETE, f'{{"prompt":{many("{}", 660_000)}}}', 400),
    "texts and one number": (COMPLETE, f'{{"prompt":{many(chr(34) * 2, 600_000, "1")}}}', 400),
    "lists of nothing": (COMPLETE, f'{{"prompt":{many("[]", 660_000)}}}', 400),
    "lists of ids, one wrong": (COMPLETE, f'{{"prompt":{many("[1,2]", 300_000, "[[]]")}}}', 400),
    "more ids than the model takes": (COMPLETE, f'{{"prompt":{many("1", 990_000)}}}', 400),
    "content of numbers": (CHAT, message(many("1", 990_000)), 400),
    "content of objects": (CHAT, message(many("{}", 600_000)), 400),
    "messages of nothing": (CHAT, f'{{"messages":{many("{}", 600_000)}}}', 400),
    "messages that are numbers": ("/tokenize", f'{{"messages":{many("1", 990_000)}}}', 400),
    "content of numbers to be counted": ("/tokenize", message(many("1", 990_000)), 400),
    "ids to be read": ("/detokenize", f'{{"tokens":{many("1", 990_000)}}}', 200),
    "ids to be read, the last one wrong": ("/detokenize", f'{{"tokens":{many("1", 990_000, "-1")}}}', 400),
    "stop strings": (COMPLETE, f'{{"prompt":"a","stop":{many(chr(34) * 2, 600_000)}}}', 400),
    "stop ids": (COMPLETE, f'{{"prompt":"a","stop_token_ids":{many("{}", 600_000)}}}', 400),
    "biases": (COMPLETE, f'{{"prompt":"a","logit_bias":{json.dumps(dict.fromkeys(range(130_000), "x"))}}}', 400),
    "parts": (CHAT, message(many('{"type":"text","text":""}', 70_000)), 200),
    "parts of many messages": (
        CHAT,
        f'{{"messages":{many(message(many("@", 70))[13:-2].replace("@", """{"type":"text","text":"a"}"""), 900)}}}',
        400,
    ),
    "tools": (CHAT, f'{QUESTION},"tools":{many("{}", 600_000)}}}', 400),
    "a deep tool": (CHAT, tool('{"a":' * 900 + "1" + "}" * 900), 400),
    "a wide tool": (CHAT, tool(f'{{"enum":{many("[]", 600_000)}}}'), 400),
    "a tool as wide as may be": (CHAT, tool(f'{{"enum":{many("[]", 15_000)}}}'), 400),
    "a large tool": (CHAT, tool(f'{{"title":"{"x" * 1_900_000}"}}'), 400),
    "calls": (CHAT, f'{{"messages":[{{"role":"assistant","tool_calls":{many(CALL, 40_000)}}}]}}', 400),
    "calls of many messages": (
        CHAT,
        f'{{"messages":{many(f"""{{"role":"assistant","tool_calls":{many(CALL, 40)}}}""", 1000)}}}',
        400,
    ),
    "arguments of the template": (
        CHAT,
        f'{QUESTION},"chat_template_kwargs":{{"a":{many("[]", 600_000)}}}}}',
        400,
    ),
    "items of nothing": (RESPONSES, f'{{"input":{many("{}", 600_000)}}}', 400),
    "items that are numbers": (RESPONSES, f'{{"input":{many("1", 990_000)}}}', 400),
    "more items than are taken": (RESPONSES, f'{{"input":{many(ITEM, 40_000)}}}', 400),
    "parts of an item": (RESPONSES, f'{{"input":[{{"role":"user","content":{many(PART, 40_000)}}}]}}', 200),
    "a large instruction": (RESPONSES, f'{{"input":"a","instructions":"{"x" * 1_900_000}"}}', 400),
    "tools of an agent": (RESPONSES, f'{{"input":"a","tools":{many(FUNCTION, 30_000)}}}', 400),
    "blocks": (MESSAGES, f'{{"max_tokens":2,"messages":[{{"role":"user","content":{many(BLOCK, 40_000)}}}]}}', 200),
    "blocks of another kind": (MESSAGES, message(many("[]", 600_000)), 400),
    "blocks of calls": (
        MESSAGES,
        f'{{"max_tokens":2,"messages":[{{"role":"assistant","content":{many(USE, 30_000)}}}]}}',
        400,
    ),
    "blocks of results": (
        MESSAGES,
        f'{{"max_tokens":2,"messages":[{{"role":"user","content":{many(RESULT, 20_000)}}}]}}',
        400,
    ),
    "blocks to be counted": ("/v1/messages/count_tokens", f'{{"system":{many("1", 900_000)},{QUESTION[1:]}}}', 400),
    "hints of a message": (
        CHAT,
        json.dumps({"messages": [{"role": "user", "content": "a"} | {f"k{i}": None for i in range(100_000)}]}),
        200,
    ),
    "stream options": (
        COMPLETE,
        json.dumps({"prompt": "a", "stream_options": {f"k{i}": 1 for i in range(100_000)}}),
        400,
    ),
    "lists of floats": (COMPLETE, f'{{"prompt":{many("[1.0]", 330_000)}}}', 400),
    "fields that are ignored": (
        COMPLETE,
        json.dumps({"prompt": "a", "metadata": {f"k{i}": "v" for i in range(110_000)}}),
        200,
    ),
    "a schema": (COMPLETE, json.dumps({"prompt": "a", "structured_outputs": {"json": {"enum": [""] * 400_000}}}), 400),
    "a schema in a schema": (
        CHAT,
        f'{{"messages":[],"response_format":{{"type":"json_schema","json_schema":{{"schema":{many("[1]", 400_000)}}}}}}}',
        400,
    ),
    "a pattern": (COMPLETE, json.dumps({"prompt": "a", "structured_outputs": {"regex": "a" * 1_900_000}}), 400),
    "choices": (COMPLETE, json.dumps({"prompt": "a", "structured_outputs": {"choice": ["a"] * 300_000}}), 400),
    "unknown fields": (COMPLETE, json.dumps({"prompt": "a"} | {f"n{i}": 1 for i in range(120_000)}), 400),
}


class Verbose(FakeEngine):
    """As many log-probabilities as may be asked for."""

    async def generate(self, request_id, prompt_ids, params=None, deadline_s=None, client=None, adapter=None):
        top = tuple((i, -1.0 - i) for i in range(20))
        for at in range(params.max_tokens):
            await asyncio.sleep(0)  # an engine hands out a token at a time
            last = at + 1 == params.max_tokens
            yield Delta(
                request_id,
                "a",
                (5,),
                (TokenLogprobs(5, -1.0, top),),
                "length" if last else None,
                num_prompt_tokens=1,
                num_generated_tokens=at + 1,
            )


USUAL = (  # of the kinds that are alike, by default; the others with `make chaos`
    "ids, the last one wrong", "lists of nothing", "lists of ids, one wrong", "more ids than the model takes",
    "content of objects", "ids to be read", "content of numbers to be counted", "parts of many messages", "a wide tool",
    "a deep tool", "calls of many messages", "arguments of the template", "parts of an item", "tools of an agent",
    "blocks of calls", "blocks to be counted", "fields that are ignored", "a schema in a schema", "choices",
    "unknown fields",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [*USUAL, *(pytest.param(name, marks=pytest.mark.chaos) for name in GIANTS if name not in USUAL)]
)
async def test_a_giant_body_stalls_nobody(server, http, name):
    path, body, status = GIANTS[name]
    assert len(body) < server.front.config.max_body_bytes
    began = time.process_time()
    json.loads(body)
    once_s = max(FEWEST_S, time.process_time() - began)
    sent = functools.partial(http.post, path, content=body, headers={"content-type": "application/json"})
    answer, stall_s = await least_standstill(sent, once_s)
    assert answer.status_code == status, answer.text[:300]
    assert len(answer.text) < 300 or status == 200
    assert stall_s < once_s, f"{stall_s:.3f} s, {stall_s / once_s:.1f} times reading it"


async def test_a_body_in_crumbs_is_refused(server, http):
    fields = ("host: localhost", "content-type: application/json", "transfer-encoding: chunked")
    head = "\r\n".join((f"POST {COMPLETE} HTTP/1.1", *fields, "", "")).encode()
    crumbs, parser = b"1\r\n \r\n" * 100_000, h11.Connection(h11.SERVER)
    began = time.process_time()
    parser.receive_data(head + crumbs[:FED_BYTES])
    while parser.next_event() is not h11.NEED_DATA:
        pass
    once_s = time.process_time() - began
    url = httpx.URL(server.url)

    async def sent():
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(head + crumbs)
        with suppress(ConnectionResetError):  # where the answer comes while it still sends
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert b"crumbs" in answer
        writer.close()

    _, stall_s = await least_standstill(sent, 10 * once_s)
    assert stall_s < 10 * once_s, f"{stall_s:.3f} s, {stall_s / once_s:.0f} times parsing {FED_BYTES} bytes"
    few = [b'{"prompt": ', *[b" "] * 200, b'"a"}']  # a client that writes small pieces is no attack

    async def pieces():
        for piece in few:
            yield piece

    assert (
        await http.post(COMPLETE, content=pieces(), headers={"content-type": "application/json"})
    ).status_code == 200


async def test_large_chats_wait_for_each_other_alone(http, monkeypatch):
    """Many whose template takes long: a chat of usual size and a long prompt go on beside them."""
    go = threading.Event()

    def render(chat, tokenizer):
        is_large = len(chat.messages[0]["content"]) > LARGE_CHAT_CHARS
        return "ab"[go.wait(WAIT_S)] if is_large else "ab"

    monkeypatch.setattr("serving.frontend.render", render)

    def chat(size):
        return http.post(CHAT, json={"messages": [{"role": "user", "content": "a" * size}], "max_tokens": 1})

    large = [asyncio.create_task(chat(LARGE_CHAT_CHARS + 1)) for _ in range(20)]
    try:
        for _ in range(3):
            assert (await chat(10)).status_code == 200
        assert (await http.post(COMPLETE, json={"prompt": "a" * (2 * INLINE_CHARS)})).status_code == 400  # too long
        assert not any(task.done() for task in large)
    finally:
        go.set()
    assert {answer.status_code for answer in await asyncio.gather(*large)} == {200}


async def test_one_request_never_holds_more_than_a_quarter_of_the_slots(start):
    async with (
        start(FakeEngine(), max_concurrent_requests=40) as server,
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
    ):
        body = {"prompt": [[5]] * 5, "n": 2, "max_tokens": 2}
        assert (await http.post(COMPLETE, json=body)).status_code == 200
        for more in ({"n": 3}, {"prompt": [[5]] * 11, "n": 1}):
            answer = await http.post(COMPLETE, json=body | more)
            assert answer.status_code == 400
            assert "10 are taken, at most a quarter" in answer.json()["error"]["message"]
        answer = await http.post(CHAT, json={"messages": [{"role": "user", "content": "a"}], "n": 11})
        assert answer.status_code == 400


async def test_an_answer_that_nobody_could_hold_is_refused_unless_it_is_streamed(start):
    async with (
        start(Verbose(max_model_len=4096), max_answer_bytes=1 << 20) as server,
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
    ):
        body = {"prompt": [[5]] * 2, "n": 2, "max_tokens": 400, "logprobs": 20}  # 135 bytes for two million
        answer = await http.post(COMPLETE, json=body)
        assert answer.status_code == 400
        assert "serve.max_answer_bytes is 1,048,576" in answer.json()["error"]["message"]
        assert not server.front.admission.active
        for less in ({"logprobs": 2}, {"max_tokens": 100}, {"stream": True}):
            assert (await http.post(COMPLETE, json=body | less)).status_code == 200


def test_answers_in_pieces_are_the_same_json():
    trees = [
        {"a": [], "b": {}, "c": [[]], "d": None, "e": [{}], "f": '\u00e9"', "g": [1.5, -0.0, 1e-30]},
        {"choices": [{"logprobs": {"tokens": ["a"] * n, "top": [{"b": -1.5}] * n}} for n in (0, 1, 63, 64, 65, 200)]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "x", "bytes": [1]}] * 20}] * 130}}] * 3},
    ]
    for tree in trees:
        assert encoded(tree) == json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        encoded({"a": [float("nan")]})


@pytest.mark.parametrize("path", [COMPLETE, CHAT])
async def test_an_answer_of_megabytes_is_written_beside_other_work(start, path):
    async with (
        start(Verbose(max_model_len=4096)) as server,
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
    ):
        given = {"prompt": "a", "logprobs": 20, "n": 4, "max_tokens": 2000}
        if path == CHAT:
            given |= {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 20}
            del given["prompt"]
        tree = (await http.post(path, json=given)).json()
        began = time.process_time()
        json.dumps(tree)
        once_s = time.process_time() - began
        most_s = 2 * once_s  # in one go on this loop it takes three times as long and more
        answer, stall_s = await least_standstill(functools.partial(http.post, path, json=given), most_s)
    assert len(answer.content) > 2 << 20
    assert stall_s < most_s, f"{stall_s:.3f} s, {stall_s / once_s:.1f} times writing it"


EXPERTS_TLK = np.zeros((20_000, 54, 8), np.uint8)
EXPERTS_TLK[-1] = 7


class Routed(FakeEngine):
    """Few tokens, and the experts of a long prompt."""

    async def generate(self, request_id, prompt_ids, params=None, deadline_s=None, client=None, adapter=None):
        yield Delta(request_id, "a", (5,), num_prompt_tokens=1, num_generated_tokens=1)
        yield Delta(
            request_id, "a", (5,), finish_reason="length", num_prompt_tokens=1, num_generated_tokens=2, experts_TLK=EXPERTS_TLK
        )  # fmt: skip


@pytest.mark.parametrize("path", [COMPLETE, CHAT])
async def test_the_experts_of_a_long_prompt_are_written_on_a_thread(start, path, monkeypatch):
    threads = set()
    monkeypatch.setattr(routes, "sse", lambda event: threads.add(threading.current_thread()) or sse(event))
    given = {"prompt": "a"} if path == COMPLETE else {"messages": [{"role": "user", "content": "a"}]}
    given |= {"stream": True, "return_routed_experts": True}
    async with (
        start(Routed(max_model_len=4096), routed_experts=True) as server,
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
    ):
        answer = await http.post(path, json=given)
    *_, last, done = answer.text.split("\n\n")[:-1]
    assert done == "data: [DONE]"
    told = json.loads(last.removeprefix("data: "))["choices"][0]
    found = np.load(io.BytesIO(base64.b64decode(told["routed_experts"])))
    assert (found.shape, int(found[-1, -1, -1])) == (EXPERTS_TLK.shape, 7)
    assert threads - {threading.main_thread()}
