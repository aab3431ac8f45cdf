"""A pass as one call of the extension has the bits of the modules, whatever of it Python has to do."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from actors.dataplane import ring
from tests.unit.engine_fakes import fake_engine, run_all
from tests.unit.test_native_step import FAMILIES, model_of
from tests.unit.test_ring import MODEL, held_by_all, replicated_table, served
from trinity import native
from trinity.engine.request import SamplingParams
from trinity.errors import Unavailable
from trinity.models.common import native_model, native_step
from trinity.models.common.native_model import ATTEND, CHOOSE, ENTER, EXPERTS, JOIN
from trinity.models.registry import build, family_of
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load

pytestmark = pytest.mark.skipif(not hasattr(native.lib, "step_run"), reason="the extension is not built")
PARAMS = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, logprobs=3)
PROMPTS = [[5, 80, 17], [300], list(range(40, 57))]


def made(name="tiny", dtype="float32", num_shards=1):
    """A model of odd sizes with experts in this process, and their pool."""
    model = model_of(name, dtype)
    pool = local_pool(model.config, Load(seed=3, training=False), num_shards=num_shards)
    return model.with_experts(pool.dispatcher(0)), pool


def decoded(model, **settings):
    """Tokens and log-probabilities of requests that share their passes, and of a short one that comes between."""
    engine = fake_engine(model.config, model=model, **settings)
    for i, prompt in enumerate(PROMPTS):
        engine.add(str(i), prompt, PARAMS)
    deltas = run_all(engine)
    assert all(each[-1].finish_reason == "length" for each in deltas.values())
    return {key: [(d.token_ids, d.logprobs) for d in each] for key, each in deltas.items()}


def by_modules(model, **settings):
    whole, model.model.at_once = model.model.at_once, None
    try:
        return decoded(model, **settings)
    finally:
        model.model.at_once = whole


@pytest.fixture
def seen(monkeypatch):
    """How often a pass was one call, and how often each part of one was Python's."""
    found, run = Counter(), native_model._Pass.run
    monkeypatch.setattr(native_step, "tried", {})
    monkeypatch.setattr(native_model._Pass, "run", lambda *given: found.update(["pass"]) or run(*given))
    for place, helped in native_model.HELP.items():
        counted = lambda of, layer, place=place, helped=helped: found.update([place]) or helped(of, layer)  # noqa: E731
        monkeypatch.setitem(native_model.HELP, place, counted)
    return found


@pytest.mark.parametrize(("name", "dtype"), [*itertools.product(FAMILIES, ("float32", "bfloat16"))])
def test_a_pass_of_every_family_has_the_bits_of_its_modules(name, dtype, seen):
    model, pool = made(name, dtype)
    expected = by_modules(model)
    assert decoded(model) == expected
    assert seen["pass"] > 3, "no pass was one call"
    assert list(seen) == ["pass"], "Python had to do a part"
    assert decoded(model, max_num_seqs=1) == expected  # alone
    pool.status(reset_counts=True)
    by_modules(model)
    by_hand = [status.rows for status in pool.status(reset_counts=True)]
    decoded(model)
    assert [status.rows for status in pool.status()] == by_hand, "rows are counted twice, or not"


def test_python_does_what_the_extension_does_not(seen):
    model, _ = made(num_shards=2)
    expected = by_modules(model)
    assert decoded(model) == expected
    assert seen[EXPERTS] == seen[JOIN] > 0
    kind = next(part.kind for part in model.model.at_once.layers[1].parts)
    native_step.tried[kind] = False
    for block in model.blocks():
        block._native_pre._at = ()
    model.model.at_once._at = ()
    assert decoded(model) == expected
    assert seen[ENTER] > 0


def test_a_choice_that_is_not_described_is_python_s(seen, monkeypatch):
    monkeypatch.setattr(
        native_step, "_choice", lambda place, router: (0, router.top_k if router else 0, 1, 1, 0, 0, 1.0)
    )
    monkeypatch.setattr(native_step, "_routed", lambda router, num: [torch.empty(num, router.gate.out_features)])
    model, _ = made()
    assert decoded(model) == by_modules(model)
    assert seen[CHOOSE] > 0


