"""AFMoE, the architecture of Arcee's Trinity models: everything but the routed experts.

Legend: T tokens (flat: no batch dimension), D model, V vocabulary.
Two seams keep one forward pass for training and serving: `ExpertLayer` (where routed experts are) and `Attend` (how
tokens see each other). Module names make `state_dict()` the Hugging Face checkpoint without `mlp.experts.*`.
Checked against transformers 5.23 in tests/parity/test_model.py; facts and sources in arXiv 2602.17004.
"""

import copy
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.config import ModelConfig
from trinity.models.common.attention import Attend, Attention
from trinity.models.common.layers import RMSNorm, SwiGLU, linear, rotary_table
from trinity.models.common.moe import ExpertLayer, MoE
from trinity.models.common.router import Routing

__all__ = ["Afmoe", "Attend", "ExpertLayer", "Output", "Routing"]


class Output(NamedTuple):
    hidden_TD: Tensor  # after the final norm
    routing: tuple[Routing, ...]  # one per MoE layer, in order


Inputs = tuple[Tensor, Tensor, Attend]  # ids_T, positions_T, who sees whom


def interleave(passes: Sequence[Generator[None, None, Output]]) -> list[Output]:
    """Run each to its next yield, one after the other, until all have returned; -> what they returned."""
    done: dict[int, Output] = {}
    while len(done) < len(passes):
        for i, each in enumerate(passes):
            if i not in done:
                try:
                    next(each)
                except StopIteration as stop:
                    done[i] = stop.value
    return [done[i] for i in range(len(passes))]


class Block(nn.Module):
    """Attention, then a dense or MoE feed-forward, each between a norm before and a norm after it (sandwich norms)."""

    def __init__(self, config: ModelConfig, layer: int, *, device=None, dtype=None):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer, **made)
        self.mlp: MoE | SwiGLU
        if layer in config.moe_layers:
            self.mlp = MoE(config, layer, **made)
        else:
            self.mlp = SwiGLU(dim, config.intermediate_size, **made)
        self.input_layernorm = RMSNorm(dim, eps, **made)
        self.post_attention_layernorm = RMSNorm(dim, eps, **made)
        self.pre_mlp_layernorm = RMSNorm(dim, eps, **made)
        self.post_mlp_layernorm = RMSNorm(dim, eps, **made)

    def forward(
        self, h_TD: Tensor, table: tuple[Tensor, Tensor], attend: Attend, experts: ExpertLayer
    ) -> Generator[None, None, tuple[Tensor, Routing | None]]:
        mixed_TD = self.self_attn(self.input_layernorm(h_TD), table, attend)
        h_TD = h_TD + self.post_attention_layernorm(mixed_TD)
        x_TD, routing = self.pre_mlp_layernorm(h_TD), None
        if isinstance(self.mlp, MoE):
            y_TD, routing = yield from self.mlp(x_TD, experts)
        else:
            y_TD = self.mlp(x_TD)
        return h_TD + self.post_mlp_layernorm(y_TD), routing


class Decoder(nn.Module):
    """Embedding, layers and final norm: what checkpoints call `model.`"""

    def __init__(self, config: ModelConfig, *, device=None, dtype=None):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, **made)
        self.layers = nn.ModuleList(Block(config, i, **made) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **made)

    def forward(
        self, ids_T: Tensor, positions_T: Tensor, attend: Attend, experts: ExpertLayer
    ) -> Generator[None, None, Output]:
        cfg, routings = self.config, []
        h_TD = self.embed_tokens(ids_T)
        if cfg.mup_enabled:
            h_TD = h_TD * cfg.hidden_size**0.5
        table = rotary_table(positions_T, cfg.head_dim, cfg.rope_theta, h_TD.dtype, cfg.batch_invariant)
        for block in self.layers:
            h_TD, routing = yield from block(h_TD, table, attend, experts)
            routings.append(routing)
        return Output(self.norm(h_TD), tuple(r for r in routings if r is not None))


class Afmoe(nn.Module):
    """The backbone with its untied head. `experts` is called, never owned: it is no submodule and has no state here.

    dtype None means `config.dtype`. Weights are torch's defaults until `init_weights` or `load_state_dict`.
    """

    def __init__(self, config: ModelConfig, experts: ExpertLayer, *, device=None, dtype=None):
        super().__init__()
        dtype = dtype or getattr(torch, config.dtype)
        self.config = config
        self._experts = (experts,)  # a tuple hides a Module from nn.Module's registration
        self.model = Decoder(config, device=device, dtype=dtype)
        self.lm_head = linear(config.hidden_size, config.vocab_size, device=device, dtype=dtype)
        for part in self.modules():
            part.is_exact = config.batch_invariant  # type: ignore[assignment]

    @property
    def experts(self) -> ExpertLayer:
        return self._experts[0]

    def forward(self, ids_T: Tensor, positions_T: Tensor, attend: Attend) -> Output:
        """ids and positions int64 [T]; `attend` says which tokens see which. T may be 0."""
        return self.forward_all([(ids_T, positions_T, attend)])[0]

    def forward_all(self, passes: Sequence[Inputs]) -> list[Output]:
        """Independent passes side by side: while the rows of one are with their experts, another goes on."""
        return interleave([self.model(*inputs, self._experts[0]) for inputs in passes])

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] in the model's dtype, from hidden states after the final norm. No scaling, no soft cap."""
        return self.lm_head(hidden_TD)

    def with_experts(self, experts: ExpertLayer) -> "Afmoe":
        """The same modules, and so the same weights, calling other experts: another caller's dispatcher, say."""
        twin = copy.copy(self)
        twin._experts = (experts,)
        return twin

    @property
    def expert_bias(self) -> dict[int, Tensor]:
        """The fp32 selection biases [E] by layer: the buffers themselves, to be written in place."""
        return {i: block.mlp.expert_bias for i, block in enumerate(self.model.layers) if isinstance(block.mlp, MoE)}
