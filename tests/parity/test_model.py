"""The backbone against transformers' AfmoeForCausalLM: logits, gradients, caches, documents, checkpoint keys. CPU fp32.

Legend: B batch, S sequence, T = B*S, H heads, G kv heads, d head dim, V vocabulary.
All weights are random, router gates, biases and norm gains included, so that nothing agrees by being trivially zero.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from tests.parity.configs import random_ids
from tests.parity.families import diff, gradients, twin
from trinity.config import ModelConfig
from trinity.models.afmoe.config import AfmoeConfig
from trinity.models.afmoe.model import Afmoe
from trinity.models.common.attention import PackedAttention, packed_positions

SEEDS = range(24)
# Of logits in fp32, by `batch_invariant`: with it sums are in an order of our own, and both round in their own way.
ROUNDING = {False: 1e-5, True: 3e-5}
both = pytest.mark.parametrize("invariant", [False, True])


def random_config(seed: int) -> ModelConfig:
    rng = random.Random(seed)
    layers, kv_heads, experts = rng.randint(2, 6), rng.choice([1, 2, 3]), rng.choice([3, 4, 8, 16])
    kinds = ["sliding_attention", "full_attention"]
    return AfmoeConfig(
        vocab_size=rng.choice([61, 97]),
        hidden_size=rng.choice([16, 24, 32]),
        intermediate_size=rng.choice([20, 48]),
        moe_intermediate_size=rng.choice([8, 20]),
        num_hidden_layers=layers,
        num_dense_layers=seed % layers,
        num_attention_heads=kv_heads * rng.choice([1, 2, 4]),
        num_key_value_heads=kv_heads,
        head_dim=rng.choice([4, 8, 16]),
        num_experts=experts,
        num_experts_per_tok=rng.randint(1, min(4, experts)),
        num_shared_experts=seed % 3,
        route_scale=rng.choice([1.0, 2.448, 2.826]),
        sliding_window=rng.choice([1, 2, 5, 8, 64]),
        layer_types=tuple(rng.choice(kinds) for _ in range(layers)) if seed % 4 else (),
        global_attn_every_n_layers=rng.choice([2, 3, 4]),
        max_position_embeddings=128,
        rope_theta=rng.choice([100.0, 10000.0]),
        mup_enabled=bool(seed % 2),
        pad_token_id=None,  # a pad id would zero one row's gradient
        dtype="float32",
    )


def our_logits(model: Afmoe, ids_BS: torch.Tensor, docs_BS: torch.Tensor | None = None) -> torch.Tensor:
    batch, seq = ids_BS.shape
    attend = PackedAttention(model.config, docs_BS, batch, seq)
    out = model(ids_BS.flatten(), packed_positions(batch, seq), attend)
    return model.logits(out.hidden_TD).unflatten(0, (batch, seq))


def test_random_configs_cover_the_architecture():
    """The oracle is only as good as its configurations: every branch appears among them."""
    configs = [random_config(seed) for seed in SEEDS]
    kinds = {frozenset(c.layer_types) for c in configs}
    assert len(kinds) >= 2
    assert frozenset(["sliding_attention", "full_attention"]) in kinds
    assert {c.mup_enabled for c in configs} == {True, False}
    assert {0, 1, 2} <= {c.num_dense_layers for c in configs}
    assert {c.num_shared_experts for c in configs} == {0, 1, 2}
    assert {1, 2, 4} <= {c.num_attention_heads // c.num_key_value_heads for c in configs}
    assert min(c.sliding_window for c in configs) == 1
    assert len({c.num_experts_per_tok for c in configs}) >= 3


@both
@pytest.mark.parametrize("seed", SEEDS)
def test_logits_equal_transformers(seed, invariant):
    config = random_config(seed).model_copy(update={"batch_invariant": invariant})
    hf, ours, _ = twin(config, seed)
    ids_BS = random_ids(config, seed, 2, 19)
    with torch.no_grad():
        theirs, mine = hf(ids_BS).logits, our_logits(ours, ids_BS)
        hf.set_experts_implementation("eager")  # grouped_mm has no fp64
        truth = hf.double()(ids_BS).logits
    assert 0.2 < theirs.std() < 5
    assert diff(mine, theirs) <= ROUNDING[invariant]
    assert diff(mine, truth) <= max(1.5e-5, 2 * diff(theirs, truth)), "as near to the exact numbers as transformers is"


def gradient_vanishes(config: ModelConfig, name: str) -> bool:
    """A lone expert's weight is normalised to a constant; a lone visible token gets all the attention."""
    if name.endswith("router.gate.weight"):
        return config.num_experts_per_tok == 1
    lone = config.sliding_window == 1 and any(part in name for part in (".q_proj.", ".k_proj.", ".q_norm.", ".k_norm."))
    return lone and config.layer_types[int(name.split(".")[2])] == "sliding_attention"


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_equal_transformers(seed):
    config = random_config(seed)
    hf, ours, experts = twin(config, seed)
    ids_BS = random_ids(config, seed, 2, 19)
    probe_BSV = torch.randn(2, 19, config.vocab_size, generator=torch.Generator().manual_seed(seed)) / 38**0.5
    (hf(ids_BS).logits * probe_BSV).sum().backward()
    (our_logits(ours, ids_BS) * probe_BSV).sum().backward()
    mine, theirs = gradients(hf, ours, experts)
    for name, grad in theirs.items():
        if grad.numel():
            largest = grad.abs().max().item()
            assert (largest > 1e-3) != gradient_vanishes(config, name), f"{name}: {largest}, an empty comparison"
            assert diff(mine[name], grad) <= 1e-4 * max(1.0, largest), name


