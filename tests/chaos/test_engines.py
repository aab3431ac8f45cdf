"""F22: engines are killed at random under 200 streams of all kinds, and every stream is as in an undisturbed run.

`pytest -s -m chaos tests/chaos/test_engines.py` prints the pauses; a smoke with a few streams is in tests/serve/test_app.py.
TRINITY_CHAOS_SEED and TRINITY_CHAOS_KILLS choose another schedule.
"""

import asyncio
import json
import os
import random
import signal
import time

import httpx
import pytest

from tests.chaos.served import serving
from tests.ray.test_families import FIRST, config_of
from tests.serve.processes import engine_pids
from trinity.config import Config

NUM, KILLS = 200, int(os.environ.get("TRINITY_CHAOS_KILLS", "8"))
LIGHT = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}
CALL = {
    "messages": [{"role": "user", "content": "do something"}],
    "tools": [{"type": "function", "function": {"name": "light", "parameters": LIGHT}}],
    "tool_choice": "required",
}
PLAIN = {"ignore_eos": True, "return_token_ids": True}
KINDS = {
    "greedy": {**PLAIN, "temperature": 0},
    "sampled": {**PLAIN, "top_p": 0.9},
    "two, with log-probabilities": {**PLAIN, "n": 2, "logprobs": 2},
    "penalties": {**PLAIN, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_tokens": 50},
    "stop strings": {"stop": ["qu", "zz", " d"], "temperature": 2.0, "ignore_eos": True},
    "a grammar": {"structured_outputs": {"regex": "[a-z]{40,60}[0-9]{2}"}},
    "calls": CALL,
}


@pytest.fixture(scope="module")
def served(ray_session, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("f22"), {"http_port": 0, "grpc_port": 0}, replicas=3) as server:
        yield server


def body_of(number):
    """-> (route, body) of one of the streams."""
    common = {"stream": True, "seed": number, "max_tokens": 96, "stream_options": {"include_usage": True}}
    more = list(KINDS.values())[number % len(KINDS)]
    if "messages" in more:
        return "/v1/chat/completions", common | more
    return "/v1/completions", common | more | {"prompt": f"the quick brown fox {number}"}


def told(event):
    """What a stream says, but for names, rounding (log-probabilities are of batches of other sizes) and what was cached."""
    tree = json.loads(event, parse_float=lambda text: round(float(text), 3))
    assert "error" not in tree, tree
    for choice in tree["choices"]:
        for call in choice.get("delta", {}).get("tool_calls", ()):
            call.pop("id", None)
    usage = tree.get("usage")
    return tree["choices"], usage and {**usage, "prompt_tokens_details": None}


async def events_of(answer):
    """A stream's events, but for the last. Not by httpx's lines: a text may hold what Unicode takes for the end of one."""
    left = b""
    async for piece in answer.aiter_bytes():
        *events, left = (left + piece).split(b"\n\n")
        for event in events:
            if event != b"data: [DONE]":
                yield event.removeprefix(b"data: ").decode()


async def stream(http, number, killer):
    """-> what each choice says in order, and the longest time between two events."""
    path, body = body_of(number)
    said, longest_s, at_s = {}, 0.0, None
    async with http.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for event in events_of(answer):
            killer.event()
            now_s = time.monotonic()
            longest_s, at_s = max(longest_s, now_s - (at_s or now_s)), now_s
            choices, usage = told(event)
            said.setdefault(choices[0]["index"] if choices else "usage", []).append(choices or usage)
    return said, longest_s


class Killer:
    """Kills an engine, any of those that are there, each time that the streams have had so many events more. By events, not by
    the clock: so each kill is in the middle of streams, however fast the machine is."""

    def __init__(self, num, seed):
        self._drawn, self.num_events, self.killed = random.Random(seed), 0, []
        self._at = [self._drawn.randint(300, 3000) for _ in range(num)]

    @property
    def is_done(self):
        return not self._at

    def event(self):
        self.num_events += 1
        if self._at and self.num_events >= self._at[0] and (pids := engine_pids()):
            self.killed.append(self._drawn.choice(pids))
            os.kill(self.killed[-1], signal.SIGKILL)
            self._at.pop(0)
            self.num_events = 0


async def round_of(http, killer):
    found = await asyncio.gather(*(stream(http, number, killer) for number in range(NUM)))
    return [said for said, _ in found], sorted(longest_s for _, longest_s in found)


async def counted(http, name):
    lines = (await http.get("/metrics")).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


async def most_s(http, share):
    """The bound of the histogram's bucket in which that share of the continuations ends."""
    name, lines = "trinity_continuation_seconds", (await http.get("/metrics")).text.splitlines()
    num = await counted(http, f"{name}_count")
    buckets = [line.split('le="')[1].split('"} ') for line in lines if line.startswith(f"{name}_bucket")]
    return next(bound for bound, below in buckets if float(below) >= share * num)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
async def test_f22_200_streams_outlive_engines_that_are_killed_at_random(served):
    killer, longest, num_rounds = Killer(KILLS, int(os.environ.get("TRINITY_CHAOS_SEED", "0"))), [], 0
    limits = httpx.Limits(max_connections=NUM + 8)
    async with httpx.AsyncClient(base_url=served.http_url, timeout=600, limits=limits) as http:
        undisturbed, quiet_s = await round_of(http, Killer(0, 0))
        while not killer.is_done:
            said, longest_s = await round_of(http, killer)
            different = [number for number in range(NUM) if said[number] != undisturbed[number]]
            assert not different, (different[:5], said[different[0]], undisturbed[different[0]])
            num_rounds, longest = num_rounds + 1, sorted(longest + longest_s)
        num = int(await counted(http, "trinity_continuation_seconds_count"))
        bounds = await most_s(http, 0.5), await most_s(http, 0.99)
    at = lambda values, share: values[int(share * (len(values) - 1))]  # noqa: E731
    print(f"\n{NUM * num_rounds} streams, {len(killer.killed)} engines killed, 0 failed; {num} continuations, half within "
          f"{bounds[0]} s, 99 % within {bounds[1]} s; longest pause of a stream p50 {at(longest, 0.5):.2f}, p99 "
          f"{at(longest, 0.99):.2f} s, undisturbed {at(quiet_s, 0.5):.2f} and {at(quiet_s, 0.99):.2f} s")  # fmt: skip
    assert num >= KILLS


async def pinned(http, seed):
    """-> the versions behind an answer, and its text."""
    body = {"prompt": "word", "seed": seed, "max_tokens": 100, "ignore_eos": True, "version_policy": "pinned"}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    return choice["weights_versions"], choice["text"]


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_pinned_answers_keep_their_version_while_engines_die_and_weights_change(ray_session, tmp_path):
    """Eight at a time ask the same of two engines, of which one is killed: those of one version are one text."""
    from actors import pool as pools
    from trinity.launch import train

    more = {"serve": {"weights": "live"}, "engine": {"replicas": 2, "max_model_len": 128}}
    config = config_of(FIRST, tmp_path, train={"steps": 600}, **more)
    seen = []

    async def rounds(http_url):
        async with httpx.AsyncClient(base_url=http_url, timeout=120) as http:
            await pinned(http, 0)
            for seed in range(3):
                asked = [asyncio.create_task(pinned(http, seed)) for _ in range(8)]
                began = await counted(http, "trinity_generated_tokens_total")
                while await counted(http, "trinity_generated_tokens_total") < began + 80:
                    await asyncio.sleep(0.01)
                os.kill(random.Random(seed).choice(engine_pids()), signal.SIGKILL)
                seen.append(await asyncio.gather(*asked))
                while len(engine_pids()) < 2:
                    await asyncio.sleep(0.1)
            seen.append(int(await counted(http, "trinity_continuation_seconds_count")))

    try:
        train(config, lambda http_url, grpc_address: asyncio.run(rounds(http_url)))
    finally:
        pools.destroy(config.placement.pool, "trinity")
    *answers, num = seen
    assert num > 0
    assert len(answers) == 3
    for each in answers:
        assert all(versions["first"] == versions["last"] for versions, _ in each)
        texts = {versions["first"]: set() for versions, _ in each}
        for versions, text in each:
            texts[versions["first"]].add(text)
        assert all(len(same) == 1 for same in texts.values()), texts
    print(
        f"\n{num} continuations of pinned answers, of versions {[sorted({v['first'] for v, _ in each}) for each in answers]}"
    )


@pytest.mark.chaos
@pytest.mark.timeout(600)
async def test_engines_that_come_with_the_queue_are_sent_requests(ray_session, tmp_path):
    """Ray Serve still sees who waits where: it starts a second engine, and what comes later goes there."""
    from serving import app

    gate = tmp_path / "fake-model"
    gate.mkdir()
    (gate / "shut").touch()
    scaled = {"replicas": 1, "max_replicas": 2, "requests_per_replica": 2}
    config = Config.load(model="tiny", serve={"http_port": 0, "grpc_port": 0}, engine=scaled)
    server = await asyncio.to_thread(app.start, config, str(gate), "tests.serve.fake:build")
    try:
        async with httpx.AsyncClient(base_url=server.http_url, timeout=300) as http:
            first = await staying(http, gate, 6)
            while len(await running(http)) < 2:
                await asyncio.sleep(0.2)
            more = await staying(http, gate, 12)
            while sum(await running(http)) < 12:
                await asyncio.sleep(0.2)
            assert min(await running(http)) >= 5
            (gate / "shut").unlink()
            assert {answer.status_code for answer in await asyncio.gather(*first, *more)} == {200}
    finally:
        await asyncio.to_thread(server.stop)


async def staying(http, gate, num):
    """Requests that stay, until there are so many."""
    body = {"prompt": "stay", "max_tokens": 1}
    asked = [
        asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(num - len(list(gate.iterdir())) + 1)
    ]
    while len(list(gate.iterdir())) - 1 < num:
        await asyncio.sleep(0.05)
    return asked


async def running(http):
    """-> requests in each engine."""
    lines = (await http.get("/metrics")).text.splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith("trinity_engine_requests_running{")]
