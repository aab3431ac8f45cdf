"""The world of the oracle's trace (test_oracle.py): weights at several versions, their experts on shards, engines that come and
go, and what one engine alone says to the same request.

Every version has a backbone and a pool of its own. The monolith has all experts on one shard, no cache and no drafts, and
computes each request alone and whole; where an answer's version changed it goes on from there.
"""

import os
import tempfile
from collections import Counter
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from serving.continuation import Answer
from tests.unit.engine_fakes import FakeTokenizer, run_all
from trinity.config import ANYBODY, Client, EngineConfig, ModelConfig, preset
from trinity.engine.begun import NOT_HANDED, Begun, Handed
from trinity.engine.deltas import joined
from trinity.engine.engine import Engine
from trinity.engine.kv_tier import TierPlace
from trinity.engine.request import SamplingParams
from trinity.engine.speculation import PassCost, Speculation
from trinity.engine.weights import FixedWeights
from trinity.errors import Overloaded
from trinity.experts.migration import migrate_in
from trinity.models.common.decoder import CausalLM
from trinity.models.registry import build, family_of
from trinity.placement.table import Expert, PlacementTable
from trinity.pool.local import local_pool
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Copy, Load, PruneTo
from trinity.utils.trying import tried

VOCAB, LONGEST, NUM_WEIGHTS, NUM_SHARDS = 40, 60, 3, 3
TINY = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8}
CONFIG = type(preset("tiny")).model_validate(
    {**preset("tiny").model_dump(), **TINY, "num_dense_layers": 2, "num_experts": 4, "sliding_window": 9}
)


class Characters(FakeTokenizer):
    """A tokenizer whose tokens are characters; bad words are read by it, too."""

    def encode_batch(self, texts, add_special=False):
        return [[ord(character) - 65 for character in text.strip()] for text in texts]


class Moving:
    """The placement as callers see it, which changes."""

    unreachable, distances = frozenset[str](), {}

    def __init__(self, table: PlacementTable):
        self.table = table

    def mark_unreachable(self, shard):
        raise AssertionError(f"{shard} is always there")

    def refresh(self):
        pass


class Weights(NamedTuple):
    model: CausalLM
    pool: ExpertPool


@lru_cache
def weights(number: int, num_shards: int, config: ModelConfig = CONFIG) -> Weights:
    """The same numbers, over so many shards."""
    pool = local_pool(config, Load(seed=number, training=False), num_shards=num_shards)
    pool.view = Moving(pool.table)
    model = build(config, pool.dispatcher())
    family_of(config).init_weights(model, number)
    noise = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return Weights(model.eval(), pool)


def move(expert: Expert, shard: str, is_copy: bool) -> None:
    """Have a shard hold an expert, as the placement service does it; others keep it only for `is_copy`."""
    for number in range(NUM_WEIGHTS):
        pool = weights(number, NUM_SHARDS).pool
        old, (layer, at) = pool.table, expert
        holders = [old.shards[holder] for holder in old.holders(expert)]
        new = old if shard in holders else old.with_replica(expert, shard)
        for other in () if is_copy else holders:
            new = new.without_replica(expert, other) if other != shard else new
        _publish(pool, new.renewed() if new is old else new, {shard: (layer, at, holders[0])})


def settle() -> None:
    """All experts where they were at first."""
    for number in range(NUM_WEIGHTS):
        pool = weights(number, NUM_SHARDS).pool
        first = PlacementTable.spread(CONFIG.moe_layers, CONFIG.num_experts, pool.table.shards)
        if pool.table.replicas != first.replicas:
            for layer in first.layers:
                for at in range(CONFIG.num_experts):
                    [home] = first.holders((layer, at))
                    move((layer, at), first.shards[home], is_copy=False)


def _publish(pool: ExpertPool, table: PlacementTable, copies: dict[str, tuple[int, int, str]]) -> None:
    shards = pool.transport.shards
    for shard, (layer, at, source) in copies.items():
        if at not in pool.table.experts_of(shard).get(layer, ()):
            message = Copy(layer, (at,), (source,), 0, float("inf"), 0, table.epoch)
            migrate_in(shards[shard], message, pool.transport, None)
    pool.view.table = table
    for name, shard in shards.items():
        shard.prune_to(PruneTo(table.experts_of(name), table.epoch))


class Run:
    """Weights of a run that goes on: version v has those of a number. Who holds a version is counted, by its name."""

    def __init__(self) -> None:
        self.version, self.holders = 1, Counter[tuple[str, int]]()

    def number(self, version: int) -> int:
        return version % NUM_WEIGHTS

    def is_held(self, version: int) -> bool:
        return any(num for (_, held), num in self.holders.items() if held == version)


class Source:
    """A WeightSource of one engine."""

    def __init__(self, run: Run, name: str):
        self.run, self.name = run, name

    def newest(self) -> int:
        return self.run.version

    def model(self, version: int) -> CausalLM:
        assert version == self.run.version or self.run.is_held(version), "an old version is used and not held"
        return weights(self.run.number(version), NUM_SHARDS).model

    def hold(self, version: int) -> None:
        self.run.holders[self.name, version] += 1

    def release(self, version: int) -> None:
        self.run.holders[self.name, version] -= 1
        assert self.run.holders[self.name, version] >= 0, "a version was released more often than held"

    def quarantine(self, version: int) -> None:
        raise AssertionError(f"version {version} is sound")


