"""A client in another language, made from the .proto alone (examples/node): streams, cancels, calls, meets a full server."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest
from fake import FakeEngine
from scripted import ScriptedEngine
from test_example_clients import PROMPT, answer_of

from tests.waiting import WAIT_S, eventually
from trinity.errors import Overloaded

FOLDER = Path(__file__).parents[2] / "examples" / "node"
IS_THERE = shutil.which("node") is not None and (FOLDER / "node_modules" / "@grpc" / "grpc-js").is_dir()
pytestmark = pytest.mark.skipif(not IS_THERE, reason="Node with grpc-js is not here: make interop")


async def run(server, *arguments, **environment):
    """-> exit code, stdout, stderr of the client."""
    process = await asyncio.create_subprocess_exec(
        "node", str(FOLDER / "grpc_client.js"), server.grpc_address, PROMPT, *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, **environment},
    )  # fmt: skip
    async with asyncio.timeout(WAIT_S):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_it_streams_a_whole_answer(server):
    code, out, err = await run(server, "--max-tokens", "6")
    assert (code, err) == (0, "")
    assert out == f"{answer_of(server, 6)}\n[6 tokens, FINISH_REASON_LENGTH]\n"


async def test_its_cancelling_frees_the_server(start):
    """Long before the answer would have ended by itself: 100,000 tokens take half an hour."""
    async with start(FakeEngine(max_model_len=200_000, delay_s=0.02)) as server:
        code, out, err = await run(server, "--max-tokens", "100000", "--cancel-after", "3")
        assert (code, err) == (0, "")
        assert out == f"{answer_of(server, 3)}\n[cancelled]\n"
        await eventually(lambda: not server.engine.held and not server.front.admission.active)


async def test_it_answers_a_call_and_shows_what_the_model_says_then(start):
    call = '<tool_call>\n{"name": "time_in", "arguments": {"city": "Oslo"}}\n</tool_call>'
    engine = ScriptedEngine(call, "Late.")
    async with start(engine) as server:
        code, out, err = await run(server, "--tools", TIME="nine")
    assert (code, err) == (0, "")
    assert out.startswith('time_in({"city": "Oslo"}) -> Oslo: nine\nLate.\n[')
    assert out.endswith("FINISH_REASON_STOP]\n")
    assert "<tool_response>\nOslo: nine\n</tool_response>" in engine.prompts[1]


class FullAtFirst(FakeEngine):
    """Refuses its first two requests."""

    async def generate(self, *request):
        if len(self.seen) < 2:
            self.seen.append(None)
            raise Overloaded("the queue is full", retry_after_s=0.05)
        async for delta in super().generate(*request):
            yield delta


async def test_it_comes_again_when_a_full_server_says_so(start):
    async with start(FullAtFirst()) as server:
        code, out, err = await run(server, "--max-tokens", "6")
        assert err == "RESOURCE_EXHAUSTED: the queue is full; again in 50 ms\n" * 2
        assert (code, out.splitlines()[0]) == (0, answer_of(server, 6))


async def test_a_refusal_is_shown_in_the_servers_words(start):
    async with start(api_key="secret") as server:
        code, _, err = await run(server)
        assert code == 1
        assert err.startswith("UNAUTHENTICATED: ")
        code, out, _ = await run(server, "--max-tokens", "2", TRINITY_API_KEY="secret")
        assert (code, out.splitlines()[0]) == (0, answer_of(server, 2))
