"""Calls of tools and reasoning through the server, with OpenAI's client and gRPC, over engines that say what they are told."""

import json

import grpc
import httpx
import openai
import pytest
from scripted import ScriptedEngine

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from tests.waiting import WAIT_S
from trinity.text.conversation import MAX_TOOLS

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "It knows.", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
QUESTION = {"role": "user", "content": "What is the weather?"}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "the lazy dog", "days": 2}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nthe lazy dog\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n</tool_call>"
)
GLM = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>the lazy dog</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>"
)
FORMATS = {"hermes": HERMES, "qwen3_coder": XML, "glm": GLM}


def client_of(server):
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def http_of(server):
    return httpx.AsyncClient(base_url=server.url, timeout=WAIT_S)


async def ask(client, stream, messages, **more):
    """-> the message, as the client puts it together, and the reason of its end."""
    asked = {"model": "fake", "messages": messages, "tools": [WEATHER, NOW], **more}
    if not stream:
        choice = (await client.chat.completions.create(**asked)).choices[0]
        return choice.message, choice.finish_reason
    async with client.chat.completions.stream(**asked) as events:
        choice = (await events.get_final_completion()).choices[0]
    return choice.message, choice.finish_reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FORMATS)
async def test_an_agent_calls_a_tool_and_answers(start, name, stream):
    """The loop of OpenAI's documentation: the message goes back as it came."""
    engine = ScriptedEngine(f"I look.\n{FORMATS[name]}", "Two days of rain.", per_step=3)
    async with start(engine, tool_format=name) as server, client_of(server) as client:
        messages = [QUESTION]
        message, reason = await ask(client, stream, messages)
        assert (message.content, reason) == ("I look.", "tool_calls")
        [call] = message.tool_calls
        assert (call.type, call.function.name) == ("function", "weather")
        assert json.loads(call.function.arguments) == {"city": "the lazy dog", "days": 2}
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
        message, reason = await ask(client, stream, messages)
        assert (message.content, reason, message.tool_calls or None) == ("Two days of rain.", "stop", None)
    first, second = engine.prompts
    assert '"name": "weather"' in first
    assert 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "the lazy dog", "days": 2}}' in second
    assert "<tool_response>\nrain\n</tool_response>" in second


@pytest.mark.parametrize("per_step", [1, 4, 1000])
async def test_chunks_hold_one_thing_each(start, per_step):
    said = f"<think>\nHm the fox.\n</think>\n\nSo: \n{HERMES}\n{HERMES}"
    engine = ScriptedEngine(said, per_step=per_step)
    async with start(engine, reasoning_format="think") as server, http_of(server) as http:
        body = {"messages": [QUESTION], "tools": [WEATHER], "stream": True, "stream_options": {"include_usage": True}}
        lines = (await http.post("/v1/chat/completions", json=body)).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    *choices, [] = [chunk["choices"] for chunk in chunks]
    deltas = [choice[0]["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(
        set(delta) in ({"content"}, {"reasoning", "reasoning_content"}, {"tool_calls"}, set()) for delta in deltas[1:]
    )
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "Hm the fox."
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm the fox."
    assert "".join(delta.get("content", "") for delta in deltas) == "So:"
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", [])]
    assert all(len(delta["tool_calls"]) == 1 for delta in deltas if "tool_calls" in delta)
    first = [piece for piece in pieces if "id" in piece]
    assert [(piece["index"], piece["type"], piece["function"]) for piece in first] == [
        (index, "function", {"name": "weather", "arguments": ""}) for index in (0, 1)
    ]
    assert first[0]["id"] != first[1]["id"]
    others = [piece for piece in pieces if "id" not in piece]
    assert all(set(piece) == {"index", "function"} and set(piece["function"]) == {"arguments"} for piece in others)
    for index in (0, 1):
        told = "".join(piece["function"]["arguments"] for piece in pieces if piece["index"] == index)
        assert told == '{"city": "the lazy dog", "days": 2}'
    assert [choice[0]["finish_reason"] for choice in choices if choice[0]["finish_reason"]] == ["tool_calls"]
    thought = len(engine.tokenizer.encode("\nHm the fox.\n"))
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}


