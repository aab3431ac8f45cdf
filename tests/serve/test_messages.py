"""POST /v1/messages and its count_tokens: the order of all events, errors in Anthropic's shape, and both headers with a key.

Anthropic's client itself, where it is installed: test_anthropic.py.
"""

import json

import httpx
import pytest
from fake import FakeEngine
from scripted import ScriptedEngine

from tests.waiting import WAIT_S, eventually
from trinity.errors import Overloaded, Unavailable

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "weather", "description": "It knows.", "input_schema": SCHEMA}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "dog"}}\n</tool_call>'
SAID = f"<think>\nHm the fox.\n</think>\n\nI look.\n{HERMES}\n{HERMES}"
QUESTION = {"role": "user", "content": "What is the weather?"}
ASKED = {"messages": [QUESTION], "max_tokens": 500}
URL, COUNT = "/v1/messages", "/v1/messages/count_tokens"
KEY = "correct-horse-battery"


def http_of(server, **options):
    return httpx.AsyncClient(base_url=server.url, timeout=WAIT_S, **options)


def events_of(text):
    """The events of a stream; each is named twice."""
    out = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        out.append(event)
    return out


START, DELTA, STOP = "content_block_start", "content_block_delta", "content_block_stop"
FULL = [  # as Anthropic's documentation has them
    *("message_start", (START, "thinking"), (DELTA, "thinking_delta"), (DELTA, "signature_delta"), STOP),
    *((START, "text"), (DELTA, "text_delta"), STOP),
    *((START, "tool_use"), (DELTA, "input_json_delta"), STOP) * 2,
    *("message_delta", "message_stop"),
]


def name_of(event):
    inner = event.get("content_block") or event.get("delta", {})
    return (event["type"], inner["type"]) if "type" in inner else event["type"]


@pytest.mark.parametrize("per_step", [1, 4, 1000])
async def test_events_come_in_order_and_complete(start, per_step):
    engine = ScriptedEngine(SAID, SAID, per_step=per_step)
    async with start(engine, reasoning_format="think") as server, http_of(server) as http:
        asked = ASKED | {"tools": [WEATHER]}
        whole = (await http.post(URL, json=asked)).json()
        events = events_of((await http.post(URL, json=asked | {"stream": True})).text)
        counted = (await http.post(COUNT, json={"messages": [QUESTION], "tools": [WEATHER]})).json()
    names = list(map(name_of, events))
    assert [name for i, name in enumerate(names) if not (name[0] == DELTA and names[i - 1] == name)] == FULL
    assert [event["index"] for event in events if event["type"] == START] == [0, 1, 2, 3]
    head = events[0]["message"]
    assert (head["role"], head["content"], head["stop_reason"]) == ("assistant", [], None)
    assert head["usage"]["input_tokens"] == whole["usage"]["input_tokens"] == counted["input_tokens"]
    thinking, text, *calls = whole["content"]
    assert (thinking["type"], thinking["thinking"], bool(thinking["signature"])) == ("thinking", "Hm the fox.", True)
    assert text == {"type": "text", "text": "I look."}
    assert [(call["name"], call["input"]) for call in calls] == [("weather", {"city": "dog"})] * 2
    assert len({call["id"] for call in calls}) == 2
    for index, block in enumerate(whole["content"]):
        deltas = [event["delta"] for event in events if event["type"] == DELTA and event["index"] == index]
        told = "".join(d.get("text", "") + d.get("thinking", "") + d.get("partial_json", "") for d in deltas)
        assert (json.loads(told) if "input" in block else told) == block.get("input", block.get("text", "Hm the fox."))
    end = events[-2]
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert (whole["stop_reason"], whole["usage"]) == ("tool_use", end["usage"])
    thought = len(engine.tokenizer.encode("\nHm the fox.\n"))
    assert end["usage"]["output_tokens_details"] == {"thinking_tokens": thought}


async def test_history_goes_back_as_it_came(start):
    """The blocks of an answer, and the tools' results before what the user says beside them."""
    engine = ScriptedEngine(f"<think>fox</think>I look.{HERMES}", "Rain.", "Rain.")
    async with start(engine, reasoning_format="think") as server, http_of(server) as http:
        first = (await http.post(URL, json=ASKED | {"tools": [WEATHER]})).json()
        call = first["content"][-1]
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "rain"}]}
        said = [{"type": "text", "text": "go"}, {"type": "text", "text": "on", "cache_control": {"type": "ephemeral"}}]
        redacted = {"type": "redacted_thinking", "data": "abc"}
        messages = [
            *(QUESTION, {"role": "assistant", "content": [redacted, *first["content"]]}),
            {"role": "user", "content": [*said, result | {"is_error": True}]},
        ]
        system = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
        asked = ASKED | {"messages": messages, "system": system, "tools": [WEATHER]}
        answer = (await http.post(URL, json=asked)).json()
        assert (answer["stop_reason"], answer["content"][0]["text"]) == ("end_turn", "Rain.")
        large = [{"type": "text", "text": ""}] * 3000  # read elsewhere, to the same end
        assert (await http.post(URL, json=asked | {"system": system + large})).status_code == 200
    second, third = engine.prompts[1:]
    assert "<|im_start|>system\nBe short." in second
    assert 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "dog"}}' in second
    assert second.index("<tool_response>\nError: rain\n</tool_response>") < second.index("go\non<|im_end|>")
    assert third == second


