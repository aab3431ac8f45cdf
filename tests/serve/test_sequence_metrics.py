"""What is counted of each sequence, and the same numbers under vLLM's names."""

import asyncio

import httpx
from fake import FakeEngine
from prometheus_client.parser import text_string_to_metric_families

from serving.vllm_names import NAMES
from tests.waiting import WAIT_S, eventually
from trinity.errors import Unavailable

BODY = {"prompt": "the lazy dog", "max_tokens": 6}


async def scraped(http):
    """Values by name and labels, less the model's."""
    text = (await http.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            own = {key: value for key, value in sample.labels.items() if key not in ("model_name", "engine")}
            found[sample.name, tuple(sorted(own.items()))] = sample.value
            if sample.name.startswith("vllm:"):
                assert (sample.labels["model_name"], sample.labels["engine"]) == ("fake", "0")
    return found


async def test_vllms_names_have_our_numbers(server, http):
    for _ in range(3):
        await http.post("/v1/completions", json=BODY)
    found = await scraped(http)
    for theirs, ours in NAMES.items():
        base = ours.removesuffix("_total")
        mine = {key: value for key, value in found.items() if key[0].startswith(base) and "_created" not in key[0]}
        renamed = {(theirs + name.removeprefix(base), labels): value for (name, labels), value in mine.items()}
        assert renamed, ours
        assert renamed.items() <= found.items()
    assert found["vllm:prompt_tokens_total", ()] > 0
    assert found["vllm:generation_tokens_total", ()] == 18
    assert found["vllm:request_success_total", (("finished_reason", "length"),)] == 3
    assert found["vllm:e2e_request_latency_seconds_count", ()] == 3
    assert found["vllm:request_queue_time_seconds_count", ()] == 3


async def test_how_sequences_end_is_counted_once(start):
    async with (
        start(FakeEngine(delay_s=0.01, max_model_len=4096)) as server,
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
    ):
        async with http.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 4000, "stream": True}) as answer:
            await anext(answer.aiter_bytes())
        await eventually(lambda: not server.front.admission.active)
        await asyncio.sleep(0)
        found = await scraped(http)
        assert found["trinity_sequences_total", (("finished_reason", "abort"),)] == 1
        assert found["trinity_sequence_seconds_count", ()] == 1


async def test_failures_are_counted(start):
    async with (
        start(FakeEngine(fail_after=2, error=Unavailable("a shard is gone"))) as server,
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
    ):
        assert (await http.post("/v1/completions", json=BODY)).status_code == 503
        found = await scraped(http)
    assert found["trinity_sequences_total", (("finished_reason", "error"),)] == 1


async def test_the_caches_share_in_use(server, http):
    for engine, free in (("a", 10), ("b", 50)):
        server.front.metrics.engine(engine, 1, {"num_free_blocks": free, "num_total_blocks": 80})
    assert (await scraped(http))["vllm:kv_cache_usage_perc", ()] == 0.625