def test_keys_in_8_bits_are_attended_inside_the_call(seen):
    model, _ = made()
    expected = by_modules(model, kv_cache_dtype="int8")
    assert decoded(model, kv_cache_dtype="int8") == expected
    assert list(seen) == ["pass"]


def test_decisions_of_a_pass_are_those_of_the_modules(seen):
    """Whoever asks for them later finds them."""
    model, _ = made()
    decoded(model)
    whole, found = model.model.at_once, []
    for model.model.at_once in (whole, None):
        engine = fake_engine(model.config, model=model)
        engine.add("0", PROMPTS[0], PARAMS.model_copy(update={"trace": True}))
        found.append(run_all(engine)["0"][-1].experts_TLK)
    assert np.array_equal(*found)
    assert found[0].any()


def test_weights_that_are_others_are_found(seen):
    model, _ = made()
    decoded(model)
    model.model.layers[2].post.post_mlp_layernorm.weight = torch.nn.Parameter(torch.rand(model.config.hidden_size))
    model.model.layers[1].pre.self_attn.o_proj.weight.data = torch.randn(model.config.hidden_size, 120) / 10
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    before = seen["pass"]
    assert decoded(model) == by_modules(model)
    assert seen["pass"] > before


def test_hooks_and_a_kind_that_differs_need_the_modules(seen, monkeypatch, caplog):
    model, _ = made()
    handle = model.model.layers[1].shared.up_proj.register_forward_hook(lambda *_: None)
    decoded(model)
    assert not seen["pass"]
    handle.remove()
    expected, finish = by_modules(model), native_model._Pass._go
    monkeypatch.setattr(native_model._Pass, "_go", lambda of, *run: [finish(of, *run), of._decision(1)[0].add_(1)][0])
    assert decoded(model) == expected
    assert seen["pass"] == 1, "it is tried once"
    assert "layer by layer" in caplog.text


def test_numbers_that_are_not_finite_decide_nothing(seen):
    model, _ = made()
    decoded(model)
    native_step.tried.pop(model.model.at_once._kind)
    keep = model.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    engine = fake_engine(model.config, model=model)
    engine.add("0", PROMPTS[0], PARAMS)
    assert run_all(engine)["0"][-1].finish_reason == "error"
    assert model.model.at_once._kind not in native_step.tried
    with torch.no_grad():
        model.model.norm.weight.copy_(keep)
    assert decoded(model) == by_modules(model)


@pytest.mark.skipif(not ring.is_possible(), reason="no rings on this system")
@pytest.mark.parametrize(("num_shards", "table"), [(1, None), (2, None), (2, replicated_table())])
def test_rows_for_rings_leave_and_come_back_inside_the_call(num_shards, table, seen):
    with served(num_shards, table) as world:
        if table is not None:
            held_by_all(world)
        model = build(MODEL, world.dispatcher()).eval()
        family_of(MODEL).init_weights(model, 2)
        expected = by_modules(model.with_experts(world.alone))
        decoded(model)  # makes the rings
        seen.clear()
        assert decoded(model) == expected
        assert seen.keys() == {"pass", ATTEND}, "Python had to do more than the prompts' attention"
        for shard in world.shards.values():
            shard.native.publish({})  # the socket's way knows better
        assert decoded(model) == expected
        assert seen[JOIN] > 0
        assert not seen[EXPERTS]


def test_an_expert_that_is_not_here_is_python_s_to_name(monkeypatch):
    model, pool = made()
    decoded(model)

    def begin(*_):
        raise Unavailable("nobody has that expert")

    monkeypatch.setattr(model.experts, "begin", begin)
    assert decoded(model), "nobody asked Python yet"
    layer = pool.transport.shards["shard-0"].versions.ready[model.config.moe_layers[0]]
    layer.position_X[:-1] = -2
    engine = fake_engine(model.config, model=model)
    engine.add("0", PROMPTS[0], PARAMS)
    delta = run_all(engine)["0"][-1]
    assert (delta.finish_reason, delta.error) == ("error", "nobody has that expert")


def test_a_step_of_another_size_is_refused():
    with pytest.raises(ValueError, match="a description of 3 bytes"):
        native.lib.step_run(1, b"abc", b"", b"", 0, b"", None, b"", None, 0)
    with pytest.raises(TypeError, match="arguments"):
        native.lib.step_run(1)