class Free(PassCost):
    """Says that drafts cost nothing, so that all there are are tried."""

    def share(self, num_tokens):
        return 0.0


class Guided(Speculation):
    """Drafts that come true for a while: what the monolith says at the newest version, every third token another one."""

    def __init__(self, most: int, run: Run, settings: "dict[str, object]"):
        super().__init__(most)
        self._run, self._settings = run, settings

    def draft(self, sequence, room):
        begun = Begun(tuple(sequence.generated_ids))
        number = self._run.number(sequence.version)
        said = rest(number, sequence.prompt_ids, sequence.params, begun, self._settings)
        right = [token for delta in said for token in delta.token_ids][: max(0, min(room, self.most))]
        at = sequence.num_generated
        return tuple(t if (at + i) % 3 else (t + 1) % VOCAB for i, t in enumerate(right))


RESTS: dict[object, list] = {}


def rest(number: int, prompt: tuple, params: SamplingParams, begun: Begun, settings: "dict[str, object]") -> list:
    """Deltas of the monolith, each of one token, of an answer that has `begun`."""
    params = params.model_copy(update={"version_policy": "live", "priority": 0})
    key = number, prompt, params.model_dump_json(), begun, tuple(settings.items())
    if key not in RESTS:
        engine = engine_of(FixedWeights(weights(number, 1).model, 0), prefix_cache=False, **settings)
        engine.add("one", prompt, params, begun=begun)
        RESTS[key] = run_all(engine)["one"]
    return RESTS[key]


def engine_of(source, tier: TierPlace | None = None, **fields) -> Engine:
    base = {"max_model_len": LONGEST, "kv_cache_bytes": 1 << 20, "max_num_seqs": 8, "block_size": 4}
    engine = Engine(source, CONFIG, EngineConfig(**base | {"max_draft_tokens": 0} | fields), Characters(), tier=tier)
    assert engine._runner._is_exact
    return engine


class Asked(NamedTuple):
    """A request, what its caller has of the answer, and the Deltas."""

    prompt: tuple[int, ...]
    params: SamplingParams
    client: Client
    answer: Answer
    deltas: list


