"""GLM-4-MoE (GLM-4.5): everything but the routed experts.

Decisions: a norm before attention and one before the feed-forward, as in Llama; part of each head rotated; sigmoid routing
with a correction bias, in groups where there are several; shared experts beside the hop.
Checked against transformers 5.23 in tests/parity/.
"""

import torch

from trinity.models.common.attention import Attention
from trinity.models.common.block import Block, PreNorm, Residual
from trinity.models.common.decoder import CausalLM, Decoder, Rotary
from trinity.models.common.experts import ExpertLayer
from trinity.models.common.layers import Device, Dtype, Made, RMSNorm, SwiGLU
from trinity.models.common.router import SigmoidRouter
from trinity.models.glm4_moe.config import Glm4MoeConfig
from trinity.models.glm4_moe.keys import KEYS


def router_of(config: Glm4MoeConfig, *, device: Device = None, dtype: Dtype = None) -> SigmoidRouter:
    return SigmoidRouter(
        config.hidden_size, config.num_experts, config.num_experts_per_tok, scale=config.route_scale,
        normalises=config.norm_topk_prob, num_groups=config.n_group, top_groups=config.topk_group,
        device=device, dtype=dtype,
    )  # fmt: skip


def block(config: Glm4MoeConfig, layer: int, *, device: Device = None, dtype: Dtype = None) -> Block:
    made: Made = {"device": device, "dtype": dtype}
    dim, eps, is_dense = config.hidden_size, config.rms_norm_eps, layer not in config.moe_layers
    attention = Attention(
        layer, dim, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        qk_norm_eps=eps if config.use_qk_norm else None, has_bias=config.attention_bias, **made,
    )  # fmt: skip
    router = None if is_dense else router_of(config, **made)
    hidden = config.intermediate_size if is_dense else config.moe_intermediate_size * config.num_shared_experts
    return Block(layer, PreNorm(attention, router, dim, eps, **made), SwiGLU(dim, hidden, **made), Residual(), is_dense)


class Glm4Moe(CausalLM):
    """The backbone with its head. dtype None means `config.dtype`."""

    def __init__(
        self,
        config: Glm4MoeConfig,
        experts: ExpertLayer,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        made: Made = {"device": device, "dtype": dtype or getattr(torch, config.dtype)}
        blocks = [block(config, layer, **made) for layer in range(config.num_hidden_layers)]
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rounds_first=True, **made)
        rotary = Rotary(config.rotary_dim, config.rope_theta)
        super().__init__(config, KEYS, experts, Decoder(config, blocks, norm, rotary, **made))
