"""AFMoE, the architecture of Arcee's Trinity models: everything but the routed experts.

Legend: T tokens, D model.
Sandwich norms (before and after attention and feed-forward), gated attention with normed queries and keys, three sliding
layers that rotate to one global layer that does not, sigmoid routing with a selection bias.
Checked against transformers 5.23 in tests/parity/; facts and sources in arXiv 2602.17004.
"""

import torch
from torch import Tensor, nn

from trinity.models.afmoe.config import AfmoeConfig
from trinity.models.afmoe.keys import KEYS
from trinity.models.common.attention import Attend, Attention
from trinity.models.common.block import Block, Sent, Table
from trinity.models.common.decoder import CausalLM, Decoder, Rotary
from trinity.models.common.experts import ExpertLayer
from trinity.models.common.layers import Device, Dtype, Made, RMSNorm, SwiGLU
from trinity.models.common.native_step import After, Before
from trinity.models.common.router import SigmoidRouter


class Pre(nn.Module):
    """Attention between its two norms, the feed-forward's first norm, and the router."""

    def __init__(self, config: AfmoeConfig, layer: int, *, device: Device = None, dtype: Dtype = None):
        super().__init__()
        made: Made = {"device": device, "dtype": dtype}
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(
            layer, dim, config.num_attention_heads, config.num_key_value_heads, config.head_dim, qk_norm_eps=eps,
            rounds_first=False, rotates=config.layer_types[layer] == "sliding_attention", is_gated=True, **made,
        )  # fmt: skip
        self.input_layernorm = RMSNorm(dim, eps, **made)
        self.post_attention_layernorm = RMSNorm(dim, eps, **made)
        self.pre_mlp_layernorm = RMSNorm(dim, eps, **made)
        self.router: SigmoidRouter | None = None
        if layer in config.moe_layers:
            self.router = SigmoidRouter(
                dim, config.num_experts, config.num_experts_per_tok, scale=config.route_scale, **made
            )

    def described(self) -> Before:
        """Its parts, for the extension (common/native_step.py)."""
        norms = (self.post_attention_layernorm, self.pre_mlp_layernorm)
        return Before(self.input_layernorm, self.self_attn, *norms, self.router)

    def forward(self, h_TD: Tensor, table: Table, attend: Attend) -> Sent:
        mixed_TD = self.self_attn(self.input_layernorm(h_TD), table, attend)
        h_TD = h_TD + self.post_attention_layernorm(mixed_TD)
        x_TD = self.pre_mlp_layernorm(h_TD)
        return Sent(h_TD, x_TD, None if self.router is None else self.router(x_TD))


class Post(nn.Module):
    """The feed-forward's second norm, and the sum."""

    def __init__(self, config: AfmoeConfig, *, device: Device = None, dtype: Dtype = None):
        super().__init__()
        self.post_mlp_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)

    def described(self) -> After:
        """Its parts, for the extension (common/native_step.py)."""
        return After(self.post_mlp_layernorm)

    def forward(self, residual_TD: Tensor, y_TD: Tensor) -> Tensor:
        return residual_TD + self.post_mlp_layernorm(y_TD)


def block(config: AfmoeConfig, layer: int, *, device: Device = None, dtype: Dtype = None) -> Block:
    made: Made = {"device": device, "dtype": dtype}
    is_dense = layer not in config.moe_layers
    shared = config.moe_intermediate_size * config.num_shared_experts  # one ungated SwiGLU of their total width
    local = SwiGLU(config.hidden_size, config.intermediate_size if is_dense else shared, **made)
    return Block(layer, Pre(config, layer, **made), local, Post(config, **made), is_dense)


class Afmoe(CausalLM):
    """The backbone with its head. dtype None means `config.dtype`."""

    def __init__(
        self,
        config: AfmoeConfig,
        experts: ExpertLayer,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        made: Made = {"device": device, "dtype": dtype or getattr(torch, config.dtype)}
        blocks = [block(config, layer, **made) for layer in range(config.num_hidden_layers)]
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **made)
        scale = config.hidden_size**0.5 if config.mup_enabled else None
        rotary = Rotary(config.head_dim, config.rope_theta)
        super().__init__(config, KEYS, experts, Decoder(config, blocks, norm, rotary, scale, **made))
