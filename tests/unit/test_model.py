"""What the parity tests cannot see: types, buffers, initialisation, masks, parameter counts.

Legend: T tokens, D model, S sequence, H heads, G kv heads, d head dim.
"""

import copy

import pytest
import torch
from torch import nn

from trinity.config import preset
from trinity.dispatch.transport import Done
from trinity.models.afmoe.config import AfmoeConfig
from trinity.models.afmoe.init import init_weights
from trinity.models.afmoe.model import Afmoe
from trinity.models.common.attention import PackedAttention, packed_positions
from trinity.models.common.layers import rotary_table, rotate
from trinity.models.registry import family_of
from trinity.models.rules.init import init_expert, named_generator, truncated_normal

TINY = preset("tiny")


class ScaledInput(nn.Module):
    """An ExpertLayer that is a Module with a parameter, so that registration by accident would show."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def begin(self, layer, x_TD, ids_TK, weights_TK):
        return Done((x_TD * self.scale * weights_TK.sum(-1, keepdim=True)).to(x_TD.dtype))


def tiny_model(dtype: torch.dtype | None = None, seed: int = 0) -> Afmoe:
    model = Afmoe(TINY, ScaledInput(), dtype=dtype)
    init_weights(model, seed=seed)
    return model


def run(model: Afmoe, batch: int = 2, seq: int = 20):
    ids_T = torch.randint(2048, (batch * seq,), generator=torch.Generator().manual_seed(0))
    return model(ids_T, packed_positions(batch, seq), PackedAttention(TINY, None, batch, seq))


@pytest.mark.parametrize(
    ("name", "total", "active"), [("nano", 6.120, 1.024), ("mini", 26.124, 3.475), ("large", 398.635, 13.372)]
)
def test_published_parameter_counts(name, total, active):
    counts = family_of(preset(name)).count_params(preset(name))
    assert [round(n / 1e9, 3) for n in (counts.total, counts.active)] == [total, active]


@pytest.mark.parametrize("name", ["tiny", "nano", "large"])
def test_counts_equal_the_module(name):
    config = preset(name)
    model = Afmoe(config, ScaledInput(), device="meta")
    backbone = sum(p.numel() for p in model.parameters())
    experts = len(config.moe_layers) * config.num_experts * config.expert_params
    counts = family_of(config).count_params(config)
    assert counts.total == backbone + experts == sum(counts.by_role.values())
    assert counts.by_role["experts"] == experts
    assert counts.by_role["embedding"] == counts.by_role["head"] == config.vocab_size * config.hidden_size


def test_experts_are_called_but_not_owned():
    model = tiny_model()
    assert not any("scale" in name for name, _ in model.named_parameters())
    assert not any(isinstance(module, ScaledInput) for module in model.modules())
    assert not any("experts" in key and "shared" not in key for key in model.tensors())
    assert torch.isfinite(run(model).hidden_TD).all()


def test_default_dtype_is_the_configs():
    assert Afmoe(preset("nano"), ScaledInput(), device="meta").lm_head.weight.dtype == torch.bfloat16
    assert Afmoe(TINY, ScaledInput(), device="meta").lm_head.weight.dtype == torch.float32


def test_bf16_forward_keeps_bias_and_routing_in_fp32():
    model = tiny_model(torch.bfloat16)
    out = run(model)
    logits = model.logits(out.hidden_TD)
    assert logits.dtype == out.hidden_TD.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
    assert all(b.dtype == torch.float32 for b in model.expert_bias.values())
    for routing in out.routing:
        assert routing.logits_TE.dtype == routing.scores_TE.dtype == routing.weights_TK.dtype == torch.float32
        assert routing.ids_TK.dtype == torch.int64
    fp32 = run(tiny_model())
    assert (out.hidden_TD.float() - fp32.hidden_TD).abs().mean() < 0.03


def test_router_multiplies_in_fp32():
    """Logits of a bf16 model equal the fp32 product of its bf16 operands, inside an autocast region too."""
    router = tiny_model(torch.bfloat16).routers[1]
    x_TD = torch.randn(9, 128).bfloat16()
    want_TE = x_TD.float() @ router.gate.weight.float().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got_TE = router(x_TD).logits_TE
    torch.testing.assert_close(got_TE, want_TE, rtol=1e-6, atol=1e-7)


def test_bias_selects_but_does_not_weigh():
    """A large bias brings an expert in; its weight still comes from its score."""
    router = tiny_model().routers[1]
    x_TD = torch.randn(9, 128)
    router.bias_E[3] = 10
    routing = router(x_TD)
    assert (routing.ids_TK[:, 0] == 3).all()
    scores_TK = routing.scores_TE.gather(1, routing.ids_TK)
    torch.testing.assert_close(routing.weights_TK, 2.0 * scores_TK / scores_TK.sum(-1, keepdim=True))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
def test_bias_survives_casts_exactly(cast):
    model = tiny_model()
    for bias in model.expert_bias.values():
        bias.copy_(torch.linspace(-0.3, 0.3001, 8))
    before = {layer: bias.clone() for layer, bias in model.expert_bias.items()}
    after = cast(model).expert_bias
    assert model.lm_head.weight.dtype != torch.float32
    assert all(torch.equal(after[layer], before[layer]) for layer in before)


def test_bias_is_written_in_place_and_loads_exactly_into_bf16():
    model = tiny_model(torch.bfloat16)
    assert tuple(model.expert_bias) == TINY.moe_layers
    model.expert_bias[2].copy_(torch.full((8,), 0.1))
    state = model.state_dict()
    assert torch.equal(model.tensors()["model.layers.2.mlp.expert_bias"], torch.full((8,), 0.1))
    other = tiny_model(torch.bfloat16)
    other.load_state_dict(state)
    assert torch.equal(other.expert_bias[2], torch.full((8,), 0.1))


def test_meta_then_to_empty_then_load_equals_direct():
    """No hidden state: everything a forward needs is in the state dict (rotary frequencies included)."""
    direct = tiny_model()
    late = Afmoe(TINY, ScaledInput(), device="meta").to_empty(device="cpu")
    late.load_state_dict(direct.state_dict())
    assert torch.equal(run(late).hidden_TD, run(direct).hidden_TD)


def test_rotary_depends_on_distance_only():
    q_THd, k_THd = torch.randn(6, 2, 8), torch.randn(6, 2, 8)

    def scores(start):
        table = rotary_table(torch.arange(start, start + 6), 8, 10000.0, torch.float32)
        return torch.einsum("qhd,khd->hqk", rotate(q_THd, table), rotate(k_THd, table))

    torch.testing.assert_close(scores(0), scores(1000), rtol=1e-4, atol=1e-4)
    assert (scores(0) - torch.einsum("qhd,khd->hqk", q_THd, k_THd)).abs().max() > 0.1


def test_positions_restart_with_each_sequence():
    assert packed_positions(2, 3).tolist() == [0, 1, 2, 0, 1, 2]


def naive_attention(config, docs_BS, batch, seq, layer, q, k, v):
    """One query at a time, in the obvious way."""
    sliding = config.layer_types[layer] == "sliding_attention"
    out, repeat = torch.empty_like(q), q.shape[1] // k.shape[1]
    for b in range(batch):
        for t in range(seq):
            first = max(0, t + 1 - config.sliding_window) if sliding else 0
            seen = [s for s in range(first, t + 1) if docs_BS is None or docs_BS[b, s] == docs_BS[b, t]]
            rows = torch.tensor(seen) + b * seq
            for h in range(q.shape[1]):
                p_S = (k[rows, h // repeat] @ q[b * seq + t, h] * q.shape[-1] ** -0.5).softmax(0)
                out[b * seq + t, h] = p_S @ v[rows, h // repeat]
    return out


@pytest.mark.parametrize("window", [1, 4, 11, 12, 100])
@pytest.mark.parametrize("with_docs", [False, True])
def test_packed_attention_is_the_definition(window, with_docs):
    config = TINY.model_copy(update={"sliding_window": window})
    docs_BS = torch.tensor([[0] * 5 + [1] * 7, [3] * 2 + [4] * 10]) if with_docs else None
    q, k, v = (torch.randn(24, heads, 32) for heads in (4, 2, 2))
    attend = PackedAttention(config, docs_BS, 2, 12)
    for layer in range(4):
        want = naive_attention(config, docs_BS, 2, 12, layer, q, k, v)
        torch.testing.assert_close(attend(layer, q, k, v), want, rtol=1e-4, atol=1e-5)


def test_masks_are_built_once_and_only_where_needed(monkeypatch):
    import trinity.models.common.attention as attention

    built, original = [], attention.causal_mask
    monkeypatch.setattr(attention, "causal_mask", lambda *args: built.append(args[1]) or original(*args))
    monkeypatch.setattr("trinity.ops.batch_invariant.is_for", lambda x: False)
    model = tiny_model()
    run(model, batch=1, seq=64)
    assert built == []  # the window reaches over the whole sequence
    run(model, batch=1, seq=65)
    assert built == [64]  # three sliding layers share one mask; the full layer needs none


def test_backbone_init_is_arcees():
    model = tiny_model()
    std = TINY.init_std
    assert std == pytest.approx(0.5 / 128**0.5)
    for name, weight in model.weights().items():
        if weight.ndim == 2:
            assert weight.abs().max() <= 3 * std, name
            assert weight.std().item() == pytest.approx(0.9866 * std, rel=0.04), name  # std of a normal cut at 3 sigma
        else:
            post = "post_" in name
            assert (weight == (0.5 if post else 1.0)).all(), name  # 1 / sqrt(4 layers)
    assert all(not bias.any() for bias in model.expert_bias.values())


def test_init_does_not_depend_on_order_dtype_or_history():
    """By name and seed alone: a model with other layers before it, made after other draws, gets the same weights."""
    short = AfmoeConfig(**{**TINY.model_dump(), "num_hidden_layers": 3, "layer_types": TINY.layer_types[:3]})
    torch.rand(7)
    small, full, half = Afmoe(short, ScaledInput()), tiny_model(), tiny_model(torch.bfloat16)
    init_weights(small, seed=0)
    for name, weight in small.weights().items():
        if weight.ndim == 2:
            assert torch.equal(weight, full.weights()[name]), name
            assert torch.equal(weight.bfloat16(), half.weights()[name]), name
    other = copy.deepcopy(full)
    init_weights(other, seed=1)
    assert not torch.equal(other.lm_head.weight, full.lm_head.weight)


def test_init_expert_is_a_function_of_its_arguments():
    first, again = (init_expert(TINY, 2, 5, 0, torch.float32) for _ in range(2))
    cast = init_expert(TINY, 2, 5, 0, torch.bfloat16)
    assert [tuple(w.shape) for w in first] == [(128, 128)] * 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(first, cast, strict=True))
    for layer, expert, seed in ((1, 5, 0), (2, 4, 0), (2, 5, 1)):
        other = init_expert(TINY, layer, expert, seed, torch.float32)
        assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    wide = init_expert(TINY.model_copy(update={"moe_intermediate_size": 24}), 2, 5, 0, torch.float32)
    assert [tuple(w.shape) for w in wide] == [(24, 128), (24, 128), (128, 24)]


def test_truncated_normal_has_the_right_shape_of_distribution():
    x = truncated_normal((200_000,), 2.0, named_generator(0, "x"))
    assert x.abs().max() <= 6.0
    assert abs(x.mean()) < 0.02
    assert ((x.abs() < 2.0).float().mean() - 0.6845).abs() < 0.005  # P(|z| < 1 | |z| < 3)


def test_hidden_matrices_are_muons():
    model = tiny_model()
    family = family_of(TINY)
    muon = {name for name, weight in model.weights().items() if family.group(name, weight) == "matrices"}
    rest = model.weights().keys() - muon
    assert {name.rsplit(".", 2)[-2] for name in muon} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {name for name in rest if "norm" not in name} == {
        "model.embed_tokens.weight", "lm_head.weight", *(f"model.layers.{i}.mlp.router.gate.weight" for i in (1, 2, 3)),
    }  # fmt: skip


def test_no_tokens_is_not_an_error():
    empty = torch.empty(0, dtype=torch.int64)
    out = tiny_model()(empty, empty, lambda layer, q, k, v: q)
    assert out.hidden_TD.shape == (0, 128)
    assert len(out.routing) == 3


def load(model, state):
    model.load_state_dict(state)


def copy_in(model, state):
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(state[name])


def copy_in_inference(model, state):
    with torch.inference_mode():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(state[name])


def replace(model, state):
    """Twice, so that new weights may get the addresses of old ones."""
    for _ in range(2):
        model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)


@pytest.mark.parametrize("write", [load, copy_in, copy_in_inference, replace])
def test_inference_uses_new_weights_at_once(write):
    """fp32 inference on a CPU keeps packed copies of its weights."""
    model = tiny_model()
    for seed in range(1, 6):
        write(model, tiny_model(seed=seed).state_dict())
        check_inference(model)
    with torch.no_grad():  # one of four weights that are packed together
        model.model.layers[0].pre.self_attn.v_proj.weight.mul_(2)
    check_inference(model)


def check_inference(model):
    """Against the same weights, not packed."""
    with torch.inference_mode():
        found = run(model).hidden_TD
    torch.testing.assert_close(found, run(model).hidden_TD, rtol=1e-4, atol=1e-4)


def test_weights_made_in_inference_mode_are_not_packed():
    with torch.inference_mode():
        found = run(tiny_model()).hidden_TD
    torch.testing.assert_close(found, run(tiny_model()).hidden_TD, rtol=1e-4, atol=1e-4)
