"""The extension's pieces of a layer have the bits of the modules that they stand for, in each family, type and company."""

import itertools
from argparse import Namespace

import numpy as np
import pytest
import torch

from trinity import native
from trinity.config import LayerCache, preset
from trinity.engine.attention import Flat
from trinity.engine.exact_attention import ExactAttention
from trinity.engine.kv_cache import KVCache
from trinity.engine.kv_layout import CacheLayout
from trinity.engine.kv_pools import KVPools
from trinity.engine.sampler import highest
from trinity.experts import native_experts
from trinity.experts.base import LayerWeights
from trinity.experts.derived import FORMS, DerivedLayer
from trinity.experts.derived_compute import infer as derived_infer
from trinity.experts.layer import ReadyLayer, _positions, assignments, slots_of
from trinity.experts.torch_backend import TorchBackend
from trinity.models.common import native_step
from trinity.models.common.family import Nobody
from trinity.models.common.native_step import NativeAfter, NativeBefore
from trinity.models.registry import build
from trinity.ops import extension
from trinity.ops.quantised import Int8, multiply, quantised
from trinity.rpc.messages import REMOTE

pytestmark = pytest.mark.skipif(not hasattr(native.lib, "step_route"), reason="the extension is not built")
FAMILIES = ("tiny", "qwen3-30b-a3b", "glm-4.5")
SMALL = dict(vocab_size=307, hidden_size=72, moe_intermediate_size=20, num_hidden_layers=5, num_experts=24)
SMALL |= dict(num_attention_heads=6, num_key_value_heads=2, num_experts_per_tok=9, head_dim=20)
GROUPS = dict(n_group=4, topk_group=2)


def model_of(name, dtype, **sizes):
    """A small one of the family, of odd sizes, with gains and biases that are not those of a fresh model."""
    fields = preset(name).model_dump() | SMALL | {"dtype": dtype, "layer_types": ()} | sizes
    fields |= GROUPS if "n_group" in fields else {}
    known = type(preset(name)).model_fields
    config = type(preset(name)).model_validate({key: value for key, value in fields.items() if key in known})
    model, rng = build(config, Nobody()).eval(), torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *model.buffers()):
        noise = torch.randn(tensor.shape, generator=rng)
        tensor.data.copy_(1 + 0.2 * noise if tensor.ndim == 1 else noise * 2 * tensor.shape[-1] ** -0.5)
    return model


def derived_layer(form, stacks_ENK):
    words = [form.empty(stack.shape[1:], len(stack)) for stack in stacks_ENK]
    for stack, own in zip(stacks_ENK, words, strict=True):
        for at, matrix in enumerate(stack):
            form.derive(own, at, matrix)
    parts = (form.parts(own, stack.shape[1:]) for stack, own in zip(stacks_ENK, words, strict=True))
    return DerivedLayer(form, *parts)


def rows(model, num, seed=0):
    h_TD = torch.randn(num, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return h_TD.to(model.lm_head.weight.dtype)


def flat(sent):
    return [tensor for tensor in (*sent[:2], *(sent[2] or ())) if tensor is not None]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(("name", "dtype"), [*itertools.product(FAMILIES, ("float32", "bfloat16"))])
def test_blocks_of_every_family_have_the_bits_of_their_modules(name, dtype):
    model = model_of(name, dtype)
    for block, num in zip(model.blocks(), (1, 3, 8, 33, 70), strict=True):
        h_TD, table = rows(model, num), model.model.table(torch.arange(5, 5 + num), model.lm_head.weight.dtype)
        found = block._native_pre(h_TD, table, native_step._nobody)
        assert found is not None, "a kind that is described does not run"
        expected = block.pre(h_TD, table, native_step._nobody)
        assert len(flat(found)) == len(flat(expected)) >= 2
        assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(expected), strict=True))
        y_TD, local_TD = rows(model, num, 1), rows(model, num, 2)
        assert torch.equal(block._native_post(h_TD, y_TD, local_TD), block.post(h_TD, local_TD + y_TD))
        assert torch.equal(block._native_post(h_TD, y_TD, None), block.post(h_TD, y_TD))


