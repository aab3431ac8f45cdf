"""Anthropic's client, unmodified, where it is installed (`make interop` does): its accumulators and types read our streams."""

import pytest
from fake import FakeEngine
from scripted import ScriptedEngine

from trinity.errors import Overloaded

anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed; make interop runs these")

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "weather", "description": "It knows.", "input_schema": SCHEMA}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "dog"}}\n</tool_call>'
ASKED = {"model": "fake", "max_tokens": 500, "tools": [WEATHER]}
QUESTION = {"role": "user", "content": "What is the weather?"}


def client_of(server, **options):
    return anthropic.AsyncAnthropic(base_url=server.url, **{"api_key": "unused", "max_retries": 0, **options})


@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_calls_a_tool_and_answers(start, stream):
    engine = ScriptedEngine(f"<think>fox</think>I look.\n{HERMES}", "It rains.", per_step=3)

    async def ask(messages):
        if not stream:
            return await client.messages.create(messages=messages, **ASKED)
        async with client.messages.stream(messages=messages, **ASKED) as events:
            return await events.get_final_message()

    async with start(engine, reasoning_format="think") as server, client_of(server) as client:
        counted = await client.messages.count_tokens(messages=[QUESTION], model="fake", tools=[WEATHER])
        message = await ask([QUESTION])
        assert counted.input_tokens == message.usage.input_tokens
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
        call = message.content[-1]
        assert (message.stop_reason, call.name, call.input) == ("tool_use", "weather", {"city": "dog"})
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
        said = {"role": "assistant", "content": message.content}
        answer = await ask([QUESTION, said, {"role": "user", "content": [result]}])
        assert (answer.stop_reason, answer.content[0].text) == ("end_turn", "It rains.")
    assert "<tool_response>\nrain\n</tool_response>" in engine.prompts[1]


@pytest.mark.parametrize("num", [0, 12])
async def test_errors_are_the_clients_own(start, num):
    engine = FakeEngine(max_model_len=4096, fail_after=num, error=Overloaded("the queue is full"))
    async with start(engine, api_key="right") as server:
        async with client_of(server, api_key="wrong") as client:
            with pytest.raises(anthropic.AuthenticationError):
                await client.messages.create(messages=[QUESTION], **ASKED)
        async with client_of(server, api_key="right") as client:
            with pytest.raises(anthropic.APIStatusError, match="the queue is full"):
                async with client.messages.stream(messages=[QUESTION], **ASKED) as events:
                    await events.get_final_message()
            tool = {"type": "web_search_20250305", "name": "web_search"}
            with pytest.raises(anthropic.BadRequestError, match="web_search"):
                await client.messages.create(messages=[QUESTION], **ASKED | {"tools": [tool]})


async def test_models_are_listed(start):
    async with start() as server, client_of(server) as client:
        [model] = [each async for each in client.models.list()]
        assert (model.id, model.type, model.display_name) == ("fake", "model", "fake")
        assert (await client.models.retrieve("fake")).created_at == model.created_at