async def test_a_call_that_is_none_is_text(start):
    for said in ('<tool_call>\n{"name": 1}\n</tool_call>', "<tool_call>\n{'name': 'weather'}", "<tool_call>"):
        for stream in (False, True):
            async with start(ScriptedEngine(said)) as server, client_of(server) as client:
                message, reason = await ask(client, stream, [QUESTION])
            assert (message.content, reason, message.tool_calls or None) == (said, "stop", None)


async def test_an_answer_that_is_cut_in_a_call_says_length(start):
    async with start(ScriptedEngine(HERMES)) as server, client_of(server) as client:
        size = len(server.front.tokenizer.encode(HERMES.partition("lazy")[0]))
        message, reason = await ask(client, False, [QUESTION], max_tokens=size)
    assert reason == "length"
    assert message.tool_calls[0].function.arguments == '{"city": "the '


async def test_without_tools_calls_are_text_and_nothing_is_held_back(start):
    engine = ScriptedEngine(HERMES, HERMES)
    async with start(engine) as server, client_of(server) as client:
        for more in ({"tools": openai.NOT_GIVEN}, {"tool_choice": "none"}):
            message, reason = await ask(client, False, [QUESTION], **more)
            assert (message.content, reason, message.tool_calls) == (HERMES, "stop", None)
    assert not any("# Tools" in prompt for prompt in engine.prompts)


async def test_one_call_at_most(start):
    async with start(ScriptedEngine(HERMES + HERMES)) as server, client_of(server) as client:
        message, _ = await ask(client, False, [QUESTION], parallel_tool_calls=False)
    assert len(message.tool_calls) == 1


async def test_every_choice_has_its_calls(start):
    async with start(ScriptedEngine(HERMES, "No.", HERMES)) as server, client_of(server) as client:
        answer = await client.chat.completions.create(model="fake", messages=[QUESTION], tools=[WEATHER], n=3)
    assert sorted(choice.finish_reason for choice in answer.choices) == ["stop", "tool_calls", "tool_calls"]
    calls = [choice.message.tool_calls[0].id for choice in answer.choices if choice.message.tool_calls]
    assert len(set(calls)) == 2


@pytest.mark.parametrize("include", [True, False])
async def test_reasoning_has_both_names_or_is_left_out(start, include):
    engine = ScriptedEngine("<think>fox</think>dog")
    async with start(engine, reasoning_format="think") as server, client_of(server) as client:
        message, _ = await ask(client, False, [QUESTION], extra_body={"include_reasoning": include})
    told = "fox" if include else None
    assert (message.content, message.reasoning, message.reasoning_content) == ("dog", told, told)


DEEP = json.loads('{"a":' * 40 + "1" + "}" * 40)
BAD = {
    "no name": {"tools": [{"type": "function", "function": {}}]},
    "an odd name": {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    "two of a name": {"tools": [NOW, NOW]},
    "another kind": {"tools": [{"type": "web_search"}]},
    "too many": {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(MAX_TOOLS + 1)]},
    "too deep": {"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]},
    "too large": {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 300_000}}]},
    "parameters that are a list": {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
    "required, of none": {"tool_choice": "required"},
    "named, unknown": {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "later"}}},
    "an unknown choice": {"tools": [NOW], "tool_choice": "some"},
    "effort": {"reasoning_effort": "much"},
    "the template's own names": {"chat_template_kwargs": {"messages": []}},
    "deep arguments": {"chat_template_kwargs": {"a": [[[[[[[[[[]]]]]]]]]]}},
    "large arguments": {"chat_template_kwargs": {"a": "x" * 300_000}},
    "arguments that are a list": {"chat_template_kwargs": [1]},
    "documents": {"documents": ["text"]},
    "nothing to go on with": {"continue_final_message": True},
    "two wishes": {
        "messages": [QUESTION, {"role": "assistant", "content": "a"}],
        "continue_final_message": True,
        "add_generation_prompt": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
async def test_bad_requests(http, name):
    answer = await http.post("/v1/chat/completions", json={"messages": [QUESTION], **BAD[name]})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].split(".")[0] in (*BAD[name], "messages")
    assert 10 < len(error["message"]) < 300