@pytest.mark.parametrize("num", [1, 3, 7, 8, 9, 40, 64, 100, 128, 520, 1024, 2048, 3000, 10000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_adds_up_in_the_order_of_torch(num, dtype):
    from trinity.models.common.layers import RMSNorm

    post = torch.nn.Module()
    post.norm = RMSNorm(num, 1e-5, dtype=dtype)
    part = NativeAfter(post, native_step.After(post.norm))
    x_TD = (torch.randn(50, num) * torch.logspace(-3, 3, 50)[:, None]).to(dtype)
    part.description = part.packed(native_step._place, (dtype == torch.bfloat16, num))
    assert torch.equal(part._run(torch.zeros_like(x_TD), x_TD, None), post.norm(x_TD))


@pytest.mark.parametrize(
    ("experts", "top_k", "groups"), [(128, 8, (1, 1)), (128, 2, (1, 1)), (40, 5, (8, 3)), (9, 9, (1, 1))]
)
def test_equal_scores_choose_the_same_experts(experts, top_k, groups):
    from trinity.models.common.router import SigmoidRouter

    router = SigmoidRouter(8, experts, top_k, scale=2.5, num_groups=groups[0], top_groups=groups[1])
    logits_TE = torch.randint(-2, 3, (300, experts), generator=torch.Generator().manual_seed(2)).float()
    router.is_exact = True
    expected, found = router.routed(logits_TE), chosen(router, logits_TE)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def chosen(router, logits_TE):
    """Routing by the extension of logits that are there."""
    found = native_step._routed(router, len(logits_TE))
    found[0].copy_(logits_TE)
    what = native_step.struct.pack(
        native_step.ROUTE, 0, 8, 8, *native_step._norms(native_step._place, None, None),
        *native_step._matrices(native_step._place, None, router.gate), *native_step._choice(native_step._place, router),
    )  # fmt: skip
    native.lib.step_choose(what, len(logits_TE), *(part.data_ptr() for part in found))
    return found


@pytest.mark.parametrize(("experts", "top_k", "normalises"), [(128, 8, True), (60, 4, False), (3, 1, True)])
def test_a_softmax_is_one_function_of_ours(experts, top_k, normalises):
    from trinity.models.common.router import SoftmaxRouter

    router = SoftmaxRouter(8, experts, top_k, normalises=normalises)
    logits_TE = torch.randn(300, experts, generator=torch.Generator().manual_seed(2)) * 9
    logits_TE[0], router.is_exact = 0, True
    logits_TE[1, 0] = torch.nan
    expected, found = router.routed(logits_TE), chosen(router, logits_TE)
    pairs = [*zip(found, expected, strict=True)]
    assert all(torch.equal(a[2:], b[2:]) and torch.equal(a[0], b[0]) for a, b in pairs)
    assert expected.scores_TE[1].isnan().all()
    assert torch.allclose(expected.scores_TE[2:], logits_TE[2:].softmax(-1), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(("heads", "groups", "dim"), [(8, 2, 128), (6, 6, 64), (5, 1, 20), (12, 2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kept", "window"), [("auto", None), ("auto", 67), ("int8", None), ("int8", 64)])
def test_attention_has_the_bits_of_the_compiled_one(heads, groups, dim, dtype, kept, window):
    """Of single tokens whose keys lie in blocks anywhere: what is written, and what is seen."""
    rng, layer = torch.Generator().manual_seed(3), LayerCache(groups, dim, dim, dim**-0.5, window)
    layout = CacheLayout(5, 400, (layer,), ((layer, 0),), {layer: 200}, {layer: 80}, {layer: 1}, kept)
    cache, rows_T, positions_T = KVCache(layout, 5), np.array([4, 0, 3, 1, 2]), np.array([0, 69, 63, 311, 40])
    table = cache.tables[layer]
    table.block_NC[:] = torch.randperm(400, generator=rng).reshape(5, 80) % 200
    at = table.slots(rows_T, positions_T)
    assert len(set(at.tolist())) == 5
    pools, flat = (
        [KVPools(layout, torch.device("cpu"), dtype) for _ in range(2)],
        Flat(positions_T, rows_T, positions_T + 1, 5, ()),
    )
    q, k, v = (torch.randn(5, h, dim, generator=rng).mul(2).to(dtype) for h in (heads, groups, groups))
    k[2], v[1, 0, :3] = 0, 30
    before = pools[0].stored(*(torch.randn(1000, groups, dim, generator=rng).to(dtype) for _ in range(2)))
    for pool in pools:
        pool.write(0, torch.arange(1000), before)
    expected = ExactAttention(pools[0], cache, flat)(0, q, k, v)
    assert torch.equal(native_step.attended(0, ExactAttention(pools[1], cache, flat), q, k, v), expected)
    assert all(torch.equal(a, b) for a, b in zip(*(pool.of(0)[1] for pool in pools), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_highest_logit_is_the_first_of_them(dtype):
    logits_BV = torch.randint(-9, 9, (40, 307), generator=torch.Generator().manual_seed(5)).to(dtype)
    logits_BV[1], logits_BV[2, 306], logits_BV[3, 5], logits_BV[4, [200, 300]] = -torch.inf, 11, torch.inf, torch.nan
    for given in (logits_BV, logits_BV[:, :64].contiguous(), logits_BV[:, :1].contiguous()):
        best_B, token_B = given.float().max(-1)
        tokens, best = highest(given)
        assert tokens == token_B.tolist()
        assert torch.equal(torch.tensor(best), best_B) or best_B.isnan().any()
    assert highest(logits_BV)[1][4] != highest(logits_BV)[1][4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_may_be_of_other_formats_than_rows(dtype):
    model, lib, at = model_of("tiny", str(dtype)[6:]), native.lib, native_step._place
    pre, h_TD = next(model.blocks()).pre, rows(model, 9)
    attention, x_TD = pre.self_attn, pre.input_layernorm(h_TD)
    parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.gate_proj)
    stored = [quantised(part.weight) for part in parts]
    fields = [(at(w.q), 0, at(w.scale), at(w.total), *w.q.shape, extension.INT8) for w in stored]
    fields[1] = tuple(native_step._matrices(at, parts[1]))  # one as it is
    norms = native_step._norms(at, pre.input_layernorm, None, None)
    head = (dtype == torch.bfloat16, h_TD.shape[1], attention.head_dim, 0)
    what = native_step.struct.pack(native_step.PROJECT, *head, *norms, *itertools.chain(*fields))
    found = [torch.empty(len(h_TD), part.out_features, dtype=dtype) for part in parts]
    lib.step_project(what, 2, len(h_TD), at(h_TD), 0, 0, *map(at, found))
    end = torch.tensor([len(h_TD)])
    expected = [multiply(x_TD, Int8(*(each[None] for each in w)), end).to(dtype) for w in stored]
    expected[1] = parts[1](x_TD)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_hooks_adapters_and_gradients_need_the_modules():
    model = model_of("tiny", "float32")
    block, h_TD = next(model.blocks()), rows(model, 2)
    table = model.model.table(torch.arange(2), torch.float32)
    assert block._native_pre(h_TD, table, native_step._nobody) is not None
    handle = block.pre.self_attn.register_forward_hook(lambda *_: None)
    assert block._native_pre(h_TD, table, native_step._nobody) is None
    handle.remove()
    assert block._native_pre(h_TD.double(), table, native_step._nobody) is None
    block.pre.self_attn.v_proj.adapter = torch.nn.Identity()
    assert block._native_pre(h_TD, table, native_step._nobody) is None
    block.pre.self_attn.v_proj.adapter = None
    with torch.inference_mode(False), torch.no_grad():
        assert block._native_pre(h_TD.clone(), table, native_step._nobody) is None


def test_weights_that_moved_are_found():
    model = model_of("tiny", "float32")
    block, h_TD = next(model.blocks()), rows(model, 2)
    table = model.model.table(torch.arange(2), torch.float32)
    block._native_pre(h_TD, table, native_step._nobody)
    block.pre.input_layernorm.weight = torch.nn.Parameter(torch.rand(model.config.hidden_size))
    block.pre.self_attn.o_proj.weight.data = torch.randn_like(block.pre.self_attn.o_proj.weight)
    found = block._native_pre(h_TD, table, native_step._nobody)
    assert torch.equal(found.x_TD, block.pre(h_TD, table, native_step._nobody).x_TD)


def test_a_part_whose_bits_differ_is_never_used(monkeypatch, caplog):
    model = model_of("tiny", "float32")
    block, h_TD = next(model.blocks()), rows(model, 2)
    table = model.model.table(torch.arange(2), torch.float32)
    monkeypatch.setattr(native_step, "tried", {})
    honest = NativeBefore.route
    monkeypatch.setattr(NativeBefore, "route", lambda *given: honest(*given)._replace(x_TD=honest(*given).x_TD + 1e-6))
    assert block._native_pre(h_TD, table, native_step._nobody) is None
    assert "runs as its modules" in caplog.text


def test_a_description_of_another_size_is_refused():
    with pytest.raises(ValueError, match="a description of 3 bytes"):
        native.lib.step_leave(b"abc", 1, 0, 0, 0, 0, 0)
    with pytest.raises(TypeError, match="arguments"):
        native.lib.step_attend(b"abc")


@pytest.mark.parametrize(("num", "held"), [(1, 9), (40, 9), (40, 4), (3, 0), (200, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_experts_at_once_have_the_bits_of_python(num, held, dtype, form, monkeypatch):
    rng, (dim, hidden, top_k, num_experts) = torch.Generator().manual_seed(4), (48, 32, 5, 9)
    stacks = [
        torch.randn(held, a, b, generator=rng).mul(b**-0.5).to(dtype)
        for a, b in ((hidden, dim), (hidden, dim), (dim, hidden))
    ]
    ids_E = torch.randperm(num_experts, generator=rng)[:held].sort().values
    weights = LayerWeights(stacks[0], stacks[1], stacks[2].mT)
    derived = None if form is None else derived_layer(FORMS[form], stacks)
    layer = ReadyLayer(tuple(ids_E.tolist()), ids_E, _positions(ids_E, num_experts), weights, derived, None, {})
    ids_RK = torch.stack([torch.randperm(num_experts, generator=rng)[:top_k] for _ in range(num)])
    ids_RK = torch.where(torch.isin(ids_RK, ids_E), ids_RK, REMOTE)
    x_RD, weights_RK = torch.randn(num, dim, generator=rng).to(dtype), torch.rand(num, top_k, generator=rng)
    found = native_experts.infer(layer, x_RD, ids_RK, weights_RK)
    assert (found is None) == (not held)
    if found is None:
        return
    slots = slots_of(layer, Namespace(rows=Namespace(ids_RK=ids_RK)), AssertionError)
    assigned = assignments(slots, weights_RK, "cpu")
    for lib in (native.lib, None):
        monkeypatch.setattr(native, "lib", lib)
        monkeypatch.setattr(extension, "lib", lib)
        twin = TorchBackend()(x_RD, assigned, weights) if derived is None else derived_infer(x_RD, assigned, derived)
        assert torch.equal(found[0], twin)
    monkeypatch.undo()
    assert found[1].tolist() == torch.bincount(slots.expert_A, minlength=held).tolist()
    ids_RK[0, 0] = next((e for e in range(num_experts) if e not in layer.experts), REMOTE)
    assert (native_experts.infer(layer, x_RD, ids_RK, weights_RK) is None) == (held < num_experts)
