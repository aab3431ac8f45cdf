"""The world of the oracle's trace (test_oracle.py): engines that come and go over weights that change (oracle_weights.py),
callers who go on with another engine where one is lost, and what one engine alone says to the same request.

The monolith has all experts on one shard, no cache and no drafts, and computes each request alone and whole; where an answer's
version changed it goes on from there.
"""

import os
import tempfile
from collections import deque
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby, takewhile
from pathlib import Path
from typing import NamedTuple

from serving.continuation import Answer
from serving.roles import Roles
from tests.unit.engine_fakes import FakeTokenizer, run_all
from tests.unit.oracle_weights import CONFIG, VOCAB, Adapters, Run, Source, move, weights
from trinity.config import ANYBODY, Client, EngineConfig
from trinity.engine.begun import NOT_HANDED, Begun, Handed
from trinity.engine.deltas import joined
from trinity.engine.engine import Engine
from trinity.engine.kv_tier import TierPlace
from trinity.engine.request import Delta, SamplingParams
from trinity.engine.speculation import PassCost, Speculation
from trinity.engine.weights import FixedWeights
from trinity.errors import Overloaded, VersionGone
from trinity.models.common.adapted import BackboneAdapter
from trinity.placement.table import Expert
from trinity.utils.lines import oldest_of
from trinity.utils.trying import tried

LONGEST, HELD_S = 60, 1e6


class Characters(FakeTokenizer):
    """A tokenizer whose tokens are characters; bad words are read by it, too."""

    def encode_batch(self, texts, add_special=False):
        return [[ord(character) - 65 for character in text.strip()] for text in texts]


adapters = lru_cache(Adapters)


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
        asked = sequence.prompt_ids, sequence.params, begun, sequence.adapter
        said = rest(self._run.number(sequence.version), *asked, self._settings)
        right = [token for delta in said for token in delta.token_ids][: max(0, min(room, self.most))]
        at = sequence.num_generated
        return tuple(t if (at + i) % 3 else (t + 1) % VOCAB for i, t in enumerate(right))


RESTS: dict[object, list] = {}


def rest(
    number: int,
    prompt: tuple,
    params: SamplingParams,
    begun: Begun,
    adapter: BackboneAdapter | None,
    settings: "dict[str, object]",
) -> list:
    """Deltas of the monolith, each of one token, of an answer that has `begun`."""
    params = params.model_copy(update={"version_policy": "live", "priority": 0, "cache_salt": None})
    key = number, prompt, params.model_dump_json(), begun, adapter, tuple(settings.items())
    if key not in RESTS:
        engine = engine_of(FixedWeights(weights(number, 1).model, 0), prefix_cache=False, **settings)
        engine.add("one", prompt, params, begun=begun, adapter=adapter)
        RESTS[key] = run_all(engine)["one"]
    return RESTS[key]


def engine_of(source, tier: TierPlace | None = None, **fields) -> Engine:
    base = {"max_model_len": LONGEST, "kv_cache_bytes": 1 << 20, "max_num_seqs": 8, "block_size": 4}
    engine = Engine(source, CONFIG, EngineConfig(**base | {"max_draft_tokens": 0} | fields), Characters(), tier=tier)
    assert engine._runner._is_exact
    return engine


class Fleet(NamedTuple):
    """Engines of a trace: settings of each, and whether its drafts are guided; settings that change what is computed; the bytes
    of the tier that all share; how old what live requests use may be; who computes prompts at first."""

    engines: "list[tuple[dict[str, object], bool]]"
    numbers: "dict[str, object]"
    tier_bytes: int
    age: "int | str"
    roles: tuple


@dataclass
class Asked:
    """A request, what its caller has of the answer, and each Delta with the number of the weights that made it."""

    prompt: tuple[int, ...]
    params: SamplingParams
    client: Client
    adapter: BackboneAdapter | None
    answer: Answer
    said: list[tuple[Delta, int]] = field(default_factory=list)
    is_over: bool = False


@dataclass
class Way:
    """A prompt that one engine computes for another, `place`; after that so many steps pass before this one hears of it."""

    place: int
    pause: int
    handed: Handed | None = None


class Member(NamedTuple):
    started: int
    engine_id: str


