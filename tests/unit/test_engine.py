"""The engine as a whole, over a tiny model: any trace of adds, aborts and steps keeps its promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_fakes import VOCAB, FakeAfmoe, fake_config, fake_engine, run_all, solo
from trinity.config import ANYBODY, Client, EngineConfig
from trinity.engine.engine import Engine
from trinity.engine.kv_layout import plan_layout, window_blocks
from trinity.engine.request import SamplingParams
from trinity.errors import ConfigError, InvalidRequest, Overloaded, PromptTooLong, TrinityError, Unavailable

MAX_LEN = 24
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

tokens = st.integers(0, VOCAB - 1)
prompts = st.lists(tokens, min_size=1, max_size=MAX_LEN - 1).map(tuple)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.8]),
    seed=st.integers(0, 3),
    top_p=st.sampled_from([1.0, 0.9]),
    max_tokens=st.integers(1, MAX_LEN),
    ignore_eos=st.booleans(),
    priority=st.sampled_from([0, 0, 5, -(1 << 63)]),
)
actions = st.one_of(
    st.tuples(st.just("add"), prompts, params),
    st.tuples(
        st.just("add"), prompts, params, st.builds(Client, st.sampled_from("ab"), st.sampled_from([0.5, 1.0, 4.0]))
    ),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("step"), st.integers(1, 4)),
)


class Trace:
    """Runs actions against an engine and checks everything that must hold after each."""

    def __init__(self, engine: Engine):
        self.engine, self.wanted, self.got, self.ended = engine, {}, {}, {}

    def add(self, prompt, params, client=ANYBODY):
        name = f"r{len(self.wanted)}"
        self.engine.add(name, prompt, params, client)
        self.wanted[name], self.got[name] = (prompt, params), []

    def abort(self, number):
        name = f"r{number}"
        delta = self.engine.abort(name)
        assert (delta is not None) == (name in self.wanted and name not in self.ended)
        if delta:
            assert delta.finish_reason == "abort"
            self.ended[name] = "abort"

    def step(self, times):
        for _ in range(times):
            deltas = self.engine.step()
            for delta in deltas:
                assert delta.request_id not in self.ended, "a request ended twice"
                self.got[delta.request_id] += delta.token_ids
                assert delta.num_generated_tokens == len(self.got[delta.request_id])
                if delta.finish_reason:
                    self.ended[delta.request_id] = delta.finish_reason
            self.engine.check()

    def finish(self):
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.step(1)
        assert set(self.ended) == set(self.wanted), "a request never ended"
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_total_blocks)
        for name, (prompt, params) in self.wanted.items():
            limit = min(params.max_tokens, MAX_LEN - len(prompt))
            want = solo(self.engine.config, prompt, params.model_copy(update={"max_tokens": limit}))
            whole = want[: len(self.got[name])] if self.ended[name] == "abort" else want
            assert tuple(self.got[name]) == whole, f"{name} depends on its company"


@settings(max_examples=120, deadline=None)
@given(
    trace=st.lists(actions, max_size=25),
    window=st.integers(1, 9),
    block_size=st.integers(1, 6),
    budget=st.integers(1, 40),
    seqs=st.integers(1, 6),
    slack=st.integers(0, 4),
    drafts=st.sampled_from([0, 1, 3, 8]),
)
def test_any_trace(trace, window, block_size, budget, seqs, slack, drafts):
    """Memory for one longest sequence and a little more, so that preemption is common."""
    block_bytes = 2 * 2 * 4 * 4 * block_size  # k and v, 2 heads of 4, 4 bytes; one layer of each kind
    blocks = math.ceil(MAX_LEN / block_size)
    need = blocks + min(blocks, window_blocks(window + drafts, block_size))
    engine = fake_engine(
        fake_config(window),
        max_model_len=MAX_LEN,
        block_size=block_size,
        kv_cache_bytes=(need + 2 * slack) * block_bytes,
        max_num_batched_tokens=budget,
        max_num_seqs=seqs,
        max_draft_tokens=drafts,
    )
    run = Trace(engine)
    for name, *arguments in trace:
        getattr(run, name)(*arguments)
        engine.check()
    run.finish()


def test_preemption_is_exercised_and_invisible():
    """The property above is about nothing unless memory really runs out."""
    engine = fake_engine(max_model_len=MAX_LEN, block_size=2, kv_cache_bytes=64 * 2 * 20, max_num_seqs=6)
    run = Trace(engine)
    for i in range(8):
        run.add(tuple(range(i, i + 5)), SamplingParams(seed=i, max_tokens=18, ignore_eos=True))
    run.finish()
    assert engine.stats().num_preemptions >= 5
    assert list(run.ended) == list(run.wanted), "what was thrown out must not lose its place in the queue"


def test_first_come_first_served():
    """With room for two, requests finish in the order they came, however long the queue."""
    engine = fake_engine(max_num_seqs=2)
    for i in range(10):
        engine.add(str(i), [i + 1], GREEDY)
    order = []
    while engine.has_work:
        order += [d.request_id for d in engine.step() if d.finish_reason]
    assert order == [str(i) for i in range(10)]


def test_how_long_a_sequence_waited_for_its_place():
    engine = fake_engine(max_num_seqs=1)
    for name in ("first", "second"):
        engine.add(name, (1, 2, 3), GREEDY)
    waited = {name: deltas[-1].queue_s for name, deltas in run_all(engine).items()}
    assert 0 < waited["first"] < waited["second"]


def test_a_long_prompt_does_not_stop_decodes():
    """Every running decode gets its token in every pass while a 60-token prompt is cut into pieces of what is left."""
    engine = fake_engine(max_num_batched_tokens=8)
    for i in range(3):
        engine.add(str(i), [i + 1], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    engine.step()
    engine.add("long", [5] * 60, GREEDY)
    for _ in range(60 // 5):
        assert {d.request_id for d in engine.step()} >= {"0", "1", "2"}
    assert engine.abort("long").num_generated_tokens == 1


@pytest.mark.parametrize("chunk", [3, 16, 200])
def test_sliding_layers_keep_only_their_window(chunk):
    """Between passes a sequence 50 windows long never holds more than ceil((W - 1) / block) + 1 blocks, whatever the chunk."""
    window, block = 10, 4
    engine = fake_engine(
        fake_config(window), max_model_len=600, block_size=block, max_num_batched_tokens=chunk, kv_cache_bytes=1 << 18
    )
    engine.add("a", [1 + i % 30 for i in range(400)], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    table, most = engine._cache.tables[engine._cache.layout.kinds[1]], 0
    while engine.has_work:
        engine.step()
        most = max(most, table.pool.num_blocks - table.pool.num_available)
    assert most == math.ceil((window - 1) / block) + 1


def test_windows_of_all_sequences_fit_and_the_rest_is_full():
    engine = fake_engine(fake_config(10), max_num_seqs=8, max_model_len=2000, block_size=4, kv_cache_bytes=1 << 18)
    layout = engine._cache.layout
    full, sliding = layout.kinds
    assert (full.window, sliding.window) == (None, 10)
    assert layout.num_blocks[sliding] == (8 + 8) * 4
    assert layout.total_bytes <= 1 << 18 < layout.total_bytes + layout.block_bytes[full]


@pytest.mark.parametrize("layers", [("full_attention",), ("sliding_attention",) * 2, ("full_attention",) * 3])
def test_models_of_one_kind_of_layer(layers):
    engine = fake_engine(fake_config(4, layers))
    engine.add("a", (1, 2, 3, 4, 5, 6), GREEDY)
    got = [t for d in run_all(engine)["a"] for t in d.token_ids]
    assert tuple(got) == solo(engine.config, (1, 2, 3, 4, 5, 6), GREEDY)
    engine.check()


@given(
    window=st.integers(1, 300),
    block_size=st.integers(1, 64),
    max_len=st.integers(2, 3000),
    seqs=st.integers(1, 50),
    kib=st.integers(1, 1000),
)
@settings(max_examples=200, deadline=None)
def test_layout_fits_its_memory_and_one_sequence(window, block_size, max_len, seqs, kib):
    config = fake_config(window)
    wanted = EngineConfig(max_model_len=max_len, block_size=block_size, max_num_seqs=seqs, kv_cache_bytes=kib << 10)
    need = 64 * block_size * math.ceil(max_len / block_size)
    try:
        layout = plan_layout(config, wanted, 4)
    except ConfigError:
        assert kib << 10 < need + 64 * block_size * window_blocks(window + wanted.max_draft_tokens, block_size)
        return
    assert layout.total_bytes <= kib << 10
    for kind in layout.kinds:
        assert layout.blocks_per_seq[kind] <= layout.num_blocks[kind] <= 2 * seqs * layout.blocks_per_seq[kind]


def test_too_little_memory_names_both_numbers_and_what_would_fit():
    with pytest.raises(ConfigError, match=r"needs 33280 bytes .* is 20000; .* to at most 304") as caught:
        fake_engine(max_model_len=512, kv_cache_bytes=20_000)
    fits = int(str(caught.value).rsplit(" ", 1)[1])
    assert fake_engine(max_model_len=fits, kv_cache_bytes=20_000).max_model_len == fits
    with pytest.raises(ConfigError):
        fake_engine(max_model_len=fits + 1, kv_cache_bytes=20_000)


def test_a_limit_beyond_the_models_is_refused():
    with pytest.raises(ConfigError, match=r"5000 > 4096"):
        fake_engine(max_model_len=5000)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([], InvalidRequest),
        ([-1], InvalidRequest),
        ([VOCAB], InvalidRequest),
        ([1 << 31], InvalidRequest),
        ([1.0], InvalidRequest),
        ([True], InvalidRequest),
        (["1"], InvalidRequest),
        ([1] * 64, PromptTooLong),
        ([1] * 65, PromptTooLong),
        ([1] * 6400, PromptTooLong),
    ],
)
def test_bad_prompts_are_refused_and_change_nothing(prompt, error):
    engine = fake_engine()
    with pytest.raises(error) as caught:
        engine.add("a", prompt)
    assert caught.value.param == "prompt"
    assert not engine.has_work
    engine.add("a", [1] * 63, SamplingParams(max_tokens=5))
    last = run_all(engine)["a"][-1]
    assert (last.finish_reason, last.num_generated_tokens, last.num_prompt_tokens) == ("length", 1, 63)


@pytest.mark.parametrize(
    "fields", [{"stop_token_ids": (VOCAB,)}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {VOCAB: 1.0}}]
)
def test_parameters_with_ids_beyond_the_vocabulary(fields):
    with pytest.raises(InvalidRequest, match=f"0 to {VOCAB - 1}"):
        fake_engine().add("a", [1], SamplingParams(**fields))


def test_a_full_queue_says_when_to_come_back():
    engine = fake_engine(max_num_waiting=3)
    for i in range(3):
        engine.add(str(i), [1], GREEDY)
    with pytest.raises(Overloaded) as caught:
        engine.add("3", [1], GREEDY)
    assert caught.value.retry_after_s > 0
    engine.step()
    engine.add("3", [1], GREEDY)
    assert len(run_all(engine)) == 4


def test_an_id_in_use_is_refused_until_it_is_free():
    engine = fake_engine()
    engine.add("a", [1], GREEDY)
    with pytest.raises(InvalidRequest, match="in use"):
        engine.add("a", [2], GREEDY)
    assert engine.abort("a").finish_reason == "abort"
    assert engine.abort("a") is None
    engine.add("a", [2], GREEDY)
    assert tuple(t for d in run_all(engine)["a"] for t in d.token_ids) == solo(engine.config, (2,), GREEDY)


class Flaky(FakeAfmoe):
    """Fails when told to, like a forward pass that meets a dead shard or a bug."""

    error: Exception | None = None
    poison: int | None = None

    def forward(self, ids_T, positions_T, attend):
        out = super().forward(ids_T, positions_T, attend)
        if self.error is not None:
            raise self.error
        if self.poison is not None:
            out.hidden_TD[(ids_T == self.poison)] = math.nan
        return out


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (Unavailable("shard-1 is away"), "shard-1 is away"),
        (RuntimeError("/secret/path"), "internal error"),
    ],
)
def test_a_failed_pass_ends_its_requests_only(error, shown):
    config = fake_config()
    model = Flaky(config)
    engine = fake_engine(config, model=model, max_num_seqs=2)
    for i in range(3):
        engine.add(str(i), [i + 1], GREEDY)
    engine.step()
    model.error = error
    deltas = engine.step()
    model.error = None
    assert {(d.request_id, d.finish_reason) for d in deltas} == {("0", "error"), ("1", "error")}
    assert all(shown in d.error and "/secret" not in d.error for d in deltas)
    assert all(isinstance(d.cause, TrinityError) for d in deltas)
    engine.check()
    assert tuple(t for d in run_all(engine)["2"] for t in d.token_ids) == solo(config, (3,), GREEDY)


def test_not_a_number_ends_one_request_and_no_other():
    """Its cache slots go back to the pool with NaN in them; the next owner must not see that."""
    config = fake_config()
    model = Flaky(config)
    model.poison = 7
    model.value.data[7] = math.nan
    engine = fake_engine(config, model=model, max_num_seqs=2, max_model_len=16, kv_cache_bytes=64 * 4 * 12)
    engine.add("bad", [1, 2, 7], GREEDY)
    engine.add("good", [1, 2, 6], GREEDY)
    deltas = run_all(engine)
    assert deltas["bad"][-1].finish_reason == "error"
    assert "not finite" in deltas["bad"][-1].error
    for i in range(6):
        engine.add(f"later{i}", [1, 2, 6], GREEDY)
    deltas |= run_all(engine)
    wanted = solo(config, (1, 2, 6), GREEDY)
    assert 7 not in wanted
    for name in ("good", *(f"later{i}" for i in range(6))):
        assert tuple(t for d in deltas[name] for t in d.token_ids) == wanted


def test_eos_and_stop_tokens_end_without_text():
    plain = solo(fake_config(), (1, 2), GREEDY)
    engine = fake_engine()
    stop = plain[4]
    engine.add("a", [1, 2], GREEDY.model_copy(update={"stop_token_ids": (stop,)}))
    deltas = run_all(engine)["a"]
    first = plain.index(stop)
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
    assert tuple(t for d in deltas for t in d.token_ids) == plain[: first + 1]
    assert "".join(d.text for d in deltas) == "".join(chr(65 + t) for t in plain[:first])


def test_stop_strings_across_tokens():
    plain = solo(fake_config(), (1, 2), GREEDY)
    text = "".join(chr(65 + t) for t in plain)
    engine = fake_engine()
    engine.add("a", [1, 2], GREEDY.model_copy(update={"stop": (text[3:6], "never")}))
    deltas = run_all(engine)["a"]
    assert "".join(d.text for d in deltas) == text[: text.index(text[3:6])]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", text[3:6])


def test_text_held_back_for_a_stop_string_comes_at_the_end():
    plain = solo(fake_config(), (1, 2), GREEDY)
    text = "".join(chr(65 + t) for t in plain)
    engine = fake_engine()
    engine.add("a", [1, 2], GREEDY.model_copy(update={"stop": (text[-3:] + "never",)}))
    deltas = run_all(engine)["a"]
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].text.endswith(text[-3:])
    assert "".join(d.text for d in deltas) == text


def test_the_model_sees_each_token_once():
    """No preemption, no recomputation: prompt plus generated tokens but the last one."""
    config = fake_config()
    model, seen = FakeAfmoe(config), []
    forward = model.forward

    def counting(ids_T, positions_T, attend):
        seen.append(len(ids_T))
        return forward(ids_T, positions_T, attend)

    model.forward = counting
    engine = fake_engine(config, model=model, max_num_batched_tokens=8)
    for i in range(4):
        engine.add(str(i), [i] * (10 + i), GREEDY)
    run_all(engine)
    assert sum(seen) == sum(10 + i + 7 for i in range(4))
    assert max(seen) == 8


def test_generation_needs_no_gradients():
    model = FakeAfmoe(fake_config())
    engine = fake_engine(model=model)
    engine.add("a", [1, 2, 3], GREEDY)
    run_all(engine)
    assert model.head.requires_grad
    assert model.head.grad is None
    assert torch.is_grad_enabled()