async def test_tools_need_a_template_that_shows_them(start):
    async with start(ScriptedEngine(), tool_format="none") as server, http_of(server) as http:
        answer = await http.post("/v1/chat/completions", json={"messages": [QUESTION], "tools": [NOW]})
    assert answer.status_code == 400
    assert "serve.tool_format" in answer.json()["error"]["message"]


SAID = {"role": "assistant", "content": "hello"}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "dog"}'}}


def with_arguments(text):
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{**CALLED, "function": {"name": "weather", "arguments": text}}],
    }


SENT_BACK = {  # an assistant's message -> what the prompt has of it
    "refusal null": ({**SAID, "refusal": None}, "hello"),
    "a refusal": ({"role": "assistant", "content": None, "refusal": "never"}, "never"),
    "a part that refuses": ({"role": "assistant", "content": [{"type": "refusal", "refusal": "never"}]}, "never"),
    "calls empty": ({**SAID, "tool_calls": []}, "hello"),
    "calls null": ({**SAID, "tool_calls": None, "function_call": None, "audio": None}, "hello"),
    "annotations": ({**SAID, "annotations": []}, "hello"),
    "an id": ({**SAID, "id": "msg_1"}, "hello"),
    "content null": ({"role": "assistant", "content": None}, ""),
    "content absent": ({"role": "assistant"}, ""),
    "unknown and empty": ({**SAID, "what": None, "this": [], "that": {}, "such": ""}, "hello"),
    "another server's": ({**SAID, "reasoning_details": [{"text": "x"}], "provider_specific_fields": {"a": 1}}, "hello"),
    "a call": ({"role": "assistant", "tool_calls": [CALLED]}, '{"name": "weather", "arguments": {"city": "dog"}}'),
    "a call as it streamed": (
        {"role": "assistant", "content": "", "tool_calls": [{**CALLED, "index": 0}]},
        '{"name": "weather", "arguments": {"city": "dog"}}',
    ),
    "a call as it was parsed": (
        {
            "role": "assistant",
            "parsed": None,
            "tool_calls": [{**CALLED, "function": {**CALLED["function"], "parsed_arguments": None}}],
        },
        '{"name": "weather", "arguments": {"city": "dog"}}',
    ),
    "arguments that are none": (with_arguments(""), '"arguments": {}}'),
    "arguments as an object": (with_arguments({"city": "dog"}), '"arguments": {"city": "dog"}}'),
    "arguments that were cut": (with_arguments('{"city": "do'), '"arguments": {"city": "do}'),
    "arguments that are a list": (with_arguments("[1]"), '"arguments": [1]}'),
    "half of a character": (with_arguments('{"city": "\\ud83d"}'), '"arguments": {"city": "\\ud83d"}}'),
    "deep arguments": (with_arguments("[" * 5000), '"arguments": ' + "[" * 50),
    "a number that is none": (with_arguments('{"days": NaN}'), '"arguments": {"days": NaN}}'),
    "a long number": (with_arguments('{"days": ' + "9" * 5000 + "}"), '"arguments": {"days": 99999'),
}  # fmt: skip