async def test_why_an_answer_ended(start):
    engine = ScriptedEngine("the quick brown fox", "the quick brown fox", HERMES)
    async with start(engine) as server, http_of(server) as http:
        ends = [
            (await http.post(URL, json=ASKED | more)).json() for more in ({}, {"max_tokens": 2}, {"tools": [WEATHER]})
        ]
    assert [end["stop_reason"] for end in ends] == ["end_turn", "max_tokens", "tool_use"]
    assert {end["stop_sequence"] for end in ends} == {None}


async def test_a_stop_sequence_is_named(start):
    class Stopped(ScriptedEngine):
        async def generate(self, *asked):
            async for delta in super().generate(*asked):
                yield type(delta)(**vars(delta) | {"stop_reason": "brown"}) if delta.finish_reason else delta

    async with start(Stopped("the quick ")) as server, http_of(server) as http:
        answer = (await http.post(URL, json=ASKED | {"stop_sequences": ["brown"]})).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "brown")


async def test_arguments_that_are_no_object_are_one(start):
    said = '<tool_call>\n{"name": "weather", "arguments": [1]}\n</tool_call>'
    async with start(ScriptedEngine(said)) as server, http_of(server) as http:
        answer = (await http.post(URL, json=ASKED | {"tools": [WEATHER]})).json()
    assert all(isinstance(block["input"], dict) for block in answer["content"] if block["type"] == "tool_use")


async def test_the_last_message_of_the_assistant_is_gone_on_with(start):
    async with start(ScriptedEngine(" and more")) as server, http_of(server) as http:
        said = {"role": "assistant", "content": "So far"}
        assert (await http.post(URL, json=ASKED | {"messages": [QUESTION, said]})).status_code == 200
    assert server.engine.prompts[0].endswith("<|im_start|>assistant\nSo far")


@pytest.mark.parametrize(
    ("thinking", "shown", "asked"),
    [
        (None, True, ""),
        ({"type": "enabled", "budget_tokens": 1024}, True, "True"),
        ({"type": "adaptive", "display": "omitted"}, False, "True"),
        ({"type": "disabled"}, False, "False"),
    ],
)
async def test_thinking(start, monkeypatch, thinking, shown, asked):
    engine = ScriptedEngine("<think>fox</think>dog")
    async with start(engine, reasoning_format="think") as server, http_of(server) as http:
        monkeypatch.setattr(server.front.tokenizer, "chat_template", "{{ messages[0].content }}|{{ enable_thinking }}")
        answer = (await http.post(URL, json=ASKED | {"thinking": thinking})).json()
    assert [block["type"] for block in answer["content"]] == ["thinking", "text"][not shown :]
    assert engine.prompts[0].endswith(f"|{asked}")
    assert engine.seen[0].thinking_token_budget == (thinking or {}).get("budget_tokens")


@pytest.mark.parametrize("num", [0, 12])
async def test_failures(start, num):
    engine = FakeEngine(fail_after=num, error=Overloaded("the queue is full", retry_after_s=2))
    async with start(engine) as server, http_of(server) as http:
        sent = await http.post(URL, json=ASKED | {"stream": True})
        told = events_of(sent.text)[-1] if num else sent.json()
        assert (told["type"], told["error"]["type"]) == ("error", "rate_limit_error")
        assert told["error"]["message"] == "the queue is full"
        assert told["request_id"] == sent.headers["x-request-id"]
        assert sent.status_code == (200 if num else 429)
        assert num or sent.headers["retry-after"] == "2"
        assert not engine.held


async def test_errors_have_anthropics_shape_on_their_paths_alone(start):
    engine = FakeEngine(fail_after=0, error=Unavailable("a shard is gone"))
    async with start(engine, max_body_bytes=2048) as server, http_of(server) as http:

        async def kind(path=URL, **sent):
            answer = await http.post(path, **sent)
            assert answer.headers["x-request-id"]
            return answer.status_code, answer.json()["error"]["type"], answer.json().get("type")

        assert await kind(json=ASKED) == (503, "overloaded_error", "error")
        assert await kind(json=ASKED | {"model": "other"}) == (404, "not_found_error", "error")
        assert await kind(json=ASKED | {"system": "x" * 4096}) == (413, "request_too_large", "error")
        assert await kind(content="{}") == (415, "invalid_request_error", "error")
        assert await kind(URL + "/batches", json={}) == (404, "not_found_error", "error")
        assert (await http.get(URL)).json()["error"]["type"] == "invalid_request_error"
        assert await kind("/v1/responses", json={"input": "a"}) == (503, "service_unavailable_error", None)


