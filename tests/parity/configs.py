"""Random configurations of every model family, and ids for them; without transformers, which not all who want them need.

Legend: B batch, S sequence.
"""

import random
from typing import Any

import torch

from trinity.config import ModelConfig
from trinity.models.afmoe.config import AfmoeConfig
from trinity.models.glm4_moe.config import Glm4MoeConfig
from trinity.models.qwen3_moe.config import Qwen3MoeConfig

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


def random_ids(config: ModelConfig, seed: int, batch: int, seq: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))
