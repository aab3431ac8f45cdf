"""Several engines behind one gateway, by name: what is sent where, and what becomes of it when engines come, go and stop."""

import asyncio
from contextlib import aclosing
from dataclasses import asdict

import pytest
from fake import FakeEngine, fake_tokenizer

from serving import routed
from serving.continuation import Continuing
from serving.engine import LocalClient
from serving.pins import Pins
from serving.routed import RoutedClient
from tests.unit.engine_fakes import fake_config, fake_engine, solo
from tests.waiting import WAIT_S, eventually
from trinity.config import ANYBODY, EngineConfig
from trinity.engine.async_engine import AsyncEngine
from trinity.engine.handoff import Handoff
from trinity.engine.kv_tier import TierPlace
from trinity.engine.request import SamplingParams
from trinity.errors import EngineLost, InvalidRequest, Unavailable

PROMPT = [7, 8, 9, 10] * 5


class Replica(LocalClient):
    """An engine by name, and what Ray Serve makes of it."""

    def __init__(self, name, engine):
        super().__init__(engine, fake_tokenizer(), "fake", name=name)
        self.name, self.is_stopped, self.prefills = name, False, []

    async def status(self, **told):
        while self.is_stopped:
            await asyncio.sleep(0.01)
        return await super().status(**told)


class FakeFleet:
    """Replicas in the order of their start. Like Ray Serve's, it takes another one for those that are not there."""

    def __init__(self, *engines):
        self.replicas = {}
        for engine in engines:
            self.add(engine)
        self.num_started, self.sent, self.prefilled = len(engines), [], []
        self.prefill_fails = []

    def add(self, engine):
        name = f"engine-{len(self.replicas)}"
        self.replicas[name] = Replica(name, engine)
        self.replicas[name]._started = len(self.replicas)
        return name

    def pick(self, name, besides=()):
        others = sorted(self.replicas, key=lambda each: each in besides)
        if not others:
            raise Unavailable("no engine is there right now")
        return self.replicas[name if name in self.replicas else others[0]]

    async def generate(self, name, *asked, **more):
        replica = self.pick(name)
        self.sent.append(replica.name)
        self.prefilled.append(more.get("prefilled"))
        async with aclosing(replica.generate(*asked, **more)) as deltas:
            async for delta in deltas:
                if replica.name not in self.replicas:
                    raise EngineLost("killed")
                yield delta

    async def prefill(self, name, request_id, *asked):
        replica = self.pick(name)
        replica.prefills.append(request_id)
        if self.prefill_fails:
            failure = self.prefill_fails.pop(0)
            if isinstance(failure, EngineLost):
                del self.replicas[name]
            raise failure
        return await replica.prefill(request_id, *asked)

    async def status(self, name, besides, **told):
        return await self.pick(name, besides).status(**told)

    async def reset_prefix_cache(self):
        for replica in self.replicas.values():
            await replica.reset_prefix_cache()


def fakes(num, **more):
    return FakeFleet(*(FakeEngine(max_model_len=4096, **more) for _ in range(num)))


@pytest.fixture
def real():
    """Engines with a model, which say what they have cached."""
    engines = [AsyncEngine(fake_engine(max_model_len=512)) for _ in range(3)]
    yield FakeFleet(*engines[:2]), engines[2]
    for engine in engines:
        engine.close()


async def met(fleet, **settings):
    """A gateway's client that has met all engines."""
    client = RoutedClient(
        fleet, EngineConfig(**{"replicas": 8, "min_prefill_tokens": 12, "kv_tier_bytes": 1, **settings})
    )
    for _ in fleet.replicas:
        infos = await client.infos()
    assert {info.engine_id for info in infos} == fleet.replicas.keys()
    await client.infos()  # so that they have their accounts and roles
    return client


async def ask(client, name, prompt=PROMPT, num=3, **params):
    params = SamplingParams(max_tokens=num, ignore_eos=True, seed=1, **params)
    stream = client.generate(name, prompt, params, WAIT_S, ANYBODY)
    return [token async for delta in stream for token in delta.token_ids]