@pytest.mark.parametrize("name", SENT_BACK)
async def test_what_was_answered_may_be_sent_back(start, name):
    message, shown = SENT_BACK[name]
    async with start(ScriptedEngine("ok", max_model_len=20_000)) as server, http_of(server) as http:
        messages = [QUESTION, message, {"role": "tool", "content": None, "tool_call_id": None}, QUESTION]
        answer = await http.post("/v1/chat/completions", json={"messages": messages})
        assert answer.status_code == 200, answer.text
        turn = server.engine.prompts[0].split("<|im_start|>assistant\n")[1].partition("<|im_end|>")[0]
    assert shown in turn
    assert bool(turn) == bool(shown)


async def test_our_own_answers_may_be_sent_back_in_every_form(start):
    said = f"<think>fox</think>dog{HERMES}"
    engine = ScriptedEngine(said, *["ok"] * 3)
    async with start(engine, reasoning_format="think") as server, client_of(server) as client:
        message, _ = await ask(client, False, [QUESTION])
        for sent in (message, message.model_dump(), message.model_dump(exclude_unset=True)):
            await ask(client, False, [QUESTION, sent, QUESTION])
    assert len(set(engine.prompts[1:])) == 1


async def test_hints_in_parts_and_nulls_in_objects(http):
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "annotations": None}
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2, "stream": True}
    answer = await http.post("/v1/chat/completions", json=body | {"stream_options": {"include_usage": None}})
    assert answer.status_code == 200, answer.text
    assert '"usage"' not in answer.text


@pytest.mark.parametrize("sent", ["reasoning", "reasoning_content"])
async def test_arguments_and_reasoning_reach_the_template(start, monkeypatch, sent):
    template = (
        "{% for m in messages %}[{{ m.role }}{% if m.reasoning_content %}<{{ m.reasoning_content }}"
        "{{ m.reasoning }}>{% endif %}]"
        "{{ m.content }}{% endfor %}{{ documents }}{{ reasoning_effort }}|{{ enable_thinking }}|{{ mine }}"
    )
    async with start(ScriptedEngine(*["ok"] * 4)) as server, http_of(server) as http:
        monkeypatch.setattr(server.front.tokenizer, "chat_template", template)

        async def prompt(**body):
            answer = await http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            counted = await http.post("/tokenize", json=body)
            assert counted.json()["count"] == answer.json()["usage"]["prompt_tokens"]
            return server.engine.prompts[-1]

        said = [QUESTION, {**SAID, sent: "why"}]
        assert "[assistant<whywhy>]hello" in await prompt(messages=said)
        assert (await prompt(messages=said, reasoning_effort="low")).endswith("low|True|")
        own = {"mine": {"a": 1}, "enable_thinking": True}
        told = await prompt(messages=said, reasoning_effort="none", chat_template_kwargs=own, documents=[{"a": "b"}])
        assert told.endswith("[{'a': 'b'}]none|True|{'a': 1}")


async def test_a_message_is_continued(start):
    engine = ScriptedEngine(" and more", " again")
    async with start(engine) as server, http_of(server) as http:
        messages = [QUESTION, {"role": "assistant", "content": "So far "}]
        for more in ({}, {"add_generation_prompt": False}):
            body = {"messages": messages, "continue_final_message": True, **more}
            assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert all(prompt.endswith("<|im_start|>assistant\nSo far ") for prompt in engine.prompts)


def chat(*messages, **fields):
    return pb.GenerateRequest(chat=pb.Chat(messages=messages, **fields))


async def over_grpc(server, request):
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        return [answer async for answer in rpc.InferenceStub(channel).Generate(request)]


ASKED = pb.ChatMessage(role=pb.ROLE_USER, content=QUESTION["content"])
TOOL = pb.Tool(name="weather", description="It knows.", parameters_json=json.dumps(PARAMETERS), strict=True)


