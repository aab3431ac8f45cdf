"""The KV tier: what an engine need not compute because another one of its node did, or itself before it died, and what it must
never take from there. Computed tokens are counted, never timed. An engine that is killed is one that nobody steps any more.
"""

import os

import numpy as np
import pytest
import torch

from tests.unit.engine_fakes import FakeAfmoe, FakeSource, fake_config, fake_engine, run_all, solo
from trinity.config import AdapterRef, Client, EngineConfig
from trinity.engine import kv_tier
from trinity.engine.kv_tier import BlockCopies, TierPlace
from trinity.engine.kv_users import FolderUser
from trinity.engine.request import SamplingParams
from trinity.engine.weights import fingerprint

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = tuple(range(5, 27))  # 22 tokens: five full blocks of 4 and two tokens
ALICE, BOB = Client("a"), Client("b")


def place(folder, num_bytes=1 << 20, line="one"):
    return TierPlace(folder, num_bytes, line if callable(line) else lambda version: line)


def ask(engine, prompt=PROMPT, own=GREEDY, client=ALICE, name="r", **more):
    """-> tokens of the answer, and tokens that it was told were cached."""
    before = engine.stats().num_computed_tokens
    engine.add(name, prompt, own, client, **more)
    deltas = run_all(engine)[name]
    engine.check()
    tokens = tuple(token for delta in deltas for token in delta.token_ids)
    cached = deltas[-1].num_cached_tokens
    assert engine.stats().num_computed_tokens - before == len(prompt) + len(tokens) - 1 - cached
    return tokens, cached


def restarted(folder, config=None, **fields):
    return fake_engine(config, tier=place(folder), **fields)


@pytest.mark.parametrize("window", [1, 4, 9, 100])
def test_who_starts_again_finds_what_it_had(tmp_path, window):
    config = fake_config(window)
    first = ask(restarted(tmp_path, config))
    assert first == (solo(config, PROMPT, GREEDY), 0)
    engine = restarted(tmp_path, config)
    assert ask(engine) == (first[0], 20)
    assert ask(engine, (*PROMPT, *first[0])) == (solo(config, (*PROMPT, *first[0]), GREEDY), 24), "and its answer"
    stats = engine.stats()
    assert (stats.num_prefix_hits, stats.num_tier_hits) == (44, 20)
    assert stats.tier_bytes > 0


def test_a_kill_in_the_middle_of_an_answer_loses_no_prompt(tmp_path):
    engine = restarted(tmp_path, max_num_batched_tokens=8)
    for name in "abc":
        engine.add(name, (ord(name) % 40, *PROMPT), GREEDY.model_copy(update={"max_tokens": 30}), ALICE)
    while engine.stats().num_generated_tokens < 30:
        engine.step()
    again = restarted(tmp_path)
    found = [ask(again, (ord(name) % 40, *PROMPT))[1] for name in "abc"]
    assert found == [20] * 3


def test_engines_of_a_node_share_while_both_live(tmp_path):
    one, other = restarted(tmp_path), restarted(tmp_path)
    longer = (*PROMPT, *range(8))
    assert [ask(one)[1], ask(other)[1], ask(other, longer)[1], ask(one, longer)[1]] == [0, 20, 20, 28]


def test_who_may_not_share_does_not(tmp_path):
    ask(restarted(tmp_path))
    salted = GREEDY.model_copy(update={"cache_salt": "s"})
    assert ask(restarted(tmp_path), client=BOB)[1] == 0
    assert ask(restarted(tmp_path), own=salted)[1] == 0
    assert ask(restarted(tmp_path))[1] == 20


def test_other_weights_of_the_same_number_are_never_taken(tmp_path):
    """A checkpoint served anew, a pool made anew, a run that went back: lines of their own; and nobody's line is nobody's."""
    for line, cached in [("one", 0), ("two", 0), ("one", 20), (None, 0), (None, 0), ("two", 20)]:
        engine = fake_engine(tier=place(tmp_path, line=line))
        assert ask(engine) == (solo(fake_config(), PROMPT, GREEDY), cached)


def test_a_run_that_goes_back_finds_its_new_steps_alone(tmp_path):
    """Step 2 of before is not the step 2 that comes after going back to step 1."""
    lines = {1: "before", 2: "before"}
    source = FakeSource(fake_config())
    engine = fake_engine(source=source, tier=place(tmp_path, line=lines.get))
    source.commit()
    old = ask(engine)
    source.roll_back()
    lines.update({1: "after", 2: "after"})
    assert ask(engine)[1] == 0
    source.known.add(2)
    engine.reset_prefix_cache()
    assert ask(engine) == (old[0], 0)
    lines.update({1: "before", 2: "before"})
    assert ask(fake_engine(source=source, tier=place(tmp_path, line=lines.get)))[1] == 20