async def test_requests_are_spread_and_conversations_stay(real):
    fleet, _ = real
    client, said = await met(fleet), {talk: [talk] * 21 for talk in range(6)}
    for turn in range(3):
        for talk, text in said.items():
            text += await ask(client, f"{talk}.{turn}", text, 9)
            text += [30, 31, 32]
    homes = [set(fleet.sent[talk::6]) for talk in range(6)]
    assert all(len(home) == 1 for home in homes)
    assert {name for home in homes for name in home} == fleet.replicas.keys()
    stats = [asdict(replica.engine.stats()) for replica in fleet.replicas.values()]
    hits, queries = (sum(each[f"num_prefix_{what}"] for each in stats) for what in ("hits", "queries"))
    assert hits > 0.5 * queries


async def test_another_gateway_or_one_that_starts_again_hears_what_is_cached(real):
    fleet, _ = real
    first = await met(fleet)
    for talk in range(6):
        await ask(first, str(talk), [talk] * 40)
    homes, fleet.sent = fleet.sent, []
    second = await met(fleet)
    for talk in reversed(range(6)):
        await ask(second, f"again-{talk}", [*[talk] * 40, 3])
    assert fleet.sent == homes[::-1]
    chain = second._routing.chain(False, ANYBODY.name, None, None)
    chain.add([0] * 40)
    seats = second._routing.seats.values()
    assert sorted(seat.num_cached(chain) for seat in seats) == [0, 36]
    await second.reset_prefix_cache()
    await eventually(lambda: not any(each.engine.stats().num_idle_blocks for each in fleet.replicas.values()))
    await second.infos()
    assert [seat.num_cached(chain) for seat in seats] == [0, 0]


async def test_one_engine_is_asked_without_a_choice():
    fleet = fakes(1)
    client = await met(fleet)
    assert await ask(client, "a") == PROMPT[:3]
    assert not client._routing.seats["engine-0"].chosen


async def test_engines_come_and_go(real):
    fleet, third = real
    client = await met(fleet)
    name = fleet.add(third)
    await client.infos()
    await asyncio.gather(*(ask(client, str(i), [i] * 30) for i in range(6)))
    assert fleet.sent.count(name) == 2
    del fleet.replicas["engine-0"]
    assert {info.engine_id for info in await client.infos()} == {"engine-1", name}
    fleet.replicas.clear()
    with pytest.raises(Unavailable):
        await client.infos()


async def test_a_stopped_engine_holds_up_neither_the_others_nor_what_is_asked_of_them(monkeypatch):
    monkeypatch.setattr(routed, "POLL_S", 0.05)
    fleet = fakes(3)
    client = await met(fleet)
    fleet.replicas["engine-1"].is_stopped = True
    assert {info.engine_id for info in await client.infos()} == {"engine-0", "engine-2"}
    for i in range(6):
        await ask(client, str(i), [i] * 8)
    assert set(fleet.sent) == {"engine-0", "engine-2"}
    fleet.replicas["engine-1"].is_stopped = False
    assert len(await client.infos()) == 3


async def test_a_killed_engines_streams_go_on_in_the_others(real):
    fleet, third = real
    fleet.add(third)
    client = await met(fleet)
    streams = Continuing(client, lambda paused_s: None, Pins())
    prompts = {str(i): [i, *PROMPT] for i in range(9)}
    undisturbed = [await ask(streams, name, prompt, 40) for name, prompt in prompts.items()]

    async def kill():
        await eventually(lambda: len(fleet.sent) == 9 + 9)
        del fleet.replicas["engine-1"]

    *found, _ = await asyncio.gather(*(ask(streams, f"{n}-", p, 40) for n, p in prompts.items()), kill())
    assert found == undisturbed
    assert len(fleet.sent) > 9 + 9
    assert "engine-1" not in fleet.sent[9 + 9 :]


@pytest.fixture
def tiered(tmp_path):
    """Engines of one node, with a tier that they share."""
    engines = [fake_engine(max_model_len=512, tier=TierPlace(tmp_path, 1 << 20, lambda version: "line")) for _ in "abc"]
    made = [AsyncEngine(each, Handoff("here", each.prefixes.tier, None)) for each in engines]
    yield FakeFleet(*made)
    for engine in made:
        engine.close()


