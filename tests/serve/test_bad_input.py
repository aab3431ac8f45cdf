"""Bad input: the right code, quickly, and the next request is fine. Random bodies never cause a 5xx."""

import asyncio
import json
import random
import re
import time
from pathlib import Path

import httpx
import pytest

from tests.waiting import WAIT_S

GOOD = {"prompt": "the lazy dog", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "dog"}], "max_tokens": 2}
RESPONSE, MESSAGE = {"input": "dog", "max_output_tokens": 2}, {**CHAT, "system": "a"}
PATHS = [
    *("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"),
    *("/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
]
JSON = {"content-type": "application/json"}
HERE = re.escape(str(Path(__file__).parents[2]))
LEAK = re.compile(rf"Traceback|File \"|{HERE}|site-packages|0x[0-9a-f]{{6,}}|\.py\b|pid")

SAMPLING = {
    "max_tokens": [-1, 2**31 + 1, 2.5, 1e308, "1", True, [1]],
    "temperature": [-1, -1e-9, 101, 1e308, "1", True, []],
    "top_p": [-1, 0, 1.0001, 1e308, "1", True],
    "top_k": [-2, 2**31 + 1, 1.5, "1", True],
    "min_p": [-1, 1.0001, 1e308, "1", True],
    "seed": [2**63, -(2**63) - 1, 1.5, "1", True],
    "n": [-1, 0, 129, 1.5, "1", True],
    "logprobs": [-1, 21, 1.5, "1"],
    "prompt_logprobs": [-1, 21, 1.5, 1e308, "1", True, [1]],
    "presence_penalty": [-2.1, 2.1, 1e308, "1", True],
    "frequency_penalty": [-2.1, 2.1, 1e308, "1", True],
    "repetition_penalty": [-1, 0, 101, 1e308, "1", True],
    "stop": [1, True, [1], "", [""], ["a"] * 17, "x" * 257],
    "stop_token_ids": [1, ["1"], [True], [-1], [300], [2**31], [1] * 129],
    "logit_bias": [1, [], {"x": 1}, {"-1": 1}, {"300": 1}, {"1": 101}, {"1": "1"}, {"1": True}, {"9" * 11: 1}],
    "ignore_eos": [0, "true"],
    "version_policy": ["newest", "", 1, True, ["live"]],
    "stream": [0, "true"],
    "stream_options": [1, {"include_usage": 1}, {"continuous_usage_stats": 1}, {"what": True}],
    "echo": [1],
    "model": [1, []],
    "best_of": [-1, 0, 129, 1.5, "2", True],
    "min_tokens": [-1, 3, 2**31 + 1, 1.5, "1", True],
    "bad_words": [1, [1], [""], ["a"] * 1001, ["x" * 1001], {}],
    "allowed_token_ids": [[], [-1], [300], [2**31], [True], ["1"], [1] * 1025, 1],
    "include_stop_str_in_output": [1, "true"],
    "skip_special_tokens": [0, "false"],
    "spaces_between_special_tokens": [False, 1],
    "truncate_prompt_tokens": [0, -2, 2**31 + 1, 1.5, "1", True],
    "thinking_token_budget": [-1, 2**31 + 1, 1.5, "1", True],
    "priority": [2**63, -(2**63) - 1, 1.5, "1", True],
    "return_token_ids": [1, "true"],
    "return_tokens_as_token_ids": [1],
    "return_routed_experts": [True, 1],
    "suffix": ["after"],
    "tools": [[{"type": "function"}]],
    "response_format": [1, "json_object", {}, {"type": "xml"}, {"type": "json_schema", "json_schema": {"schema": {}}}],
    "structured_outputs": [1, [], {}, {"regex": ""}, {"json": 1}, {"json": {}, "regex": "a"}, {"regex": "a" * 65_537}],
    "guided_regex": ["(a+)+$"],
    "chat_template": ["{{ 1 }}"],
    "sampling": [{}],
    "trace": [True, False],
    "temprature": [1],
}
PROMPTS = [1, True, [], [[]], {}, [1.5], [True], [-1], [300], [2**31], [[1], "a"], ["a", 1], ["a"] * 65, [[1], []]]
MESSAGES = [
    "x",
    [],
    [1],
    [{}],
    [{"role": "user"}],
    [{"role": "robot", "content": "x"}],
    [{"role": "user", "content": 1}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1"}}]}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}],
    [{"role": "user", "content": "x", "what": 1}],
    [{"role": "function", "content": "x"}],
    [{"role": "assistant", "content": "x", "audio": {"id": "a"}}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}],
    [{"role": "assistant", "tool_calls": [{"type": "custom", "function": {"name": "f"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 1025}],
]


def check_refusal(answer, statuses=(400,)):
    assert answer.status_code in statuses, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert not LEAK.search(answer.text), answer.text


async def check_alive(http):
    assert (await http.post("/v1/completions", json=GOOD)).status_code == 200


@pytest.mark.parametrize("field", SAMPLING)
async def test_fields_at_and_beyond_their_bounds(http, field):
    for value in SAMPLING[field]:
        answer = await http.post("/v1/completions", json={**GOOD, field: value})
        check_refusal(answer)
        assert answer.json()["error"]["param"].startswith(field), answer.text
    assert (await http.post("/v1/completions", json={**GOOD, field: None})).status_code == 200


async def test_bounds_are_inside(http):
    inside = {"temperature": [0, 100, 2], "top_p": [1e-9, 1], "top_k": [-1, 0, 299], "seed": [-(2**63), 2**63 - 1]}
    inside |= {
        "n": [128],
        "min_tokens": [0, 2],
        "bad_words": ["a", ["x" * 1000] * 1000],
        "allowed_token_ids": [[0], [299] * 1024],
        "stop_token_ids": [[299] * 128],
        "spaces_between_special_tokens": [True],
        "truncate_prompt_tokens": [-1, 1, 2**31],
        "thinking_token_budget": [0, 2**31],
        "priority": [2**63 - 1, -(2**63)],
        "return_routed_experts": [False],
        "logprobs": [0, 20],
        "stop": ["a", ["a"] * 16, "x" * 256],
        "best_of": [1, 128],
        "max_tokens": [1, 2**31],
    }
    inside |= {"tools": [[]], "response_format": [{"type": "text"}], "suffix": [""], "logit_bias": [{"299": -100}]}
    for field, values in inside.items():
        for value in values:
            answer = await http.post("/v1/completions", json={**GOOD, field: value})
            assert answer.status_code == 200, (field, value, answer.text)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
async def test_numbers_that_json_does_not_have(http, text):
    for field in ("temperature", "top_p", "max_tokens", "presence_penalty"):
        body = json.dumps(GOOD)[:-1] + f', "{field}x": 0, "{field}": {text}}}'
        check_refusal(await http.post("/v1/completions", content=body.replace(f', "{field}x": 0', ""), headers=JSON))


async def test_prompts(http):
    for prompt in PROMPTS:
        check_refusal(await http.post("/v1/completions", json={**GOOD, "prompt": prompt}), (400,))
    check_refusal(await http.post("/v1/completions", json={"max_tokens": 1}))
    check_refusal(await http.post("/v1/completions", json={"prompt": "", "add_special_tokens": False}))
    for messages in MESSAGES:
        check_refusal(await http.post("/v1/chat/completions", json={**CHAT, "messages": messages}))
    check_refusal(await http.post("/v1/chat/completions", json={**CHAT, "top_logprobs": 1}))
    await check_alive(http)


async def test_prompt_lengths_around_the_limit(http):
    for count, status in ((126, 200), (127, 200), (128, 400), (129, 400), (12800, 400)):
        answer = await http.post("/v1/completions", json={"prompt": [5] * count, "max_tokens": 5})
        assert answer.status_code == status, count
        if status == 200:
            assert answer.json()["choices"][0]["finish_reason"] == "length"
    message = answer.json()["error"]["message"]
    assert "12800" in message
    assert "127" in message
    check_refusal(await http.post("/v1/completions", json={"prompt": "a" * 1_000_000}))


BODIES = {
    "empty": b"",
    "cut": b'{"prompt": "a"',
    "text": b"hello",
    "list": b"[]",
    "number": b"1",
    "null": b"null",
    "duplicate": b'{"prompt": "a", "prompt": "b"}',
    "deep list": b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "deep object": b'{"prompt": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}",
    "surrogate": b'{"prompt": "\\ud83d"}',
    "surrogate key": b'{"\\udc00": 1, "prompt": "a"}',
    "latin-1": '{"prompt": "é"}'.encode("latin-1"),
    "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "bom": b'\xef\xbb\xbf{"prompt": "a"}',
    "huge number": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "trailing": b'{"prompt": "a"} {}',
}


@pytest.mark.parametrize("name", BODIES)
async def test_bodies(http, name):
    for path in PATHS:
        started_s = time.process_time()  # the server is in this process: a body that is costly to refuse costs that
        check_refusal(await http.post(path, content=BODIES[name], headers=JSON))
        assert time.process_time() - started_s < 2
    await check_alive(http)


async def test_text_that_looks_bad_but_is_not(http):
    for prompt in ("\0", "🦊🦊", "\\ud83d\\ude00 as text", "a\u2028b", "<|im_end|>"):
        assert (await http.post("/v1/completions", json={**GOOD, "prompt": prompt})).status_code == 200


async def test_sizes_and_types_of_bodies(start):
    async with start(max_body_bytes=2048) as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        big = json.dumps({**GOOD, "user": "x" * 4096}).encode()
        check_refusal(await http.post("/v1/completions", content=big, headers=JSON), (413,))

        async def endless():
            for _ in range(1000):
                yield b" " * 1024

        check_refusal(await http.post("/v1/completions", content=endless(), headers=JSON), (413,))
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            answer = await http.post("/v1/completions", content=json.dumps(GOOD), headers={"content-type": kind})
            check_refusal(answer, (415,))
        kind = {"content-type": "Application/JSON; charset=utf-8"}
        assert (await http.post("/v1/completions", content=json.dumps(GOOD), headers=kind)).status_code == 200


async def test_routes_that_are_not_there(http):
    for path in ("/v1", "/v2/completions", "/v1/completions/", "/docs", "/openapi.json", "/../etc/passwd", "/%00"):
        check_refusal(await http.get(path), (404,))
    for method, path in (
        ("GET", "/v1/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/health"),
        ("PUT", "/tokenize"),
    ):
        check_refusal(await http.request(method, path), (405,))


async def test_unknown_fields_name_the_nearest(http):
    answer = await http.post("/v1/completions", json={**GOOD, "temprature": 1})
    assert "'temperature'" in answer.json()["error"]["message"]
    answer = await http.post("/v1/completions", json={**GOOD, "model": "other"})
    check_refusal(answer, (404,))


async def raw(server, data, within_s=WAIT_S):
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    writer.write(data)
    try:
        async with asyncio.timeout(within_s):
            return await reader.read()
    finally:
        writer.close()


async def test_malformed_http(server, http):
    start, end = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: ", b"\r\n\r\n"
    for data, status in (
        (b"hello" + end, b"400"),
        (b"GET / HTTP/1.1" + end, b"400"),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx\0y: 1" + end, b"400"),
        (start + b"y" * 65536 + end, b"431"),
        (start + b"y" * 33_000, b"431"),
        (b"GET /" + b"y" * 65536 + start[11:] + end, b"431"),
        (start + b"\r\na: b" * 2000 + end, b"431"),
        (start + b"\r\na: b" * 200 + end, b"200"),
    ):
        answer = await raw(server, data)
        assert answer.split(b" ")[1] == status, data[:40]
        told = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert status == b"200" or told["error"]["type"] == "invalid_request_error"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    for length in (b"content-length: -1", b"content-length: 1\r\ncontent-length: 2", b"transfer-encoding: what"):
        assert (await raw(server, head + length + b"\r\n\r\n{}")).split(b" ")[1] in (b"400", b"501")
    await check_alive(http)


async def test_slow_clients_are_cut(start, monkeypatch):
    monkeypatch.setattr("serving.http.server.HEAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr("serving.http.server.KEEP_ALIVE_S", 0.2)
    monkeypatch.setattr("serving.http.edge.BODY_TIMEOUT_S", 0.2)
    async with start() as server:
        assert await raw(server, b"POST /v1/comp") == b""
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        head += b"content-type: application/json\r\ncontent-length: 10\r\n\r\n"
        assert (await raw(server, head + b"{")).startswith(b"HTTP/1.1 408")
        monkeypatch.undo()
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
            await check_alive(http)


def random_json(rng, depth=0):
    scalars = [None, True, False, 0, -1, 1, 2**31, 2**63, 1e308, -0.5, "", "a", "🦊", "\0", "1", "x" * 300]
    kind = rng.random()
    if depth > 3 or kind < 0.6:
        return rng.choice(scalars)
    if kind < 0.8:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = ["role", "content", "type", "text", "include_usage", "5", "-1", "x"]
    return {rng.choice(keys): random_json(rng, depth + 1) for _ in range(rng.randrange(4))}


def random_body(rng):
    """A good body with some fields spoilt, and sometimes with its bytes spoilt too."""
    base = dict(rng.choice([GOOD, CHAT, RESPONSE, MESSAGE, {"tokens": [1]}]))
    names = [*SAMPLING, "prompt", "messages", "tokens", "max_completion_tokens", "top_logprobs", "x" * rng.randrange(9)]
    names += [
        "input",
        "instructions",
        "text",
        "reasoning",
        "metadata",
        "system",
        "thinking",
        "tool_choice",
        "output_config",
    ]
    for name in rng.sample(names, rng.randrange(4)):
        base[name] = random_json(rng)
    body = bytearray(json.dumps(base, ensure_ascii=rng.random() < 0.5).encode())
    for _ in range(rng.choice([0, 0, 0, 1, 5])):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return bytes(body)


async def test_two_thousand_random_bodies(server):
    rng = random.Random(7)
    transport = httpx.ASGITransport(server.gateway.http.server.config.app)
    codes = {}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        for _ in range(2000):
            body = random_body(rng)
            answer = await http.post(rng.choice(PATHS), content=body, headers=JSON)
            assert answer.status_code in (200, 400, 404), (body, answer.text)
            assert not LEAK.search(answer.text) or answer.status_code == 200, (body, answer.text)
            codes[answer.status_code] = codes.get(answer.status_code, 0) + 1
    assert codes[200] > 40
    assert codes[400] > 1000
    assert not server.engine.held