def test_a_version_that_is_withdrawn_is_purged_for_all(tmp_path):
    source = FakeSource(fake_config())
    engine = fake_engine(source=source, kv_max_age="unbounded", tier=place(tmp_path))
    source.commit()
    ask(engine)
    source.known.remove(2)
    while engine.stats().tier_bytes:
        engine.step()
    source.known.add(3)
    other = fake_engine(source=source, kv_max_age="unbounded", tier=place(tmp_path))
    assert ask(other)[1] == 0


def test_what_is_withdrawn_is_not_read_even_where_it_cannot_be_purged(tmp_path):
    source = FakeSource(fake_config())
    engine = fake_engine(source=source, kv_max_age="unbounded", tier=place(tmp_path))
    ask(engine)
    source.commit()
    ask(engine, tuple(reversed(PROMPT)))
    other = fake_engine(source=source, kv_max_age="unbounded", tier=place(tmp_path))
    with other.prefixes.tier.segment.locked() as stopped:
        assert stopped
        source.known.remove(2)
        assert ask(engine, tuple(reversed(PROMPT)))[1] == 0
        assert engine.stats().tier_bytes


def test_age_bounds_what_is_read(tmp_path):
    pinned = GREEDY.model_copy(update={"version_policy": "pinned"})

    def cached(version, own=GREEDY, **fields):
        source = FakeSource(fake_config(), version)
        return ask(fake_engine(source=source, tier=place(tmp_path), **fields), own=own)[1]

    assert cached(1) == 0
    assert cached(2, kv_max_age=1) == 20, "what version 1 has computed; the rest is its own"
    assert cached(2, pinned, kv_max_age=1) == 0
    assert cached(2, pinned) == 20
    assert cached(2) == 20
    assert cached(3) == 0
    assert cached(5, kv_max_age=1) == 0
    assert cached(5, kv_max_age="unbounded") == 20


def test_forgetting_forgets_there_too(tmp_path):
    engine, other = restarted(tmp_path), restarted(tmp_path)
    ask(engine)
    engine.reset_prefix_cache()
    assert ask(other)[1] == 0


def test_damaged_logits_take_their_blocks_along(tmp_path):
    source = FakeSource(fake_config())
    ask(fake_engine(source=source, tier=place(tmp_path)))
    source.poisoned.add(1)
    engine = fake_engine(source=source, tier=place(tmp_path))
    engine.add("r", PROMPT, GREEDY, ALICE)
    assert run_all(engine)["r"][-1].finish_reason == "error"
    source.poisoned.clear()
    assert ask(fake_engine(source=source, tier=place(tmp_path)))[1] == 0


def test_damaged_blocks_are_computed_and_nobody_notices(tmp_path):
    config = fake_config(layers=("full_attention",) * 2)
    answer, _ = ask(restarted(tmp_path, config))
    [path] = tmp_path.glob("kv-*")
    engine = restarted(tmp_path, config)
    slots = engine.prefixes.tier.segment.kinds[0]
    with path.open("r+b") as file:
        for _, _, slot in slots.all_of(next(iter(set(slots._line_N.tolist()) - {0})))[2:3]:
            file.seek(slots._at(slot))
            file.write(os.urandom(8))
    assert ask(engine) == (answer, 8)
    assert slots.num_damaged == 1


def test_a_small_tier_evicts_and_keeps_beginnings(tmp_path):
    """Room for five blocks of each kind: of a longer text the beginning stays; a newer text pushes an older one out."""
    config, per_block = fake_config(), 4 * 2 * 2 * 4 * 4
    small = place(tmp_path, 3 * 4096 + 5 * 2 * (per_block + 80))
    texts = [tuple((3 * i + n) % 40 for i in range(40)) for n in range(3)]
    engine = fake_engine(config, tier=small)
    for text in texts:
        assert ask(engine, text) == (solo(config, text, GREEDY), 0)
    assert engine.stats().num_tier_evicted
    assert engine.stats().tier_bytes <= 10 * per_block
    found = [ask(fake_engine(config, tier=small), text[:22])[1] for text in reversed(texts)]
    assert found[0] <= 20
    assert found[1:] == [0, 0]


@pytest.mark.parametrize("priority", [0, -1])
def test_a_long_beginning_is_brought_a_piece_before_each_pass_where_others_run(tmp_path, monkeypatch, priority):
    """It stopped all of them until it was there; nobody gives way meanwhile. Where nobody runs it comes at once."""
    monkeypatch.setattr(kv_tier, "BYTES_TOGETHER", 1)
    own = GREEDY.model_copy(update={"priority": priority})
    answer, pieces = ask(restarted(tmp_path), own=own)[0], []
    engine = restarted(tmp_path)
    tier, engine._scheduler.recall_s = engine.prefixes.tier, 0.0
    fetch, tier._fetch = tier._fetch, lambda *some: pieces.append(some[1]) or fetch(*some)
    engine.add("other", (1, 2, 3), GREEDY.model_copy(update={"max_tokens": 20}))
    engine.step()
    engine.add("r", PROMPT, own, ALICE)
    for num in range(1, 6):
        assert [delta.request_id for delta in engine.step()] == ["other"]
        assert [len(keys) for keys in pieces] == [1] * num
        engine.check()
    deltas = run_all(engine)
    assert engine.stats().num_tier_hits == 20
    assert tuple(token for delta in deltas["r"] for token in delta.token_ids) == answer
    assert (deltas["r"][-1].num_cached_tokens, engine.stats().num_preemptions) == (20, 0)


