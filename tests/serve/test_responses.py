"""POST /v1/responses: OpenAI's client unmodified over engines that say what they are told, and the order of all events."""

import json

import httpx
import openai
import pytest
from fake import FakeEngine
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted import ScriptedEngine

from tests.waiting import WAIT_S, eventually
from trinity.errors import Overloaded

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "name": "weather", "description": "It knows.", "parameters": PARAMETERS, "strict": False}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "dog"}}\n</tool_call>'
SAID = f"<think>\nHm the fox.\n</think>\n\nI look.\n{HERMES}\n{HERMES}"
EVENTS = TypeAdapter(ResponseStreamEvent)
URL = "/v1/responses"


def client_of(server):
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def http_of(server):
    return httpx.AsyncClient(base_url=server.url, timeout=WAIT_S)


def events_of(text):
    """The events of a stream; each is named twice, and there is nothing else."""
    out = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        out.append(event)
    return out


async def respond(client, stream, **asked):
    if not stream:
        return await client.responses.create(model="fake", **asked)
    async with client.responses.stream(model="fake", **asked) as events:
        return await events.get_final_response()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_calls_a_tool_and_answers(start, stream):
    """The loop of OpenAI's documentation: the items of the output go back as they came."""
    engine = ScriptedEngine(f"I look.\n{HERMES}", "It rains.", per_step=3)
    async with start(engine) as server, client_of(server) as client:
        given = [{"role": "user", "content": "What is the weather?"}]
        about = {"instructions": "Be short.", "tools": [WEATHER]}
        answer = await respond(client, stream, input=given, **about)
        assert (answer.output_text, answer.status) == ("I look.", "completed")
        [call] = [item for item in answer.output if item.type == "function_call"]
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "dog"})
        given += [*answer.output, {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
        answer = await respond(client, stream, input=given, **about)
        assert (answer.output_text, len(answer.output)) == ("It rains.", 1)
        assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    first, second = engine.prompts
    assert "Be short." in first
    assert '"name": "weather"' in first
    assert 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "dog"}}' in second
    assert "<tool_response>\nrain\n</tool_response>" in second


FULL = [
    *("response.created", "response.in_progress", "response.output_item.added"),
    *("response.reasoning_text.delta", "response.reasoning_text.done", "response.output_item.done"),
    *("response.output_item.added", "response.content_part.added", "response.output_text.delta"),
    *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
    *(
        *("response.output_item.added", "response.function_call_arguments.delta"),
        *("response.function_call_arguments.done", "response.output_item.done"),
    )
    * 2,
    "response.completed",
]


@pytest.mark.parametrize("per_step", [1, 4, 1000])
async def test_events_come_in_order_and_complete(start, per_step):
    engine = ScriptedEngine(SAID, per_step=per_step)
    async with start(engine, reasoning_format="think") as server, http_of(server) as http:
        asked = {"input": "What is the weather?", "tools": [WEATHER], "metadata": {"a": "b"}, "stream": True}
        events = events_of((await http.post(URL, json=asked)).text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENTS.validate_python(event)
    types = [event["type"] for event in events]
    assert [name for i, name in enumerate(types) if not (name.endswith("delta") and types[i - 1] == name)] == FULL
    reasoning, message, *calls = output = events[-1]["response"]["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm the fox."}]
    assert message["content"][0]["text"] == "I look."
    assert [json.loads(call["arguments"]) for call in calls] == [{"city": "dog"}] * 2
    assert len({call["call_id"] for call in calls}) == 2
    assert {item["status"] for item in output} == {"completed"}
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == output
    for index, item in enumerate(output):
        own = [event for event in events if event.get("output_index") == index]
        assert {event["item_id"] for event in own if "item_id" in event} == {item["id"]}
        text = item.get("arguments") or item["content"][0]["text"]
        assert "".join(event["delta"] for event in own if event["type"].endswith(".delta")) == text
    thought = len(engine.tokenizer.encode("\nHm the fox.\n"))
    assert events[-1]["response"]["usage"]["output_tokens_details"] == {"reasoning_tokens": thought}
    assert events[-1]["response"]["metadata"] == {"a": "b"}