def computed(fleet):
    """Tokens that each engine has computed."""
    return [replica.engine.stats().num_computed_tokens for replica in fleet.replicas.values()]


async def test_a_long_prompt_is_computed_by_a_prefill_engine_and_answered_by_another(tiered):
    """Short ones, and those that are cached, are not; log-probabilities of a prompt cannot be, but where that is all there is
    to the request."""
    params = SamplingParams(max_tokens=3, ignore_eos=True, seed=1)
    undisturbed = list(solo(fake_config(), tuple(PROMPT), params))
    client = await met(tiered, role=("prefill", "decode"))
    [first, *others] = tiered.replicas.values()
    assert await ask(client, "long") == undisturbed
    assert (tiered.prefilled[-1].num_tokens, first.prefills) == (16, ["long"])
    assert sorted(computed(tiered)) == [0, 20 - 16 + 2, 20]
    assert await ask(client, "again") == undisturbed
    await ask(client, "short", PROMPT[:8])
    await ask(client, "scored", [12, *PROMPT], prompt_logprobs=1)
    await ask(client, "traced", [13, *PROMPT], trace=True)
    assert (first.prefills, tiered.prefilled[1:]) == (["long"], [None] * 4)
    assert computed(tiered)[0] == 20
    await ask(client, "only scored", [12, *PROMPT], 0, prompt_logprobs=1)
    assert (first.prefills, computed(tiered)[0]) == (["long"], 20 + 21)
    await ask(client, "short and scored", PROMPT[:8], 0, prompt_logprobs=1)
    assert computed(tiered)[0] == 20 + 21
    assert [replica.engine._gives_way for replica in (first, *others)] == [True, False, False]


@pytest.mark.parametrize(
    ("failures", "tried"), [([EngineLost("killed")], ["engine-0", "engine-1"]), ([Unavailable("full")], ["engine-0"])]
)
async def test_a_prompt_whose_prefill_engine_is_lost_is_computed_elsewhere(failures, tried):
    """The next one in the order of their start takes its place; without one the prompt is computed where it is answered."""
    fleet = fakes(3)
    client = await met(fleet, role=("prefill", "prefill", "decode"))
    replicas, fleet.prefill_fails = dict(fleet.replicas), failures
    assert await ask(client, "long") == PROMPT[:3]
    assert [name for name, replica in replicas.items() if replica.prefills] == tried
    assert fleet.sent == ["engine-2"] if len(tried) == 1 else fleet.sent[-1] == "engine-2"
    fleet.prefill_fails = [EngineLost("killed")] * 2
    assert await ask(client, "another", [9] * 30) == [9] * 3
    assert fleet.sent[-1] == "engine-2"


async def test_roles_change_while_it_runs_and_other_gateways_hear_of_it():
    fleet = fakes(3)
    one, other = await met(fleet), await met(fleet)
    await one.set_roles(["prefill", "decode"])
    for _ in range(2):
        await other.infos()
    assert await ask(other, "long") == PROMPT[:3]
    first = fleet.replicas["engine-0"]
    assert (first.prefills, first.engine.gives_way) == (["long"], True)
    await other.set_roles(["both"])
    await other.infos()
    assert [info.role for info in await one.infos()] == ["both"] * 3
    await ask(one, "another", [9] * 30)
    assert (first.prefills, first.engine.gives_way) == (["long"], False)
    late = await met(fleet, role=("prefill", "decode"))
    assert [info.role for info in await late.infos()] == ["both"] * 3, "settings are older"
    with pytest.raises(InvalidRequest, match="another engine that answers"):
        await one.set_roles(["prefill"])
    with pytest.raises(InvalidRequest, match=r"engine\.kv_tier_bytes"):
        await (await met(fleet, kv_tier_bytes=0)).set_roles(["prefill", "decode"])
    with pytest.raises(InvalidRequest, match="role names 2 engines and there are at most 1"):
        await (await met(fleet, replicas=1)).set_roles(["prefill", "decode"])


async def test_only_prefill_engines_are_left_and_answer():
    fleet = fakes(2)
    client = await met(fleet, role=("prefill", "decode"))
    del fleet.replicas["engine-1"]
    await client.infos()
    assert await ask(client, "long") == PROMPT[:3]
