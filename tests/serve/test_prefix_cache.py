"""What the edges say of cached tokens, and what they tell engines of whose requests these are."""

import httpx
import pytest
from fake import FakeEngine, fake_tokenizer
from test_grpc import collect, refusal, request, stubs

from serving.metrics import Exporter
from tests.unit.grammar_cases import checkpoint, random_llm
from tests.waiting import WAIT_S
from trinity.engine.async_engine import AsyncEngine

TEXT = "the lazy dog"
CHAT = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 3}
DOORS = {
    "/v1/completions": {"prompt": TEXT, "max_tokens": 3},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": TEXT, "max_output_tokens": 16},
    "/v1/messages": CHAT,
}


@pytest.fixture
async def warm(start):
    engine = FakeEngine()
    engine.num_cached = 3
    async with start(engine) as server:
        yield server


@pytest.fixture
async def client(warm):
    async with httpx.AsyncClient(base_url=warm.url, timeout=WAIT_S) as found:
        yield found


async def test_every_door_says_how_many_tokens_were_cached(warm, client):
    used = {door: (await client.post(door, json=body)).json()["usage"] for door, body in DOORS.items()}
    for door in ("/v1/completions", "/v1/chat/completions"):
        assert used[door]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert used["/v1/responses"]["input_tokens_details"]["cached_tokens"] == 3
    told, whole = used["/v1/messages"], used["/v1/chat/completions"]["prompt_tokens"]
    assert (told["cache_read_input_tokens"], told["input_tokens"]) == (3, whole - 3), "their sum is the prompt"
    async with stubs(warm) as stub:
        last = (await collect(stub.Generate(request())))[-1]
    assert last.final.usage.cached_tokens == 3


async def test_of_several_continuations_the_least_counts_and_prompts_add_up(client):
    body = {"prompt": [TEXT, TEXT], "max_tokens": 2, "n": 3}
    assert (await client.post("/v1/completions", json=body)).json()["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 6
    }


@pytest.mark.parametrize("door", DOORS)
async def test_salts_reach_the_engine_or_are_refused(warm, client, door):
    assert (await client.post(door, json={**DOORS[door], "cache_salt": "x" * 1024})).status_code == 200
    assert warm.engine.seen[-1].cache_salt == "x" * 1024
    for salt in ("", "x" * 1025, 7):
        answer = await client.post(door, json={**DOORS[door], "cache_salt": salt})
        assert answer.status_code == 400
        assert "cache_salt" in answer.json()["error"]["message"]


async def test_salts_over_grpc(warm):
    async with stubs(warm) as stub:
        await collect(stub.Generate(request(cache_salt="abc")))
        assert warm.engine.seen[-1].cache_salt == "abc"
        for salt in ("", "x" * 1025):
            assert "cache_salt" in (await refusal(stub.Generate(request(cache_salt=salt)))).details()


async def test_what_one_key_has_asked_costs_another_what_nobody_has(start, tmp_path):
    """Through the doors of a real engine, in tokens that are computed: no clock could tell (CVE-2025-46570)."""
    engine = AsyncEngine(random_llm(checkpoint(tmp_path / "model", fake_tokenizer()), max_num_kept=8).engine)
    keys = {name: {"key": name * 20} for name in "ab"}
    asked = {"prompt": list(range(5, 105)), "max_tokens": 1, "temperature": 0}
    try:
        async with (
            start(engine, clients=keys) as server,
            httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
        ):

            async def num_computed(name, **more):
                before = engine.stats().num_computed_tokens
                headers = {"authorization": f"Bearer {name * 20}"}
                answer = await http.post("/v1/completions", json={**asked, **more}, headers=headers)
                assert answer.status_code == 200, answer.text
                return engine.stats().num_computed_tokens - before

            assert [await num_computed(name) for name in "aba"] == [100, 100, 4]
            assert [await num_computed(name, cache_salt="s") for name in "aba"] == [100, 100, 4]
            assert await num_computed("b", n=2) < 100
    finally:
        engine.close()


async def test_whoever_may_forget_it(start):
    async with (
        start(FakeEngine(), api_key="k", admin_key="a") as server,
        httpx.AsyncClient(base_url=server.url) as http,
    ):
        for key, status in (("k", 401), ("a", 200)):
            answer = await http.post("/reset_prefix_cache", headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == status
        assert server.engine.num_resets == 1


def test_hits_and_queries_have_the_names_that_dashboards_know():
    exporter = Exporter("m")
    exporter.engine("a", 1, {})
    stats = {"num_prefix_queries": 100, "num_prefix_hits": 60, "num_computed_tokens": 55, "num_idle_blocks": 4}
    exporter.engine("a", 1, stats)
    text = exporter.render()[0].decode()
    for line in (
        'vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0',
        'vllm:prefix_cache_hits_total{engine="0",model_name="m"} 60.0',
        "trinity_computed_tokens_total 55.0",
        "trinity_kv_blocks_cached 4.0",
    ):
        assert f"\n{line}\n" in text