async def test_the_whole_is_what_the_stream_ends_with(start):
    async with start(ScriptedEngine(SAID, SAID), reasoning_format="think") as server, http_of(server) as http:
        asked = {"input": "What is the weather?", "tools": [WEATHER], "temperature": 0.5, "store": True}
        whole = (await http.post(URL, json=asked)).json()
        streamed = events_of((await http.post(URL, json=asked | {"stream": True})).text)[-1]["response"]
    TypeAdapter(Response).validate_python(whole)
    assert (whole["store"], whole["temperature"], whole["object"]) == (False, 0.5, "response")
    random = {"id", "call_id", "created_at"}

    def fixed(value):
        if isinstance(value, dict):
            return {key: fixed(each) for key, each in value.items() if key not in random}
        return [fixed(each) for each in value] if isinstance(value, list) else value

    assert fixed(whole) == fixed(streamed)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cut_answer_is_incomplete(start, stream):
    async with start(ScriptedEngine("the quick brown fox")) as server, http_of(server) as http:
        sent = await http.post(URL, json={"input": "a", "max_output_tokens": 3, "stream": stream})
    answer = events_of(sent.text)[-1]["response"] if stream else sent.json()
    assert not stream or events_of(sent.text)[-1]["type"] == "response.incomplete"
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["usage"]["output_tokens"] == 3


@pytest.mark.parametrize("num", [0, 12])
async def test_failures(start, num):
    """Before the first token they have their status; later ones are the event that ends the stream."""
    engine = FakeEngine(fail_after=num, error=Overloaded("the queue is full"))
    async with start(engine) as server, client_of(server) as client, http_of(server) as http:
        sent = await http.post(URL, json={"input": "the fox", "stream": True})
        if not num:
            assert (sent.status_code, sent.json()["error"]["type"]) == (429, "rate_limit_error")
            return
        *_, last = events_of(sent.text)
        EVENTS.validate_python(last)
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        assert last["response"]["error"]["code"] == "rate_limit_exceeded"
        assert last["response"]["output"][0]["status"] == "incomplete"
        stream = await client.responses.create(model="fake", input="the fox", stream=True)
        assert [event.type async for event in stream][-1] == "response.failed"
        assert (await http.post(URL, json={"input": "the fox"})).status_code == 429
        assert not engine.held


async def test_clients_that_leave_free_the_engine(start):
    engine = FakeEngine(delay_s=0.01, max_model_len=10_000)
    async with start(engine) as server, http_of(server) as http:
        async with http.stream("POST", URL, json={"input": "the fox", "stream": True}) as answer:
            assert await anext(answer.aiter_lines())
            assert engine.held
        await eventually(lambda: not engine.held and not server.front.admission.active)


