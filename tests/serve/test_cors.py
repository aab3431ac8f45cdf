"""Pages of other origins: what browsers ask first, as the Fetch standard says it, with and without keys."""

import httpx
import pytest

from tests.waiting import WAIT_S
from trinity.config import Config
from trinity.errors import ConfigError

PAGE, OTHER, KEY = "http://localhost:3000", "https://elsewhere.example", "correct-horse-battery"
CHAT = "/v1/chat/completions"
ASK = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def client(server):
    return httpx.AsyncClient(base_url=server.url, timeout=WAIT_S, trust_env=False)


def shared(answer):
    return {key: value for key, value in answer.headers.items() if key.startswith("access-control-")}


@pytest.fixture
async def server(start):
    async with start(api_key=KEY, allowed_origins=(PAGE,)) as found:
        yield found


async def test_a_page_that_is_listed_may_ask_without_the_key(server):
    async with client(server) as http:
        for path in (CHAT, "/v1/models", "/nowhere"):
            answer = await http.options(path, headers={"origin": PAGE, **ASK})
            assert (answer.status_code, answer.content) == (204, b"")
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert answer.headers["access-control-allow-headers"] == ASK["access-control-request-headers"]
            assert "POST" in answer.headers["access-control-allow-methods"]
            assert "access-control-allow-credentials" not in answer.headers
            assert answer.headers["vary"] == "origin"
            assert "access-control-allow-private-network" not in answer.headers
        local = {"origin": PAGE, **ASK, "access-control-request-private-network": "true"}
        assert (await http.options(CHAT, headers=local)).headers["access-control-allow-private-network"] == "true"


async def test_it_reads_every_answer_and_needs_the_key_for_them(server):
    async with client(server) as http:
        calls = [("GET", "/health", {}, 200), ("HEAD", "/health", {}, 200), ("GET", "/v1/models", {}, 401)]
        key = {"authorization": f"Bearer {KEY}"}
        calls += [("GET", "/v1/models", key, 200), ("POST", CHAT, key, 415), ("OPTIONS", CHAT, key, 405)]
        for method, path, headers, status in calls:
            answer = await http.request(method, path, headers={"origin": PAGE, **headers})
            assert answer.status_code == status, (method, path)
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert "x-request-id" in answer.headers["access-control-expose-headers"]


async def test_a_stream_is_read_too(server):
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 2}
    headers = {"origin": PAGE, "authorization": f"Bearer {KEY}"}
    async with client(server) as http, http.stream("POST", CHAT, json=body, headers=headers) as answer:
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "data: [DONE]" in [line async for line in answer.aiter_lines()]


async def test_other_pages_are_told_nothing(server):
    async with client(server) as http:
        for origin in (OTHER, "null", "*", PAGE + "/", PAGE + ".example", "http://localhost:30000"):
            answer = await http.options(CHAT, headers={"origin": origin, **ASK})
            assert answer.status_code == 401
            assert not shared(answer)
            assert answer.headers["vary"] == "origin", "a cache must not show it to a page that is listed"
        answer = await http.options(CHAT, headers=[("origin", PAGE), ("origin", OTHER), *ASK.items()])
        assert answer.status_code == 400


async def test_by_default_it_is_nobody(start):
    async with start() as server, client(server) as http:
        answer = await http.options(CHAT, headers={"origin": PAGE, **ASK})
        assert answer.status_code == 405
        assert not shared(answer)
        assert "vary" not in (await http.get("/health", headers={"origin": PAGE})).headers


async def test_everybody_may_be_listed_but_not_under_another_name(start):
    async with start(allowed_origins=("*",)) as server, client(server) as http:
        for origin in (OTHER, "app://obsidian.md"):
            answer = await http.options(CHAT, headers={"origin": origin, **ASK})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (204, origin)
        assert (await http.options(CHAT, headers={"origin": OTHER, "host": "evil.example", **ASK})).status_code == 400


def test_origins_are_as_browsers_say_them():
    def listed(value):
        return Config.load(None, [f"--serve.allowed_origins={value}"], model="tiny").serve.allowed_origins

    assert listed("HTTP://LocalHost:80") == ("http://localhost",)
    assert listed("[https://a:443, 'http://a:443', 'http://[::1]:3000']") == (
        "https://a",
        "http://a:443",
        "http://[::1]:3000",
    )
    for wrong in ("localhost:3000", "http://a/", "'http://a b'", "'null'", "http://a/path", "http://me@a"):
        with pytest.raises(ConfigError, match="is no origin; write scheme://host:port"):
            listed(wrong)