def test_router_outputs_equal_transformers():
    """Logits, selection and weights of every MoE layer, in order."""
    config = random_config(5)
    hf, ours, _ = twin(config, 5)
    ids_BS = random_ids(config, 5, 1, 30)
    with torch.no_grad():
        theirs = hf(ids_BS, output_router_logits=True).router_logits
        mine = ours(ids_BS.flatten(), packed_positions(1, 30), PackedAttention(config, None, 1, 30)).routing
    assert len(mine) == len(theirs) == len(config.moe_layers)
    for layer, got, logits_TE in zip(config.moe_layers, mine, theirs, strict=True):
        assert diff(got.logits_TE, logits_TE) <= 1e-5
        chosen = (logits_TE.sigmoid() + ours.expert_bias[layer]).topk(config.num_experts_per_tok).indices
        assert torch.equal(got.ids_TK, chosen)
        assert torch.allclose(got.weights_TK.sum(-1), torch.tensor(config.route_scale))


class ListCache:
    """An Attend that appends keys and values to Python lists and looks at them one query at a time."""

    def __init__(self, config: ModelConfig):
        self.config, self.kv = config, [([], []) for _ in config.layer_types]

    def __call__(self, layer, q_THd, k_TGd, v_TGd):
        keys, values = self.kv[layer]
        past = len(keys)
        keys.extend(k_TGd)
        values.extend(v_TGd)
        sliding = self.config.layer_types[layer] == "sliding_attention"
        reach = self.config.sliding_window if sliding else len(keys)
        return torch.stack([self.look(layer, q, past + t, reach) for t, q in enumerate(q_THd)])

    def look(self, layer, q_Hd, position, reach):
        """Attention of the query at `position` over itself and the reach - 1 tokens before it."""
        keys, values = (x[max(0, position + 1 - reach) : position + 1] for x in self.kv[layer])
        repeat = q_Hd.shape[0] // keys[0].shape[0]
        k_SHd, v_SHd = (torch.stack(x).repeat_interleave(repeat, dim=1) for x in (keys, values))
        p_SH = (torch.einsum("hd,shd->sh", q_Hd, k_SHd) * q_Hd.shape[-1] ** -0.5).softmax(0)
        return torch.einsum("sh,shd->hd", p_SH, v_SHd)


@pytest.mark.parametrize("seed", range(8))
def test_cached_decoding_equals_uncached(seed):
    """Prefill in two chunks, then token by token, equals one pass over everything and transformers' own."""
    config = random_config(seed)
    hf, ours, _ = twin(config, seed)
    ids_T = random_ids(config, seed, 1, 21)[0]
    cache, parts = ListCache(config), []
    with torch.no_grad():
        for chunk in ids_T.split([7, 5] + [1] * 9):
            start = sum(len(part) for part in parts)
            out = ours(chunk, torch.arange(start, start + len(chunk)), cache)
            parts.append(ours.logits(out.hidden_TD))
        cached, theirs = torch.cat(parts), hf(ids_T[None]).logits[0]
        assert diff(cached, our_logits(ours, ids_T[None])[0]) <= 1e-5
    assert diff(cached, theirs) <= 1e-5


@both
@pytest.mark.parametrize("seed", range(8))
def test_packed_documents_equal_each_alone(seed, invariant):
    """Intra-document masks: a document's logits do not depend on what it is packed with, nor on where it starts."""
    config = random_config(seed).model_copy(update={"batch_invariant": invariant})
    hf, ours, _ = twin(config, seed)
    ids_BS, lengths = random_ids(config, seed, 2, 24), [[5, 12, 7], [24]]
    docs_BS = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    with torch.no_grad():
        packed_BSV = our_logits(ours, ids_BS, docs_BS)
        for ids_S, logits_SV, sizes in zip(ids_BS, packed_BSV, lengths, strict=True):
            for doc, got in zip(ids_S.split(sizes), logits_SV.split(sizes), strict=True):
                assert diff(got, hf(doc[None]).logits[0]) <= ROUNDING[invariant]
        assert diff(packed_BSV[0], our_logits(ours, ids_BS)[0]) > 1e-2  # without the mask they do see each other


def test_tensors_are_the_checkpoint_without_experts(tmp_path):
    """What transformers writes, minus mlp.experts.*, is exactly our tensors: names, shapes, no more and no less."""
    config = random_config(7)
    hf, ours, _ = twin(config, 7)
    hf.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_disk = {key: file.get_slice(key).get_shape() for key in file.keys() if ".mlp.experts." not in key}  # noqa: SIM118
    assert {key: list(t.shape) for key, t in ours.tensors().items()} == on_disk


def test_loss_equals_transformers():
    """Shifted cross entropy through the fused head loss equals the mean that transformers reports, gradients too."""
    from trinity.models.common.losses import loss_from_hidden

    config = random_config(3)
    hf, ours, _ = twin(config, 3)
    ids_BS = random_ids(config, 3, 2, 17)
    hf_loss = hf(ids_BS, labels=ids_BS).loss
    hf_loss.backward()
    targets_BS = F.pad(ids_BS[:, 1:], (0, 1), value=-100)
    out = ours(ids_BS.flatten(), packed_positions(2, 17), PackedAttention(config, None, 2, 17))
    ce_sum, _ = loss_from_hidden(ours.lm_head.weight, out.hidden_TD, targets_BS.flatten(), 0.0, chunk=5)
    (ce_sum / 32).backward()
    assert abs(ce_sum.item() / 32 - hf_loss.item()) <= 1e-5
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert diff(ours.weights()[name].grad, hf.get_parameter(name).grad) <= 1e-5
