"""Other people's clients, unmodified, each in a short program of its own against our server.

`make interop-clients` installs them. The engine says what it is told: a call, and then an answer; or it is a tiny model's that
has learned to say so where the clients ask. What the programs print is what they made of it.
"""

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.serve.conftest import running
from tests.serve.scripted import ScriptedEngine
from tests.serve.trained import serving, trained
from trinity.text.special_tokens import BOS

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("CLIENTS_PYTHON", ROOT / ".venv-clients/bin/python"))
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not PYTHON.exists(), reason="the clients are not installed: make interop-clients"),
]
OFFLINE = {  # nobody calls home
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "NO_PROXY": "127.0.0.1",
}
CALL = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "dog"}}\n</tool_call>'
AGENTS = [
    ("anthropic_agent",),
    *(("langchain_agent", api) for api in ("chat", "responses")),
    *(("litellm_agent", provider) for provider in ("openai", "openai/responses", "anthropic")),
    *(("agents_sdk", api) for api in ("chat", "responses")),
]


async def printed(server, name, *arguments):
    """What the program prints, once it has ended well."""
    program = ROOT / "tests/interop/programs" / f"{name}.py"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | OFFLINE
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    running_program = await asyncio.create_subprocess_exec(PYTHON, program, server.url, *arguments, env=env, **pipes)
    told, said = await running_program.communicate()
    assert running_program.returncode == 0, said.decode()[-3000:]
    return told.decode().split("\n")[:-1]


@pytest.mark.parametrize("program", AGENTS, ids=" ".join)
async def test_an_agent_calls_a_tool_and_answers(program):
    engine = ScriptedEngine(CALL, "It rains.", per_step=3)
    async with running(engine) as server:
        assert await printed(server, *program) == ["weather dog", "It rains."]
    assert "<tool_response>\nrain\n</tool_response>" in engine.prompts[1]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A model that was trained on what each of the clients asks, as our server renders it, and knows no other text."""
    asked = dict.fromkeys(pair for program in AGENTS for pair in asyncio.run(asked_by(program)))
    texts = [f"{prompt.removeprefix(BOS)}{answer}<|im_end|>\n" for prompt, answer in asked]
    return trained(tmp_path_factory.mktemp("clients"), texts, steps=150, seq_len=512)


async def asked_by(program):
    """(prompt, answer) of each request."""
    engine = ScriptedEngine(CALL, "It rains.", per_step=3)
    async with running(engine) as server:
        await printed(server, *program)
    return zip(engine.prompts, (CALL, "It rains."), strict=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("program", AGENTS, ids=" ".join)
async def test_an_agent_over_a_model_that_learned_to_call(llm, program):
    async with serving(llm, "fake") as url:
        assert await printed(SimpleNamespace(url=url), *program) == ["weather dog", "It rains."]


OBJECT = '{"city": "dog", "days": 2}'
MODES = {  # of Instructor -> what the model says in it
    "MD_JSON": f"```json\n{OBJECT}\n```",
    "JSON_SCHEMA": OBJECT,
    "TOOLS": f'<tool_call>\n{{"name": "Weather", "arguments": {OBJECT}}}\n</tool_call>',
}


@pytest.mark.parametrize("mode", MODES)
async def test_an_object_of_a_class(mode):
    async with running(ScriptedEngine(MODES[mode])) as server:
        assert await printed(server, "instructor_model", mode) == ["dog 2"]
