"""A tiny model that learned to call a tool, unconstrained, and an agent over it that knows nothing of us: OpenAI's client. What
it learned is there with keys and values in 8 bits, too.

The model reads a city in the question and in the tool's answer, so a right call is one that it made of what it was told.
"""

import json
from types import SimpleNamespace

import openai
import pytest
import torch
from trained import serving, trained

from trinity.config import EngineConfig
from trinity.engine.engine import Engine
from trinity.engine.request import SamplingParams
from trinity.text.chat_template import CHATML
from trinity.text.conversation import Chat, render

CITIES = ("Köln", "Oslo", "Rome")
PROPERTIES = {"city": {"type": "string"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": PROPERTIES}}}


def question(city):
    return {"role": "user", "content": f"Weather: city {city}?"}


def conversation(city):
    arguments = json.dumps({"city": city}, ensure_ascii=False)
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        question(city),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": f"rain in {city}"},
        {"role": "assistant", "content": f"There is rain in {city}."},
    ]


HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def texts():
    """Conversations as the template writes them."""
    plain = SimpleNamespace(chat_template=CHATML, bos_token="", eos_token="<|im_end|>")
    chats = [Chat(messages, [TOOL], add_generation_prompt=False) for messages in (*map(conversation, CITIES), HELLO)]
    return [render(chat, plain) for chat in chats]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("calls"), texts())


async def ask(agent, messages, stream):
    asked = {"model": "tiny", "messages": messages, "tools": [TOOL], "temperature": 0, "max_tokens": 60}
    if stream:
        async with agent.chat.completions.stream(**asked) as events:
            return (await events.get_final_completion()).choices[0]
    return (await agent.chat.completions.create(**asked)).choices[0]


async def loop(agent, messages, stream):
    """-> the cities that the tool was asked for, and what the model said in the end."""
    asked = []
    while (choice := await ask(agent, messages, stream)).finish_reason == "tool_calls":
        messages = [*messages, choice.message]
        for call in choice.message.tool_calls:
            city = json.loads(call.function.arguments)["city"]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": f"rain in {city}"})
            asked.append(city)
    return asked, choice.message.content


async def test_an_agent_over_a_model_that_calls(llm):
    greedy = SamplingParams(temperature=0, max_tokens=60)
    for city in CITIES:
        [call] = llm.chat([question(city)], greedy, tools=[TOOL]).tool_calls
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": city})
    async with serving(llm) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as agent:
        for stream in (False, True):
            for city in CITIES:
                assert await loop(agent, [question(city)], stream) == ([city], f"There is rain in {city}.")
            assert await loop(agent, HELLO[:1], stream) == ([], "Hello!")


def logprobs_TV(llm, ids, is_exact, dtype):
    """What an engine with such a cache thinks of each next token of a text, which it computes in two chunks."""
    config, found = llm.engine.config.model_copy(update={"batch_invariant": is_exact}), []
    room = {"max_model_len": 1024, "kv_cache_bytes": 16 << 20, "max_num_batched_tokens": 1 + len(ids) // 2}
    engine = Engine(llm.weights, config, EngineConfig(kv_cache_dtype=dtype, **room), llm.tokenizer)
    head = llm.weights.model(llm.engine.version).lm_head
    handle = head.register_forward_hook(lambda _, __, logits: found.append(logits.float()))
    engine.add("one", ids, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    while engine.has_work:
        engine.step()
    handle.remove()
    return torch.cat(found).log_softmax(-1)


@pytest.mark.parametrize("is_exact", [True, False])
def test_keys_and_values_in_8_bits_hardly_move_what_it_thinks(llm, is_exact):
    kl, same = [], []
    for text in texts():
        p, q = (logprobs_TV(llm, llm.tokenizer.encode(text), is_exact, dtype) for dtype in ("auto", "int8"))
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    assert 0 < torch.cat(kl).mean() < 2e-5
    assert torch.cat(same).float().mean() > 0.99
