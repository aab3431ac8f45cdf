"""The engine while its weights change: every token is what a monolith with the same versions gives, and nobody falls out.

The oracle (`next_token`) takes the version of the pass and that of each cached position, and computes the text so far anew.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_fakes import VOCAB, FakeSource, fake_config, fake_engine, next_token
from trinity.engine import repeats
from trinity.engine.request import SamplingParams, Sequence
from trinity.engine.versions import Versions
from trinity.errors import Code, VersionGone
from trinity.text.detokenizer import TextStream

WINDOW = 5
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PINNED = GREEDY.model_copy(update={"version_policy": "pinned"})
MAX_LEN = 24


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(repeats, "PAUSE_S", 0.0)


class Watch:
    """An engine over a FakeSource, and a record of which version computed each cached position, in each kind of layer, and each
    token; with what is read of the prefix cache, too."""

    def __init__(self, **settings):
        self.source = FakeSource(fake_config(WINDOW))
        base = {"max_model_len": MAX_LEN, "block_size": 2}
        self.engine = fake_engine(self.source.config, source=self.source, **base | settings)
        self.cached: dict[str, list[int]] = {}  # of the layer that sees everything
        self.windows: dict[str, list[int]] = {}  # of the other one
        self.blocks: dict[tuple[str, int], list[int]] = {}
        self.tokens: dict[str, list[tuple[int, int, tuple[int, ...]]]] = {}  # token, version, versions of the cache
        self.looks: dict[str, list[tuple[int, ...]]] = {}  # versions of the window, for each token
        self.asked, self.ended, self.prompts, self.none_was_good = {}, {}, {}, {}
        self._accept, self.engine._accept_pass = self.engine._accept_pass, self.watched
        prefixes = self.engine.prefixes
        self._begin, prefixes.begin = prefixes.begin, self.begun
        self._computed, prefixes.computed = prefixes.computed, self.computed

    def add(self, name, prompt, params):
        self.engine.add(name, prompt, params)
        self.asked[name], self.prompts[name], self.tokens[name], self.looks[name] = params, list(prompt), [], []

    def kinds(self, name):
        """The record, the layer's window and its table."""
        full, sliding = self.engine._cache.tables.values()
        return (self.cached.setdefault(name, []), "full", full), (self.windows.setdefault(name, []), "sliding", sliding)

    def begun(self, sequence, hit):
        self._begin(sequence, hit)
        size = self.engine.settings.block_size
        for (record, kind, _), blocks in zip(self.kinds(sequence.request_id), hit.blocks.values(), strict=False):
            found = [version for block in blocks for version in self.blocks[kind, block]]
            record[:] = [hit.oldest] * (hit.num_blocks * size - len(found)) + found
            assert all(hit.oldest <= version <= hit.newest for version in found)

    def computed(self, chunk):
        sequence, size = chunk.sequence, self.engine.settings.block_size
        for record, _, _ in self.kinds(sequence.request_id):
            record[chunk.start :] = [sequence.version] * chunk.count
        places = range(chunk.start // size, chunk.end // size)
        held = [
            (kind, place, int(table.block_NC[chunk.row, place]))
            for _, kind, table in self.kinds(sequence.request_id)
            for place in places
        ]
        self._computed(chunk)
        for kind, place, block in held:
            record = self.cached if kind == "full" else self.windows
            self.blocks[kind, block] = record[sequence.request_id][place * size : (place + 1) * size]

    def watched(self, each, result):
        version, _ = each
        deltas = self._accept(each, result)
        for delta in deltas:
            name = delta.request_id
            if delta.finish_reason == "error":
                self.none_was_good[name] = self.source.known <= self.source.poisoned
            if delta.token_ids:
                assert delta.version == version
                assert not self.source.quarantined & {*self.cached[name], *self.windows[name][-WINDOW:]}
                self.tokens[name].append((*delta.token_ids, version, tuple(self.cached[name])))
                self.looks[name].append(tuple(self.windows[name]))
        return deltas

    def step(self, times=1):
        for _ in range(times):
            deltas = self.engine.step()
            self.ended |= {d.request_id: d for d in deltas if d.finish_reason}
            self.engine.check()

    def abort(self, name):
        if delta := self.engine.abort(name):
            self.ended[name] = delta

    def finish(self):
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.step()
        assert set(self.ended) == set(self.asked), "a request never ended"
        stats = self.engine.stats()
        assert (stats.num_free_blocks, stats.num_versions_held) == (stats.num_total_blocks, 0)

    def check_tokens(self, name):
        """Each token against the monolith."""
        ids = list(self.prompts[name])
        for (token, version, cached), looks in zip(self.tokens[name], self.looks[name], strict=True):
            assert len(cached) == len(looks) == len(ids)
            assert token == next_token(WINDOW, version, (looks, cached), ids, len(self.prompts[name]), self.asked[name])
            ids.append(token)

    def versions(self, name):
        return [version for _, version, _ in self.tokens[name]]


def test_live_requests_take_up_a_version_at_once_and_pinned_ones_never():
    watch = Watch()
    watch.add("live", [1, 2, 3], GREEDY)
    watch.add("pinned", [2, 2, 3], PINNED)
    for _ in range(12):
        watch.step()
        watch.source.commit()
    assert watch.versions("live") == list(range(1, 13))
    assert watch.versions("pinned") == [1] * 12
    last = watch.ended["live"]
    assert (last.first_version, last.version) == (1, 12)
    assert (watch.ended["pinned"].first_version, watch.ended["pinned"].version) == (1, 1)
    for name in ("live", "pinned"):
        watch.check_tokens(name)
    assert watch.source.held[1] == 0


def test_what_is_cached_gets_as_old_as_the_setting_allows():
    for most in (0, 3, "unbounded"):
        watch = Watch(kv_max_age=most)
        watch.add("a", [1, 2, 3], GREEDY)
        for _ in range(12):
            watch.step()
            watch.source.commit()
        for number, (_, version, cached) in enumerate(watch.tokens["a"]):
            assert version == 1 + number
            oldest = 1 if most == "unbounded" else version - number % (most + 1)
            assert list(cached) == [oldest] * (3 + oldest - 1) + list(range(oldest + 1, version + 1))
        watch.check_tokens("a")


def test_recompute_goes_on_although_versions_change_faster_than_contexts_are_computed():
    """Passes of 4 tokens, contexts of 12 and more, a version each pass; later requests are not left out either."""
    watch = Watch(kv_max_age=0, max_num_batched_tokens=4)
    watch.add("a", list(range(12)), GREEDY)
    watch.add("b", list(range(10)), GREEDY.model_copy(update={"max_tokens": 4}))
    for _ in range(200):
        watch.step()
        watch.source.commit()
    watch.finish()
    for name in "ab":
        assert watch.ended[name].finish_reason == "length"
        assert all(set(cached) == {version} for _, version, cached in watch.tokens[name])
        watch.check_tokens(name)
    assert len(set(watch.versions("a"))) > 3, "it does follow"
    assert watch.source.held[watch.engine.version] == 1
    assert sum(watch.source.held.values()) == 1, "just the live one"


def test_so_many_versions_are_held_and_then_the_newest_of_those():
    watch = Watch(max_versions=2, max_model_len=64)
    for number in range(5):
        watch.add(str(number), [1, 2], PINNED.model_copy(update={"max_tokens": 20}))
        watch.step()
        watch.source.commit()
    watch.step()
    assert watch.engine.stats().num_versions_held == 2
    assert [watch.versions(str(n))[0] for n in range(5)] == [1, 2, 2, 2, 2]
    watch.abort("0")
    watch.add("5", [1, 2], PINNED)
    watch.finish()
    assert set(watch.versions("5")) == {6}
    for name in watch.asked:
        watch.check_tokens(name)


def test_a_withdrawn_version_leaves_nothing_in_the_cache():
    watch = Watch(kv_max_age="unbounded")
    watch.add("live", [1, 2, 3], GREEDY)
    watch.add("pinned", [4, 5], PINNED)
    watch.step(2)
    watch.source.commit()
    watch.add("pinned to it", [6], PINNED)
    watch.step(2)
    watch.source.roll_back()
    watch.finish()
    assert watch.versions("live") == [1, 1, 2, 2] + [1] * 8
    assert [len(set(cached)) for _, _, cached in watch.tokens["live"]] == [1, 1, 2, 2] + [1] * 8
    assert set(watch.versions("pinned to it")) == {2}
    assert (watch.ended["live"].first_version, watch.ended["live"].version) == (1, 1)
    for name in watch.asked:
        watch.check_tokens(name)


def test_a_damaged_version_is_reported_and_no_request_fails():
    """It comes while one decodes and another has half of its prompt in the cache."""
    watch = Watch(max_num_batched_tokens=6)
    watch.add("decodes", [1, 2, 3], GREEDY)
    watch.step()
    watch.add("prefills", list(range(14)), GREEDY.model_copy(update={"max_tokens": 4}))
    watch.add("pinned", [7, 8], PINNED)
    watch.source.commit(poisoned=True)
    watch.finish()
    assert watch.source.quarantined == {2}
    assert {d.finish_reason for d in watch.ended.values()} == {"length"}
    for name in watch.asked:
        assert set(watch.versions(name)) == {1}
        assert all(set(cached) == {1} for _, _, cached in watch.tokens[name])
        watch.check_tokens(name)
    assert watch.engine.stats().num_quarantined == 1
    assert 1 <= watch.engine.stats().num_repeats < 10


def test_what_a_damaged_version_left_in_the_cache_goes_although_a_newer_one_is_there():
    watch = Watch(max_num_batched_tokens=6, kv_max_age="unbounded")
    watch.add("a", list(range(13)), GREEDY)
    watch.step()
    watch.source.commit(poisoned=True)
    watch.step()
    assert watch.cached["a"] == [1] * 6 + [2] * 6
    quarantine = watch.source.quarantine
    watch.source.quarantine = lambda version: (watch.source.commit(), quarantine(version))
    watch.finish()
    assert set(watch.versions("a")) == {3}
    assert watch.cached["a"][:7] == [1] * 6 + [3], "what is older is found again"
    assert 2 not in watch.cached["a"]
    watch.check_tokens("a")


def test_damage_that_a_pinned_request_finds_clears_the_cache_of_live_ones():
    """Not all rows show it: some have used the version, and what they cached of it, without a sign."""
    source = FakeSource(fake_config(WINDOW))
    source.commit()
    source.commit()
    versions = Versions(source, 2, None)
    used, later = (Sequence(name, (1, 2), GREEDY, TextStream(None)) for name in ("used", "later"))
    used.computed(0, 1, 2)
    used.computed(1, 2, 3)
    later.computed(0, 2, 3)
    assert versions.quarantine(2)
    versions.follow([used, later])
    assert (used.num_computed, later.num_computed, versions.live) == (0, 2, 3)


@pytest.mark.parametrize("is_lost", [False, True])
def test_recompute_does_not_wait_at_a_version_that_is_no_good(is_lost):
    watch = Watch(kv_max_age=0, max_num_batched_tokens=6)
    watch.add("a", list(range(13)), GREEDY)
    watch.step(3)
    watch.source.commit(poisoned=not is_lost)
    watch.step()
    assert watch.cached["a"] == [2] * 6
    watch.source.commit()
    watch.step()
    assert watch.engine.version == 2, "it waits for the first token"
    if is_lost:
        watch.source.lose(2)
    watch.step(2)  # the first meets it
    assert watch.engine.version == 3
    watch.finish()
    assert watch.versions("a") == [1] + [3] * 10
    watch.check_tokens("a")


def test_damage_without_an_older_version_ends_in_an_error():
    watch = Watch()
    watch.source.poisoned.add(1)
    watch.add("a", [1, 2, 3], GREEDY)
    watch.add("b", [1, 2, 3], PINNED)
    watch.finish()
    assert {d.error for d in watch.ended.values()} == {"the model's logits are not finite; its weights are damaged"}
    watch.source.commit()
    watch.add("c", [1, 2, 3], GREEDY)
    watch.finish()
    assert watch.ended["c"].finish_reason == "length"


def test_a_version_that_goes_moves_live_requests_and_ends_pinned_ones_that_have_tokens():
    watch = Watch(max_num_batched_tokens=10)
    watch.add("live", [1, 2, 3], GREEDY)
    watch.add("pinned", [4, 5], PINNED)
    watch.step(3)
    watch.add("starts", [6] * 9, PINNED)  # 8 of them fit the next pass
    watch.step()
    assert watch.cached["starts"] == [1] * 8
    watch.source.commit()
    watch.source.lose(1)
    watch.finish()
    assert watch.versions("live") == [1] * 4 + [2] * 8
    assert set(watch.versions("starts")) == set(watch.cached["starts"]) == {2}
    lost = watch.ended["pinned"]
    assert lost.finish_reason == "error"
    assert isinstance(lost.cause, VersionGone)
    assert lost.cause.code is Code.UNAVAILABLE
    assert len(watch.tokens["pinned"]) == 4
    for name in watch.asked:
        watch.check_tokens(name)


@pytest.mark.parametrize("policy", [GREEDY, PINNED])
def test_shards_of_another_version_are_asked_again_so_many_times_for_each_token(policy):
    watch = Watch()
    watch.add("a", [1, 2, 3], policy)
    for _ in range(3):
        watch.source.conflicts = repeats.MAX_REPEATS
        watch.step(repeats.MAX_REPEATS + 1)
    assert len(watch.tokens["a"]) == 3
    assert watch.engine.stats().num_repeats == 3 * repeats.MAX_REPEATS
    watch.source.conflicts = repeats.MAX_REPEATS + 1
    watch.finish()
    assert isinstance(watch.ended["a"].cause, VersionGone)
    watch.check_tokens("a")


def test_a_pass_has_one_version():
    """Three requests of two versions are two passes; each sees the weights of its own from beginning to end."""
    watch, seen = Watch(), []
    watch.add("pinned", [1, 2], PINNED)
    watch.step()
    watch.source.commit()
    watch.add("live", [3], GREEDY)
    watch.add("more", [4], GREEDY)
    forward = watch.engine._runner.forward
    watch.engine._runner.forward = lambda model, batch: (
        seen.append((model, [c.sequence.request_id for c in batch])) or forward(model, batch)
    )
    watch.step()
    assert [names for _, names in seen] == [["live", "more"], ["pinned"]]
    assert len({model for model, _ in seen}) == 2


def test_without_work_the_newest_version_is_still_looked_at():
    watch = Watch()
    watch.source.commit()
    assert watch.engine.version == 1
    assert watch.engine.step() == []
    assert watch.engine.version == 2


def test_what_is_counted():
    watch = Watch()
    watch.add("a", [1], PINNED)
    watch.step()
    before = watch.engine.stats().switch_seconds
    watch.source.commit()
    watch.add("b", [1], GREEDY)
    watch.step()
    stats = watch.engine.stats()
    assert stats.num_versions_held == 1
    assert 0 < stats.switch_seconds != before


names = st.integers(0, 12).map(str)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8]),
    seed=st.integers(0, 3),
    max_tokens=st.integers(1, 12),
    ignore_eos=st.just(True),
    version_policy=st.sampled_from(["live", "pinned"]),
)
beginnings = st.sampled_from([(), (7, 7, 7, 7), tuple(range(9))])
prompts = st.builds(lambda a, b: (*a, *b), beginnings, st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9))
actions = st.one_of(
    st.tuples(st.just("add"), prompts, params),
    st.tuples(st.just("abort"), names),
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("commit"), st.booleans()),
    st.tuples(st.just("commit"), st.just(False)),
    st.tuples(st.just("roll_back")),
    st.tuples(st.just("lose"), st.integers(0, 3)),
    st.tuples(st.just("conflict"), st.integers(1, 3)),
)