def test_traced_tokens_stay_out(tmp_path):
    from tests.unit.test_prefix_cache import Routed

    traced = GREEDY.model_copy(update={"trace": True})
    for _ in range(2):
        engine = fake_engine(model=Routed(fake_config()), tier=place(tmp_path))
        assert ask(engine, own=traced)[1] == 0
        assert engine.stats().tier_bytes == 0


def test_who_writes_does_so_little_by_little_and_gives_way(tmp_path, monkeypatch):
    monkeypatch.setattr(kv_tier, "LEAST_S", 0.0)
    engine, other = restarted(tmp_path), restarted(tmp_path)
    tier = engine.prefixes.tier
    for copies in tier._copies.values():
        copies.num_together = 2
    with other.prefixes.tier.segment.locked() as is_mine:
        assert is_mine
        assert ask(engine)[1] == 0
        assert not tier.num_written
        assert not tier.has_work, "it does not turn round and round"
    tier._again_s = 0.0
    waiting, written = len(tier._queue), []
    while tier.has_work:
        before = tier.num_written
        tier.work(0.0)
        written.append(tier.num_written - before)
    assert waiting > 2
    assert max(written) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bytes_of_blocks_come_back_as_they_were(dtype):
    made = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(3, 20, 2, 5, generator=made).to(dtype), torch.randn(3, 20, 2, generator=made),
        torch.randn(3, 20, 1, 3, generator=made),
    ]  # fmt: skip
    copies, before = BlockCopies(parts, 4), [part.clone() for part in parts]
    rows_BN = copies.out([3, 1])
    assert rows_BN.shape == (2, copies.block_bytes)
    for part in parts:
        part[:, 4:8] = part[:, 12:16] = 0
    copies.into([1, 3], rows_BN[::-1])
    assert all(map(torch.equal, parts, before))
    assert not np.array_equal(rows_BN[0], rows_BN[1])


def test_an_adapter_has_blocks_of_its_own(tmp_path):
    class Adapter:
        def __init__(self, number):
            self.ref = AdapterRef(f"a{number}", number, "")

    engine = restarted(tmp_path)
    one, other = (engine.prefixes.keys_of(PROMPT, GREEDY, ALICE, Adapter(n).ref) for n in (1, 2))
    assert len(one) == len(other) == 5
    assert not set(one) & set(other)


def test_the_last_who_leaves_takes_the_tier_along_and_who_is_killed_leaves_it(tmp_path):
    folder = tmp_path / "tier"
    one, other = restarted(folder), restarted(folder)
    ask(one)
    one.prefixes.close()
    assert ask(other)[1] == 20
    os.close(other.prefixes.tier._user._fd)  # what the kernel does for the dead
    again = restarted(folder)
    assert ask(again)[1] == 20
    again.prefixes.close()
    assert not folder.exists()
    assert ask(restarted(folder))[1] == 0


def test_who_comes_while_the_last_one_leaves_gets_a_tier_of_its_own(tmp_path, monkeypatch):
    folder = tmp_path / "tier"
    leaving, met = FolderUser(folder), []
    (folder / "kv-1").touch()
    whole = os.unlink

    def unlink(path, *args, **more):
        if not met:
            met.append(comes())
        return whole(path, *args, **more)

    def comes():
        late = FolderUser.__new__(FolderUser)
        late._folder, late._fd = folder, -1
        return late._entered()

    monkeypatch.setattr(os, "unlink", unlink)
    leaving.leave()
    assert met == [False]
    monkeypatch.undo()
    new = FolderUser(folder)
    assert [path.name for path in folder.iterdir()] == ["users"]
    new.leave()
    new.leave()
    assert not folder.exists()


def test_roles_apart_have_a_tier_unasked():
    given = [{}, {"role": "prefill,decode", "replicas": 2}, {"role": "prefill,both", "replicas": 2, "kv_tier_bytes": 5}]
    off = {"prefix_cache": False, "kv_tier_bytes": 5}
    assert [EngineConfig(**each).tier_bytes for each in [*given, off]] == [0, 1 << 30, 5, 0]


def test_models_that_were_trained_apart_have_other_fingerprints():
    one, same, other = FakeAfmoe(fake_config(), 0), FakeAfmoe(fake_config(), 0), FakeAfmoe(fake_config(), 1)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    same.head.data.mul_(1.001)
    assert fingerprint(one) != fingerprint(same)
