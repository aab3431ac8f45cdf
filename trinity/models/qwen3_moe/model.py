"""Qwen3-MoE: everything but the routed experts.

Decisions: a norm before attention and one before the feed-forward, as in Llama; queries and keys normed per head; softmax
routing without a selection bias; no shared expert, so a layer with experts computes nothing beside the hop.
Checked against transformers 5.23 in tests/parity/.
"""

import torch

from trinity.models.common.attention import Attention
from trinity.models.common.block import Block, PreNorm, Residual
from trinity.models.common.decoder import CausalLM, Decoder, Rotary
from trinity.models.common.experts import ExpertLayer
from trinity.models.common.layers import Device, Dtype, Made, RMSNorm, SwiGLU
from trinity.models.common.router import SoftmaxRouter
from trinity.models.qwen3_moe.config import Qwen3MoeConfig
from trinity.models.qwen3_moe.keys import KEYS


def block(config: Qwen3MoeConfig, layer: int, *, device: Device = None, dtype: Dtype = None) -> Block:
    made: Made = {"device": device, "dtype": dtype}
    dim, eps, is_dense = config.hidden_size, config.rms_norm_eps, layer not in config.moe_layers
    attention = Attention(
        layer, dim, config.num_attention_heads, config.num_key_value_heads, config.head_dim, qk_norm_eps=eps,
        has_bias=config.attention_bias, has_output_bias=config.attention_bias, **made,
    )  # fmt: skip
    router = None
    if not is_dense:
        top_k, normalises = config.num_experts_per_tok, config.norm_topk_prob
        router = SoftmaxRouter(dim, config.num_experts, top_k, normalises=normalises, **made)
    dense = SwiGLU(dim, config.intermediate_size, **made) if is_dense else None
    return Block(layer, PreNorm(attention, router, dim, eps, **made), dense, Residual(), is_dense)


class Qwen3Moe(CausalLM):
    """The backbone with its head. dtype None means `config.dtype`."""

    def __init__(
        self,
        config: Qwen3MoeConfig,
        experts: ExpertLayer,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        made: Made = {"device": device, "dtype": dtype or getattr(torch, config.dtype)}
        blocks = [block(config, layer, **made) for layer in range(config.num_hidden_layers)]
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rounds_first=True, **made)
        rotary = Rotary(config.head_dim, config.rope_theta)
        super().__init__(config, KEYS, experts, Decoder(config, blocks, norm, rotary, **made))