def act(watch, name, *arguments):
    if name == "add":
        watch.add(str(len(watch.asked)), *arguments)
    elif name == "lose":
        known = sorted(watch.source.known)
        watch.source.lose(known[arguments[0] % len(known)])
    elif name == "conflict":
        watch.source.conflicts = arguments[0]
    elif name in ("commit", "roll_back"):
        getattr(watch.source, name)(*arguments)
    else:
        getattr(watch, name)(*arguments)


@settings(max_examples=150, deadline=None)
@given(
    trace=st.lists(actions, max_size=30),
    age=st.sampled_from([0, 0, 1, 3, "unbounded"]),
    is_on=st.booleans(),
    budget=st.integers(2, 20),
    seqs=st.integers(1, 6),
    most=st.integers(1, 3),
    blocks=st.integers(18, 40),
)
def test_any_trace(trace, age, is_on, budget, seqs, most, blocks):
    """Requests come and go, versions are committed (some damaged), rolled back and lost, shards conflict, memory is short."""
    block_bytes = 2 * 2 * 4 * 4 * 2
    watch = Watch(
        kv_max_age=age,
        prefix_cache=is_on,
        max_num_batched_tokens=budget,
        max_num_seqs=seqs,
        max_versions=most,
        kv_cache_bytes=blocks * block_bytes,
    )
    for action in trace:
        act(watch, *action)
        watch.engine.check()
    watch.finish()
    for name, asked in watch.asked.items():
        watch.check_tokens(name)
        caches = [(version, set(cached)) for _, version, cached in watch.tokens[name]]
        if asked.version_policy == "pinned":
            assert len({version for version, _ in caches}) <= 1
            assert all(cached == {version} for version, cached in caches)
        elif age != "unbounded":
            assert all(min(cached) >= version - age for version, cached in caches)
        assert all(max(cached) <= version for version, cached in caches), "withdrawn, but still cached"
        if watch.ended[name].finish_reason == "error" and not watch.none_was_good[name]:
            assert asked.version_policy == "pinned"
            assert caches, "a pinned request without a token starts again"
            assert caches[0][0] in watch.source.gone
    held = {version: count for version, count in watch.source.held.items() if count}
    assert held == ({watch.engine.version: 1} if age != "unbounded" else {})
    assert not torch.is_inference_mode_enabled()