class World:
    """A run's weights, engines over them, and callers who go on with another engine where one is lost."""

    def __init__(
        self, engines: "list[tuple[dict[str, object], bool]]", numbers: "dict[str, object]", tier_bytes: int = 0
    ):
        """`engines`: settings of each, and whether its drafts are guided; `numbers`: settings that change what is computed;
        `tier_bytes`: of the tier that all engines share."""
        self.run, self._settings, self._numbers = Run(), engines, numbers
        self._folder = Path(tempfile.mkdtemp()) / "tier"
        self._tier = TierPlace(self._folder, tier_bytes, lambda version: "the run") if tier_bytes else None
        self._handing: dict[
            str, int
        ] = {}  # prompts that an engine computes for another one: their requests go to that one
        self.asked: dict[str, Asked] = {}
        self._later: list[tuple[str, int]] = []  # those that no engine takes now, and the next one to ask
        self._num = self._num_asked = 0
        self.engines = [self._engine(at) for at in range(len(engines))]

    def _engine(self, at: int) -> Engine:
        self._num += 1
        settings, is_guided = self._settings[at]
        engine = engine_of(Source(self.run, f"engine {self._num}"), self._tier, **settings | self._numbers)
        drafts = engine._drafts
        if is_guided and drafts.most:
            engine._drafts = engine._scheduler.drafts = Guided(drafts.most, self.run, self._numbers)
        drafts._cost, begin = Free(), drafts.begin
        drafts.begin = lambda running, _: begin(running, 1e6)  # all there is to learn, whatever it takes
        return engine

    def ask(
        self, at: int, prompt: tuple, params: SamplingParams, client: Client = ANYBODY, is_handed: bool = False
    ) -> None:
        """Ask one engine; `is_handed`: one engine for the prompt, and then another one for the answer."""
        name = str(self._num_asked)
        self._num_asked += 1
        keep = (lambda version: self._keep(name, version)) if params.version_policy == "pinned" else None
        self.asked[name] = Asked(prompt, params, client, Answer(keep), [])
        if not is_handed:
            self._send(name, at)
            return
        alone = SamplingParams(max_tokens=0, priority=params.priority, version_policy=params.version_policy)
        self._handing[name] = at + 1
        if isinstance(
            tried(partial(self.engines[at % len(self.engines)].add, name, prompt, alone, client), Overloaded),
            Overloaded,
        ):
            self._go_on(name)

    def _go_on(self, name: str, handed: Handed = NOT_HANDED) -> None:
        self._send(name, self._handing.pop(name), handed)

    def _hand_over(self, engine: Engine, delta) -> None:
        """A prompt is computed: have it where the other engine finds it."""
        one, prefixes = self.asked[delta.request_id], engine.prefixes
        if prefixes.tier is not None:
            keys = prefixes.keys_of(one.prompt[:-1], SamplingParams(), one.client, None)
            prefixes.tier.save(keys, delta.version, delta.version)
        self._go_on(delta.request_id, Handed(delta.version))

    def _keep(self, name: str, version: int) -> None:
        self.run.holders[f"caller of {name}", version] += 1

    def _send(self, name: str, at: int, handed: Handed = NOT_HANDED) -> None:
        one, at = self.asked[name], at % len(self.engines)
        begun = one.answer.begun if one.deltas else None
        try:
            self.engines[at].add(name, one.prompt, one.params, one.client, begun=begun, handed=handed)
        except Overloaded as full:
            if begun is None:
                self._end(name, full)
            else:
                self._later.append((name, at + 1))

    def _end(self, name: str, cause) -> None:
        """Refused, before it began."""
        assert isinstance(cause, Overloaded)
        assert not self.asked.pop(name).deltas

    def abort(self, name: str) -> None:
        if name in self._handing:
            return
        for engine in self.engines:
            if (delta := engine.abort(name)) is not None:
                self._take(delta, engine)
            engine.check()

    def move(self, expert: Expert, shard: int, is_copy: bool) -> None:
        move(expert, f"shard-{shard}", is_copy)

    def commit(self) -> None:
        self.run.version += 1

    def drop(self, at: int) -> None:
        """An engine is gone, with what it holds; its requests go on elsewhere, and another one starts in its place."""
        at %= len(self.engines)
        lost = self.engines[at]
        lost_names, name = list(lost._sequences), lost._versions._source.name
        for key in [key for key in self.run.holders if key[0] == name]:
            del self.run.holders[key]
        if lost.prefixes.tier is not None:
            os.close(lost.prefixes.tier._user._fd)  # what the kernel does for the dead
        self.engines[at] = self._engine(at)
        for each in lost_names:
            if each in self._handing:
                self._go_on(each)
            else:
                self._send(each, at + 1)
        for delta in lost._refused:
            self._take(delta, lost)

    def step(self) -> None:
        later, self._later = self._later, []
        for name, at in later:
            self._send(name, at)
        for engine in self.engines:
            for delta in engine.step():
                self._take(delta, engine)
            engine.check()

    def _take(self, delta, engine: Engine) -> None:
        name = delta.request_id
        if name in self._handing and delta.finish_reason == "error":
            self._go_on(name)
            return
        if name in self._handing:
            self._hand_over(engine, delta)
            return
        if delta.finish_reason == "error":
            self._end(name, delta.cause)
            return
        one = self.asked[name]
        one.answer.add(delta)
        one.deltas.append(delta)
        if delta.finish_reason:
            for key in [key for key in self.run.holders if key[0] == f"caller of {name}"]:
                del self.run.holders[key]

    def finish(self) -> None:
        """Step until all have their answers; then nothing is held any more."""
        for _ in range(5000):
            if not (self._later or any(engine.has_work for engine in self.engines)):
                break
            self.step()
        assert all(one.deltas and one.deltas[-1].finish_reason for one in self.asked.values()), "someone still waits"
        for engine in self.engines:
            assert engine.step() == [], "there is nothing to do but to look which version is the newest"
            stats = engine.stats()
            assert (stats.num_free_blocks, stats.num_versions_held) == (stats.num_total_blocks, 0)
            assert (stats.num_running, stats.num_waiting) == (0, 0)
            engine.check()
        lives = {engine._versions._source.name for engine in self.engines}
        held = +self.run.holders
        for engine in self.engines:
            engine.prefixes.close()
        assert not self._folder.exists(), "the last engine takes along what is in shared memory"
        self._folder.parent.rmdir()
        assert all(name in lives and version == self.run.version and num == 1 for (name, version), num in held.items())

    def compare(self, name: str) -> None:
        """Hold an answer against the monolith's, from each change of its version on."""
        one = self.asked[name]
        deltas = list(one.deltas)
        aborted = deltas.pop() if deltas[-1].finish_reason == "abort" else None
        had: tuple[int, ...] = ()
        assert one.params.version_policy == "live" or len({delta.version for delta in deltas}) <= 1
        while deltas:
            version = deltas[0].version
            own = [delta for delta in deltas if delta.version == version]
            deltas = deltas[len(own) :]
            wanted = rest(self.run.number(version), one.prompt, one.params, Begun(had), self._numbers)
            found = joined(own)
            assert told(found) == told(joined(wanted[: len(found.token_ids) or 1]))
            had += found.token_ids
        assert aborted is None or aborted.num_generated_tokens == len(had)


def told(delta) -> tuple:
    """All that a caller is told of an answer, but for versions and what was cached."""
    scores = delta.prompt_logprobs
    scored = None if scores is None else [scores.token_ids_T.tolist(), scores.positions(0, len(scores))]
    routed = None if delta.experts_TLK is None else delta.experts_TLK.tolist()
    plain = replace(delta, request_id="", version=0, first_version=0, num_cached_tokens=0, prompt_logprobs=None)
    return plain, scored, routed
