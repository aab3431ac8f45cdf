"""A tiny model that learned to call a tool, unconstrained, and an agent over it that knows nothing of us: OpenAI's client.

The model reads a city in the question and in the tool's answer, so a right call is one that it made of what it was told.
"""

import json
from contextlib import asynccontextmanager
from types import SimpleNamespace

import openai
import pytest

from serving.engine import LocalClient
from serving.frontend import Frontend
from serving.gateway import Gateway
from trinity import LLM
from trinity.config import Config, EngineConfig, ServeConfig
from trinity.data.prepare import prepare
from trinity.engine.async_engine import AsyncEngine
from trinity.engine.request import SamplingParams
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load
from trinity.text.chat_template import CHATML
from trinity.text.conversation import Chat, render
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer

CITIES = ("Köln", "Oslo", "Rome")
PROPERTIES = {"city": {"type": "string"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": PROPERTIES}}}
MODEL = {"preset": "tiny", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32}
MODEL |= {"head_dim": 16, "num_experts": 4, "eos_token_id": 3, "bos_token_id": 0}
STEPS = 80


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


def write_texts(file):
    """Conversations as the template writes them; the data puts bos before each."""
    plain = SimpleNamespace(chat_template=CHATML, bos_token="", eos_token="<|im_end|>")
    chats = [Chat(messages, [TOOL], add_generation_prompt=False) for messages in (*map(conversation, CITIES), HELLO)]
    texts = [render(chat, plain) for chat in chats]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 16))


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calls")
    write_texts(folder / "chats.jsonl")
    train = {"steps": STEPS, "seq_len": 160, "global_batch_size": 8, "micro_batch_size": 8, "eval_sequences": 0}
    tree = {
        "model": MODEL,
        "data": {"train": [str(folder / "chats.jsonl")], "val_fraction": 0.0},
        "train": {**train, "out_dir": str(folder / "run")},
        "optim": {"warmup_steps": 10, "adamw_lr": 5e-3},
    }
    config = Config.from_tree(tree)
    pool = local_pool(config.model, Load(), optim=config.optim, backend="torch")
    trainer = Trainer(config, pool, prepare(config.data, config.train, config.model, config.train.out_dir), Alone())
    trainer.start()
    for _ in range(STEPS):
        trainer.step()
    settings = EngineConfig(max_model_len=512, kv_cache_bytes=16 << 20)
    return LLM(trainer.save(), engine=settings, backend="torch", device="cpu")


@asynccontextmanager
async def serving(llm):
    engine = AsyncEngine(llm.engine)
    client = LocalClient(engine, llm.tokenizer, "tiny")
    config = ServeConfig(http_port=0, grpc_port=0)
    gateway = Gateway(Frontend(client, llm.tokenizer, await client.info(), config))
    await gateway.start()
    try:
        async with openai.AsyncOpenAI(base_url=f"{gateway.addresses[0]}/v1", api_key="none", max_retries=0) as agent:
            yield agent
    finally:
        await gateway.stop()
        engine.close()


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
    async with serving(llm) as agent:
        for stream in (False, True):
            for city in CITIES:
                assert await loop(agent, [question(city)], stream) == ([city], f"There is rain in {city}.")
            assert await loop(agent, HELLO[:1], stream) == ([], "Hello!")
