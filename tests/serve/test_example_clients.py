"""The example clients against a gateway over a fake engine."""

import asyncio
import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = "the lazy dog"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer_of(server, num_tokens):
    """What the fake engine says: the prompt's own tokens, over and over."""
    tokenizer = server.front.tokenizer
    ids = tokenizer.encode(PROMPT, add_special=True)
    return tokenizer.decode([ids[i % len(ids)] for i in range(num_tokens)], skip_special=True)


async def test_over_http_whole_and_as_a_stream(server):
    arguments = [server.url, PROMPT, "--max-tokens", "6"]
    whole, streamed = await asyncio.to_thread(load("http_client").main, arguments)
    assert whole == streamed == answer_of(server, 6)


async def test_a_refusal_over_http_is_shown_in_the_servers_words(start):
    async with start(api_key="secret") as server:
        with pytest.raises(SystemExit, match=r"401: .*key"):
            await asyncio.to_thread(load("http_client").main, [server.url, PROMPT])


async def test_a_key_is_taken_from_the_environment(start, monkeypatch):
    async with start(api_key="secret") as server:
        monkeypatch.setenv("TRINITY_API_KEY", "secret")
        whole, _ = await asyncio.to_thread(load("http_client").main, [server.url, PROMPT, "--max-tokens", "3"])
        text = await asyncio.to_thread(load("grpc_client").main, [server.grpc_address, PROMPT, "--max-tokens", "3"])
        assert whole == text == answer_of(server, 3)


async def test_over_grpc(server, capsys):
    text = await asyncio.to_thread(load("grpc_client").main, [server.grpc_address, PROMPT, "--max-tokens", "6"])
    assert text == answer_of(server, 6)
    assert "6 tokens, FINISH_REASON_LENGTH" in capsys.readouterr().out