REFUSED = {
    "previous_response_id": ("resp_1", "items of `input`"),
    "conversation": ("conv_1", "items of `input`"),
    "background": (True, "stream"),
    "truncation": ("auto", "leave old items out"),
    "top_logprobs": (2, "/v1/chat/completions"),
    "include": (["message.output_text.logprobs"], "/v1/chat/completions"),
    "tools": ([{"type": "web_search"}], "'web_search'"),
    "tool_choice": ("required", "no tools"),
    "max_output_tokens": (0, "greater than or equal to 1"),
    "max_tokens": (5, "'max_output_tokens'"),
    "instruction": ("x", "'instructions'"),
    "temperature": (-1, "greater than or equal to 0"),
    "n": (2, "unknown field"),
    "carried": ({}, "unknown field"),
    "metadata": ({"a": 1}, "string"),
    "reasoning": ({"effort": "much"}, "'medium'"),
    "text": ({"format": {"type": "xml"}}, "'json_schema'"),
    "model": (1, "string"),
    "input": ([{"type": "item_reference", "id": "x"}], "cannot be referred to"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_refused_says_why(http, name):
    value, said = REFUSED[name]
    answer = await http.post(URL, json={"input": "a", name: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].split(".")[0] == name
    assert said in error["message"]


BAD_ITEMS = [
    *(1, {"role": "robot", "content": "x"}, {"role": "user"}, {"role": "user", "content": "x", "what": 1}),
    {"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1"}]},
    *({"type": "function_call", "name": "f"}, {"type": "function_call_output", "call_id": "c"}),
]


async def test_bad_items(http):
    for given in (1, [], [[]], *([item] for item in BAD_ITEMS)):
        answer = await http.post(URL, json={"input": given})
        assert answer.status_code == 400, given
        assert answer.json()["error"]["param"].split(".")[0] == "input"


async def test_items_of_one_turn_are_one_message(start):
    """Reasoning, text and calls that follow each other; and what other servers add to them is ignored."""
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{'a'", "status": "completed"}
    given = [
        {"role": "developer", "content": "and kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "lazy "}, {"type": "input_text", "text": "dog"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "fox"}],
            "encrypted_content": "x",
        },
        {"type": "message", "role": "assistant", "content": "So", "phase": "commentary", "id": "msg_1"},
        *(call, call),
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "ok"}]},
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "x"},
    ]
    async with start(ScriptedEngine("ok"), reasoning_format="think") as server, http_of(server) as http:
        answer = await http.post(URL, json={"input": given, "instructions": "Be short"})
        assert answer.status_code == 200, answer.text
    [prompt] = server.engine.prompts
    assert "<|im_start|>system\nBe short\n\nand kind.<|im_end|>" in prompt
    assert "<|im_start|>user\nlazy dog<|im_end|>" in prompt
    turns = [turn.partition("<|im_end|>")[0] for turn in prompt.split("<|im_start|>assistant\n")[1:-1]]
    assert [turn.count("<tool_call>") for turn in turns] == [2, 0, 0]
    assert [turn[-3:] for turn in turns[1:]] == ["one", "two"]
    assert "So" in turns[0]


async def test_fields_without_effect_are_counted(http):
    body = {"input": "a", "user": "u", "prompt_cache_key": "k", "client_metadata": {"x": "y"}, "max_output_tokens": 2}
    assert (await http.post(URL, json=body)).status_code == 200
    assert (await http.post(URL, json=body | {"input": "a" * 20, "metadata": {"a": "x" * 500}})).status_code == 200
    chat = {"messages": [{"role": "user", "content": "a"}], "user": "u", "max_tokens": 2}
    assert (await http.post("/v1/chat/completions", json=chat)).status_code == 200
    told = (await http.get("/metrics")).text
    for field, num in (("user", 3), ("prompt_cache_key", 2), ("client_metadata", 2)):
        assert f'trinity_ignored_fields_total{{field="{field}"}} {num}.0' in told
    assert 'field="metadata"' not in told


async def test_every_field_reaches_the_engine(http, server):
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 7, "stop": ["z"], "ignore_eos": True}
    body = {"input": "a", "max_output_tokens": 4, **sampling}
    assert (await http.post(URL, json=body)).status_code == 200
    [seen] = server.engine.seen
    assert {name: getattr(seen, name) for name in sampling} == sampling | {"stop": ("z",)}
    assert seen.max_tokens == 4


async def test_a_format_and_calls_that_have_to_be_made_are_a_chats(start):
    """What the engine is asked for is what the same chat asks for."""
    engine = ScriptedEngine(*["{}"] * 4)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"name": "x", "schema": schema, "strict": True}
    chat = {"messages": [{"role": "user", "content": "a"}]}
    tool = {"type": "function", "function": {key: value for key, value in WEATHER.items() if key != "type"}}
    async with start(engine, tool_format="hermes") as server, http_of(server) as http:
        for path, body in (
            (URL, {"input": "a", "text": {"format": {"type": "json_schema", **form}}}),
            ("/v1/chat/completions", chat | {"response_format": {"type": "json_schema", "json_schema": form}}),
            (URL, {"input": "a", "tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}}),
            ("/v1/chat/completions", chat | {"tools": [tool], "tool_choice": {"function": {"name": "weather"}}}),
        ):
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, answer.text
    by_door, by_chat, call_by_door, call_by_chat = [seen.structured_outputs for seen in engine.seen]
    assert by_door == by_chat is not None
    assert call_by_door == call_by_chat is not None