async def test_an_agent_over_grpc(start):
    engine = ScriptedEngine(f"<think>fox</think>dog{HERMES}", "Rain.", HERMES, per_step=2)
    async with start(engine, reasoning_format="think") as server:
        *deltas, final = await over_grpc(server, chat(ASKED, tools=[TOOL]))
        assert final.final.finish_reason == pb.FINISH_REASON_TOOL_CALLS
        assert "".join(each.delta.reasoning for each in deltas) == "fox"
        assert "".join(each.delta.text for each in deltas) == "dog"
        assert deltas[-1].delta.num_reasoning_tokens == len(engine.tokenizer.encode("fox"))
        ids = [i for each in deltas for i in each.delta.token_ids]
        assert len(ids) == final.final.usage.completion_tokens
        pieces = [piece for each in deltas for piece in each.delta.tool_calls]
        arguments = "".join(piece.arguments for piece in pieces)
        assert json.loads(arguments) == {"city": "the lazy dog", "days": 2}
        assert [(piece.name, piece.index) for piece in pieces if piece.id] == [("weather", 0)]
        call = pb.ToolCall(id=pieces[0].id, name="weather", arguments=arguments)
        said = pb.ChatMessage(role=pb.ROLE_ASSISTANT, content="dog", reasoning="fox", tool_calls=[call])
        answered = pb.ChatMessage(role=pb.ROLE_TOOL, tool_call_id=call.id, content="rain")
        *deltas, final = await over_grpc(server, chat(ASKED, said, answered, tools=[TOOL], include_reasoning=False))
        assert (deltas[0].delta.text + deltas[1].delta.text)[:2] == "Ra"
        assert final.final.finish_reason == pb.FINISH_REASON_STOP
        *_, final = await over_grpc(server, chat(ASKED, tools=[TOOL], tool_choice="none"))
        assert final.final.finish_reason == pb.FINISH_REASON_STOP
    assert "<tool_response>\nrain" in engine.prompts[1]


async def test_both_doors_make_the_same_prompt(start):
    engine = ScriptedEngine("a", "b")
    history = [
        QUESTION,
        with_arguments('{"city": "dog"}'),
        {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
    ]
    body = {"messages": history, "tools": [WEATHER], "reasoning_effort": "low", "chat_template_kwargs": {"a": 1}}
    call = pb.ToolCall(id="call_1", name="weather", arguments='{"city": "dog"}')
    messages = [ASKED, pb.ChatMessage(role=pb.ROLE_ASSISTANT, tool_calls=[call])]
    messages += [pb.ChatMessage(role=pb.ROLE_TOOL, content="rain", tool_call_id="call_1")]
    async with start(engine) as server, http_of(server) as http:
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
        same = chat(*messages, tools=[TOOL], reasoning_effort="low", template_arguments_json='{"a": 1}')
        await over_grpc(server, same)
    assert engine.prompts[0] == engine.prompts[1]


BAD_CHATS = {
    "a schema that is no object": ({"tools": [pb.Tool(name="f", parameters_json="[]")]}, "parameters_json"),
    "a schema that is no JSON": ({"tools": [pb.Tool(name="f", parameters_json="{")]}, "parameters_json"),
    "a tool without a name": ({"tools": [pb.Tool()]}, "name"),
    "two of a name": ({"tools": [TOOL, TOOL]}, "two tools are called 'weather'"),
    "required, of none": ({"tool_choice": "required"}, "there are no tools"),
    "named, unknown": ({"tools": [TOOL], "tool_choice": "function:now"}, "'now'"),
    "an unknown choice": ({"tool_choice": "some"}, "tool_choice"),
    "effort": ({"reasoning_effort": "much"}, "reasoning_effort"),
    "arguments": ({"template_arguments_json": "{'a'"}, "template_arguments_json"),
    "documents": ({"documents_json": ["1"]}, "documents_json"),
    "continue": ({"continue_final_message": True}, "last message"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
async def test_bad_chats_over_grpc(server, name):
    fields, said = BAD_CHATS[name]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await over_grpc(server, chat(ASKED, **fields))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in refused.value.details()
