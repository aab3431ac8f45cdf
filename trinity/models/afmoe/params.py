"""Counting parameters without building a model, and telling matrices that Muon may have from those it may not."""

from torch import Tensor

from trinity.config import ModelConfig

ADAMW_MATRICES = ("embed_tokens.weight", "lm_head.weight", "router.gate.weight")


def count_params(config: ModelConfig) -> tuple[int, int]:
    """(total, active per token), embedding and head included in both; expert_bias is a buffer and not counted."""
    active_experts = len(config.moe_layers) * config.num_experts_per_tok
    all_experts = len(config.moe_layers) * config.num_experts
    backbone = count_backbone(config)
    return backbone + all_experts * config.expert_params, backbone + active_experts * config.expert_params


def count_backbone(config: ModelConfig) -> int:
    """Parameters of everything but the routed experts."""
    dim, head = config.hidden_size, config.head_dim
    q_dim, kv_dim = config.num_attention_heads * head, config.num_key_value_heads * head
    block = dim * (3 * q_dim + 2 * kv_dim) + 2 * head + 4 * dim
    dense = 3 * dim * config.intermediate_size
    moe = dim * config.num_experts + config.num_shared_experts * config.expert_params
    feed_forward = config.num_dense_layers * dense + len(config.moe_layers) * moe
    return 2 * config.vocab_size * dim + dim + config.num_hidden_layers * block + feed_forward


def is_hidden_matrix(name: str, tensor: Tensor) -> bool:
    """Whether this weight is Muon's: two-dimensional and neither embedding, head nor router gate."""
    return tensor.ndim == 2 and tensor.numel() > 0 and not name.endswith(ADAMW_MATRICES)
