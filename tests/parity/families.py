"""Random configurations of every model family, transformers' own model of each, and the same weights in ours.

Legend: B batch, S sequence.
All weights are random, router gates, biases and norm gains included, so that nothing agrees by being trivially zero.
"""

import random
from functools import partial
from typing import Any

import torch
from transformers import AfmoeConfig as HfAfmoeConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.parity.dense import DenseExperts
from trinity.config import ModelConfig
from trinity.models.afmoe.config import AfmoeConfig
from trinity.models.common.attention import PackedAttention, packed_positions
from trinity.models.common.decoder import CausalLM
from trinity.models.glm4_moe.config import Glm4MoeConfig
from trinity.models.qwen3_moe.config import Qwen3MoeConfig
from trinity.models.registry import build, write_config

FAMILIES = ("afmoe", "qwen3_moe", "glm4_moe")


def shape(rng: random.Random) -> dict[str, Any]:
    """What all families have."""
    kv_heads, experts = rng.choice([1, 2, 3]), rng.choice([4, 8, 16])
    return dict(
        vocab_size=rng.choice([61, 97]),
        hidden_size=rng.choice([16, 24, 32]),
        intermediate_size=rng.choice([20, 48]),
        moe_intermediate_size=rng.choice([8, 20]),
        num_hidden_layers=rng.randint(2, 6),
        num_attention_heads=kv_heads * rng.choice([1, 2, 4]),
        num_key_value_heads=kv_heads,
        head_dim=rng.choice([4, 8, 16]),
        num_experts=experts,
        num_experts_per_tok=rng.randint(1, min(4, experts)),
        max_position_embeddings=128,
        rope_theta=rng.choice([100.0, 10000.0]),
        eos_token_id=None,
        dtype="float32",
    )


def random_afmoe(seed: int) -> AfmoeConfig:
    rng = random.Random(seed)
    own, kinds = shape(rng), ["sliding_attention", "full_attention"]
    layers = own["num_hidden_layers"]
    return AfmoeConfig(
        **own,
        num_dense_layers=seed % layers,
        num_shared_experts=seed % 3,
        route_scale=rng.choice([1.0, 2.448, 2.826]),
        sliding_window=rng.choice([1, 2, 5, 8, 64]),
        layer_types=tuple(rng.choice(kinds) for _ in range(layers)) if seed % 4 else (),
        global_attn_every_n_layers=rng.choice([2, 3, 4]),
        mup_enabled=bool(seed % 2),
        bos_token_id=None,
        pad_token_id=None,
    )


def random_qwen3_moe(seed: int) -> Qwen3MoeConfig:
    rng = random.Random(seed)
    own = shape(rng)
    layers = own["num_hidden_layers"]
    return Qwen3MoeConfig(
        **own,
        norm_topk_prob=bool(seed % 2),
        decoder_sparse_step=rng.choice([1, 1, 2]),
        mlp_only_layers=tuple(sorted(rng.sample(range(layers), seed % layers))) if seed % 3 == 0 else (),
        attention_bias=seed % 4 == 1,
        rms_norm_eps=rng.choice([1e-6, 1e-5]),
    )


def random_glm4_moe(seed: int) -> Glm4MoeConfig:
    rng = random.Random(seed)
    own = shape(rng)
    groups = [n for n in (1, 2, 4) if own["num_experts"] // n >= 2]
    num_groups = rng.choice(groups)
    top_groups = rng.randint(1, num_groups)
    own["num_experts_per_tok"] = min(own["num_experts_per_tok"], top_groups * (own["num_experts"] // num_groups))
    return Glm4MoeConfig(
        **own,
        num_dense_layers=seed % own["num_hidden_layers"],
        num_shared_experts=1 + seed % 2,
        route_scale=rng.choice([1.0, 2.5]),
        norm_topk_prob=seed % 5 != 0,
        n_group=num_groups,
        topk_group=top_groups,
        use_qk_norm=bool(seed % 2),
        attention_bias=bool(seed % 3),
        partial_rotary_factor=rng.choice([0.5, 1.0]),
    )


RANDOM = {"afmoe": random_afmoe, "qwen3_moe": random_qwen3_moe, "glm4_moe": random_glm4_moe}


def random_config(family: str, seed: int) -> Any:
    return RANDOM[family](seed)


def hf_model(config: ModelConfig, seed: int) -> PreTrainedModel:
    """transformers' own model, from the config.json that we write, with random weights."""
    tree = {key: value for key, value in write_config(config).items() if key not in ("architectures", "dtype")}
    made = partial(HfAfmoeConfig) if config.model_type == "afmoe" else partial(AutoConfig.for_model, tree["model_type"])
    hf_config = made(**{key: value for key, value in tree.items() if key not in ("model_type", "rope_theta")})
    hf_config._attn_implementation = ["eager", "sdpa"][seed % 2]
    model = AutoModelForCausalLM.from_config(hf_config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(weight.shape, generator=generator)
        if "inv_freq" in name:
            continue
        if name.endswith("bias"):
            weight.data.copy_(0.3 * noise)
        else:
            gain = name.endswith("norm.weight")
            weight.data.copy_(1 + 0.3 * noise if gain else noise * max(1, weight.shape[-1]) ** -0.5)
    return model


def twin(config: ModelConfig, seed: int) -> tuple[PreTrainedModel, CausalLM, DenseExperts]:
    """The same random weights in transformers' model and in ours."""
    hf = hf_model(config, seed)
    experts = DenseExperts.from_hf(hf)
    ours = build(config, experts)
    theirs = {key: value for key, value in hf.state_dict().items() if ".mlp.experts." not in key}
    assert theirs.keys() == ours.tensors().keys()
    ours.load(theirs)
    return hf, ours, experts


def gradients(hf: PreTrainedModel, ours: CausalLM, experts: DenseExperts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours and theirs by checkpoint key, after a backward of each; routed experts as `experts.{layer}.{0, 1, 2}`."""
    theirs = {name: p.grad for name, p in hf.named_parameters() if ".mlp.experts." not in name and p.requires_grad}
    mine: dict[str, Any] = {name: p.grad for name, p in ours.weights().items()}
    assert mine.keys() == theirs.keys()
    for layer, leaves in experts.weights.items():
        moe = hf.model.layers[layer].mlp.experts
        pairs = zip(leaves, (*moe.gate_up_proj.grad.chunk(2, dim=1), moe.down_proj.grad), strict=True)
        for i, (leaf, grad) in enumerate(pairs):
            mine[f"experts.{layer}.{i}"], theirs[f"experts.{layer}.{i}"] = leaf.grad, grad
    return mine, theirs


def random_ids(config: ModelConfig, seed: int, batch: int, seq: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def our_logits(model: CausalLM, ids_BS: torch.Tensor) -> torch.Tensor:
    batch, seq = ids_BS.shape
    out = model(ids_BS.flatten(), packed_positions(batch, seq), PackedAttention(model.config, None, batch, seq))
    return model.logits(out.hidden_TD).unflatten(0, (batch, seq))


def diff(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours - theirs).abs().max().item()