async def test_a_key_comes_with_either_header(start):
    async with start(ScriptedEngine(*["ok"] * 9), api_key=KEY) as server, http_of(server) as http:
        bearer, plain = {"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}
        for headers in (bearer, plain, bearer | plain):
            assert (await http.post(URL, json=ASKED, headers=headers)).status_code == 200
            assert (await http.get("/v1/models", headers=headers)).status_code == 200
        for headers in ({}, {"x-api-key": KEY + "x"}, {"x-api-key": f"Bearer {KEY}"}, {"x-api-key": ""}):
            refused = await http.post(URL, json=ASKED, headers=headers)
            assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        for headers in (bearer | {"x-api-key": "other"}, plain | {"authorization": "Bearer other"}):
            refused = await http.post(URL, json=ASKED, headers=headers)
            assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
            assert "differ" in refused.json()["error"]["message"]
        twice = [("x-api-key", KEY), ("x-api-key", KEY)]
        assert (await http.post(URL, json=ASKED, headers=twice)).status_code == 400


async def test_clients_that_leave_free_the_engine(start):
    engine = FakeEngine(delay_s=0.01, max_model_len=10_000)
    async with start(engine) as server, http_of(server) as http:
        async with http.stream("POST", URL, json=ASKED | {"max_tokens": 9000, "stream": True}) as answer:
            assert await anext(answer.aiter_lines())
            assert engine.held
        await eventually(lambda: not engine.held and not server.front.admission.active)


USER = {"role": "user"}
REFUSED = [  # -> what the error says
    ({"max_tokens": None}, "max_tokens: Field required"),
    ({"max_tokens": 0}, "max_tokens: should be greater"),
    ({"stop_sequence": ["x"]}, "did you mean 'stop_sequences'?"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences: "),
    ({"temprature": 1}, "did you mean 'temperature'?"),
    ({"container": "c"}, "unknown field 'container'"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
    ({"tools": [{"name": "f"}]}, "Field required"),
    ({"tool_choice": {"type": "any"}}, "there are no tools"),
    ({"tool_choice": {"type": "some"}}, "'none'"),
    ({"thinking": {"type": "much"}}, "'adaptive'"),
    ({"messages": []}, "messages: List should have at least 1 item"),
    ({"messages": [{**USER, "content": [{"type": "image", "source": {}}]}]}, "'image'"),
    ({"messages": [{**USER, "content": [{"type": "tool_use", "id": "a", "name": "f"}]}]}, "no block of type tool_use"),
    ({"messages": [{**USER, "content": [{"type": "thinking", "thinking": "a"}]}]}, "no block of type thinking"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "'assistant'"),
    ({"messages": [{**USER, "content": [{"type": "text", "text": "a", "what": 1}]}]}, "unknown field"),
    (
        {"messages": [QUESTION, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f"}]}]},
        "continued",
    ),
]


@pytest.mark.parametrize(("more", "said"), REFUSED, ids=range(len(REFUSED)))
async def test_what_is_refused_says_why(http, more, said):
    answer = await http.post(URL, json=ASKED | more)
    assert (answer.status_code, answer.json()["type"]) == (400, "error"), answer.text
    assert said in answer.json()["error"]["message"]


async def test_what_clients_send_without_effect_is_counted(start):
    body = ASKED | {
        "metadata": {"user_id": "u"},
        "context_management": {"edits": []},
        "service_tier": "auto",
        "max_tokens": 2,
    }
    tool = WEATHER | {"cache_control": {"type": "ephemeral"}, "eager_input_streaming": True}
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
    async with start(ScriptedEngine("ok")) as server, http_of(server) as http:
        assert (await http.post(f"{URL}?beta=true", json=body | {"tools": [tool]}, headers=headers)).status_code == 200
        told = (await http.get("/metrics")).text
    for field in ("metadata", "context_management", "service_tier"):
        assert f'trinity_ignored_fields_total{{field="{field}"}} 1.0' in told


async def test_a_format_and_calls_that_have_to_be_made_reach_the_engine(start):
    engine = ScriptedEngine(*["{}"] * 3)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    async with start(engine, tool_format="hermes") as server, http_of(server) as http:
        for more in (
            {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
            {"tools": [WEATHER], "tool_choice": {"type": "any"}},
            {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}},
        ):
            answer = await http.post(URL, json=ASKED | more)
            assert answer.status_code == 200, answer.text
    by_schema, *forced = [seen.structured_outputs for seen in engine.seen]
    assert (by_schema.kind, by_schema.is_closed, json.loads(by_schema.text)) == ("json", True, schema)
    assert {each.kind for each in forced} == {"tools"}