class World:
    """A run's weights, engines over them, and callers who go on with another engine where one is lost."""

    def __init__(self, fleet: Fleet):
        self.fleet, self.run, self.adapters = fleet, Run(), adapters()
        self._folder = Path(tempfile.mkdtemp()) / "tier"
        self._tier = TierPlace(self._folder, fleet.tier_bytes, self.run.line) if fleet.tier_bytes else None
        self._handing = dict[str, Way]()
        self.asked = dict[str, Asked]()
        self._later = list[tuple[str, int]]()  # those that no engine takes now, and the next one to ask
        self._num = self._num_asked = 0
        self.engines = [self._engine(at) for at in range(len(fleet.engines))]
        self.roles = Roles(0, ("both",))
        self.set_roles(fleet.roles)

    def _engine(self, at: int) -> Engine:
        self._num += 1
        settings, is_guided = self.fleet.engines[at]
        more = {**settings, **self.fleet.numbers, "kv_max_age": self.fleet.age}
        engine = engine_of(Source(self.run, f"engine {self._num:03}"), self._tier, **more)
        engine._scheduler.recall_s = 0.0  # of the tier a piece before each pass
        drafts = engine._drafts
        if is_guided and drafts.most:
            engine._drafts = engine._scheduler.drafts = Guided(drafts.most, self.run, self.fleet.numbers)
        drafts._cost, begin = Free(), drafts.begin
        drafts.begin = lambda running, _: begin(running, 1e6)  # all there is to learn, whatever it takes
        return engine

    # -- what callers and operators do

    def ask(self, at, prompt, params, client=ANYBODY, adapter=None, is_long=False, pause=0) -> None:
        """Ask one engine; where it `is_long` and engines have roles, one for the prompt, and then another for the answer."""
        name = str(self._num_asked)
        self._num_asked += 1
        keep = (lambda version: self.run.hold(caller(name), version)) if params.version_policy == "pinned" else None
        self.asked[name] = Asked(prompt, params, client, self.adapters.get(adapter), Answer(keep))
        first, second = self._apart()
        if not (is_long and first and second):
            self._send(name, at)
            return
        self._handing[name] = Way(second[at % len(second)], pause)
        alone, one = alone_of(params), self.asked[name]
        engine = self.engines[first[at % len(first)]]
        add = partial(engine.add, name, prompt, alone, client, adapter=one.adapter, handed=Handed(held_s=HELD_S))
        if isinstance(tried(add, Overloaded), Overloaded):
            self._go_on(name)

    def _apart(self) -> tuple[list[int], list[int]]:
        """-> places of the engines that compute prompts, and of those that answer."""
        members = [Member(0, name_of(engine)) for engine in self.engines]
        roles = [self.roles.of(members)[member.engine_id] for member in members]
        return [at for at, role in enumerate(roles) if role == "prefill"], [
            at for at, role in enumerate(roles) if role != "prefill"
        ]

    def set_roles(self, names: tuple) -> None:
        self.roles = self.roles.after(names)
        first, _ = self._apart()
        for at, engine in enumerate(self.engines):
            engine.give_way(at in first)

    def abort(self, name: str) -> None:
        if name not in self.asked or self.asked[name].is_over:
            return
        deltas = [(engine, delta) for engine in self.engines if (delta := engine.abort(name)) is not None]
        if self._handing.pop(name, None) is not None:
            del self.asked[name]
        elif deltas:
            [(engine, delta)] = deltas
            self._take(delta, engine)
        else:
            self._later = [each for each in self._later if each[0] != name]
            self._over(name)
        for engine in self.engines:
            engine.check()

    def move(self, expert: Expert, shard: int, is_copy: bool) -> None:
        move(expert, f"shard-{shard}", is_copy)

    def commit(self) -> None:
        self.run.commit()

    def go_back(self, num_steps: int, num_after: int) -> None:
        """The run goes back, and on from there before engines hear of it."""
        self.run.go_back(num_steps)
        for _ in range(num_after):
            self.run.commit()

    def lose(self) -> None:
        self.run.lose()

    def drop(self, at: int) -> None:
        """An engine is gone, with what it holds; its requests go on elsewhere, and another one starts in its place."""
        at %= len(self.engines)
        lost = self.engines[at]
        names = list(lost._sequences)
        self.run.drop(name_of(lost))
        if lost.prefixes.tier is not None:
            os.close(lost.prefixes.tier._user._fd)  # what the kernel does for the dead
        self.engines[at] = self._engine(at)
        self.set_roles(self.roles.names)
        for each in names:
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
        for name, way in [(name, way) for name, way in self._handing.items() if way.handed is not None]:
            way.pause -= 1
            if way.pause < 0:
                self._go_on(name, way.handed)
        for engine in self.engines:
            for delta in engine.step():
                self._take(delta, engine)
            engine.check()

    # -- what becomes of requests

    def _send(self, name: str, at: int, handed: Handed = NOT_HANDED) -> None:
        one, at = self.asked[name], at % len(self.engines)
        begun = one.answer.begun if one.said else None
        more = {"begun": begun, "handed": handed, "adapter": one.adapter}
        try:
            self.engines[at].add(name, one.prompt, one.params, one.client, **more)
        except Overloaded as full:
            if begun is None:
                self._refused(name, full)
            else:
                self._later.append((name, at + 1))

    def _refused(self, name: str, cause) -> None:
        assert isinstance(cause, Overloaded)
        assert not self.asked.pop(name).said

    def _hand_over(self, delta: Delta, engine: Engine) -> None:
        """A prompt is computed: have it where the other engine finds it, which hears of it now or later."""
        way, one, prefixes = self._handing[delta.request_id], self.asked[delta.request_id], engine.prefixes
        if prefixes.tier is not None:
            ref = one.adapter and one.adapter.ref
            keys = prefixes.keys_of(one.prompt[:-1], one.params, one.client, ref)
            age = engine.settings.max_age if one.params.version_policy == "live" else 0
            prefixes.tier.save(keys, oldest_of(delta.weights, age), delta.weights)
        way.handed = Handed(delta.weights, delta.num_cached_tokens)
        if not way.pause:
            self._go_on(delta.request_id, way.handed)

    def _go_on(self, name: str, handed: Handed = NOT_HANDED) -> None:
        self._send(name, self._handing.pop(name).place, handed)

    def _take(self, delta: Delta, engine: Engine) -> None:
        name, is_error = delta.request_id, delta.finish_reason == "error"
        if name in self._handing:
            self._go_on(name) if is_error else self._hand_over(delta, engine)
        elif is_error and isinstance(delta.cause, VersionGone):
            one = self.asked[name]
            assert one.params.version_policy == "pinned", "a live one goes on at another version"
            assert one.said, "one without a token starts again"
            assert one.said[-1][0].weights in self.run.lost
            self._over(name)
        elif is_error:
            self._refused(name, delta.cause)
        else:
            self.asked[name].answer.add(delta)
            self.asked[name].said.append((delta, self.run.number(delta.weights)))
            if delta.finish_reason:
                self._over(name)

    def _over(self, name: str) -> None:
        self.asked[name].is_over = True
        self.run.drop(caller(name))

    # -- the end

    def finish(self) -> None:
        """Step until all have their answers; then nothing is held any more."""
        for _ in range(5000):
            if not (self._later or self._handing or any(engine.has_work for engine in self.engines)):
                break
            self.step()
        assert all(one.is_over for one in self.asked.values()), "someone still waits"
        for engine in self.engines:
            held = engine._versions._handed_over
            engine._versions._handed_over = deque((0.0, version) for _, version in held)
            assert engine.step() == [], "there is nothing to do but to look which version is the newest"
            stats = engine.stats()
            assert (stats.num_free_blocks, stats.num_versions_held) == (stats.num_total_blocks, 0)
            assert (stats.num_running, stats.num_waiting) == (0, 0)
            engine.check()
        lives = {name_of(engine) for engine in self.engines}
        held = +self.run.holders
        for engine in self.engines:
            engine.prefixes.close()
        assert not self._folder.exists(), "the last engine takes along what is in shared memory"
        self._folder.parent.rmdir()
        assert all(name in lives and version == self.run.version and num == 1 for (name, version), num in held.items())

    def compare(self, name: str) -> None:
        """Hold an answer against the monolith's, from each change of its version on; where it may use what is older, as far as
        it says that it did not."""
        one = self.asked[name]
        said = list(one.said)
        aborted = said.pop()[0] if said and said[-1][0].finish_reason == "abort" else None
        had: tuple[int, ...] = ()
        if one.params.version_policy == "pinned":
            assert len({(delta.weights, number) for delta, number in said}) <= 1, "of one version"
        elif self.fleet.age != 0:
            said = self._alone(said)
        assert not said or said[0][0].first_version == said[0][0].version
        for number, deltas in groupby(said, key=lambda each: each[1]):
            own = [delta for delta, _ in deltas]
            wanted = rest(number, one.prompt, one.params, Begun(had), one.adapter, self.fleet.numbers)
            found = joined(own)
            assert told(found) == told(joined(wanted[: len(found.token_ids) or 1]))
            had += found.token_ids
        if aborted is not None and (one.params.version_policy == "pinned" or self.fleet.age == 0):
            assert aborted.num_generated_tokens == len(had)

    def _alone(self, said: list[tuple[Delta, int]]) -> list[tuple[Delta, int]]:
        """The beginning that one version has made by itself, as its Deltas say; what is older is not too old."""
        if not said:
            return []
        first = said[0][0]
        assert first.first_version <= first.version
        assert self.fleet.age == "unbounded" or first.version - first.first_version <= self.fleet.age
        is_alone = lambda each: {each[0].first_version, each[0].version} == {first.version}  # noqa: E731
        return list(takewhile(is_alone, said))


def alone_of(params: SamplingParams) -> SamplingParams:
    """What an engine is asked that computes the prompt alone (AsyncEngine.prefill)."""
    names = ("priority", "version_policy", "cache_salt")
    return SamplingParams(max_tokens=0, temperature=0.0, **{name: getattr(params, name) for name in names})


def name_of(engine: Engine) -> str:
    return engine._versions._source.name


def caller(name: str) -> str:
    return f"caller of {name}"


def told(delta) -> tuple:
    """All that a caller is told of an answer, but for versions and what was cached."""
    scores = delta.prompt_logprobs
    scored = None if scores is None else [scores.token_ids_T.tolist(), scores.positions(0, len(scores))]
    routed = None if delta.experts_TLK is None else delta.experts_TLK.tolist()
    plain = replace(delta, request_id="", version=0, first_version=0, line=0, num_cached_tokens=0, prompt_logprobs=None)
    return plain, scored, routed
