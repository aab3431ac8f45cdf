"""Gated grouped-query attention, and the attention of training batches.

Legend: T tokens (= B*S in training), B batch, S sequence, D model, H query heads, G key-value heads, d head dim.
The layer projects, normalises, rotates and gates; how the tokens see each other is injected (`Attend`): masks in
training, a paged cache in the engine. Sliding layers rotate and look back `sliding_window` tokens, themselves included;
full layers carry no position encoding and see everything before them.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity.config import ModelConfig
from trinity.models.common.layers import RMSNorm, linear, project, rotate, sigmoid
from trinity.ops import batch_invariant


class Attend(Protocol):
    """Softmax attention of this forward pass's tokens, scale d**-0.5; knows from `layer` whether there is a window."""

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """-> o_THd. q, k come normalised and, in sliding layers, rotated. Query head h uses key head h // (H / G)."""
        ...


class Attention(nn.Module):
    """QK-normed GQA whose output is gated elementwise, sigmoid(gate(x)), before the output projection."""

    is_exact = False

    def __init__(self, config: ModelConfig, layer: int, *, device=None, dtype=None):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        dim, self.head_dim = config.hidden_size, config.head_dim
        q_dim, kv_dim = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.layer = layer
        self.rotary = config.layer_types[layer] == "sliding_attention"
        self.q_proj = linear(dim, q_dim, **made)
        self.k_proj = linear(dim, kv_dim, **made)
        self.v_proj = linear(dim, kv_dim, **made)
        self.gate_proj = linear(dim, q_dim, **made)
        self.o_proj = linear(q_dim, dim, **made)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, **made)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, **made)

    def forward(self, x_TD: Tensor, table: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q, k, v, gate = project(x_TD, self.q_proj, self.k_proj, self.v_proj, self.gate_proj)
        q_THd, k_TGd, v_TGd = (projected.unflatten(1, (-1, self.head_dim)) for projected in (q, k, v))
        q_THd, k_TGd = self.q_norm(q_THd), self.k_norm(k_TGd)
        if self.rotary:
            q_THd, k_TGd = rotate(q_THd, table), rotate(k_TGd, table)
        o_THd = attend(self.layer, q_THd, k_TGd, v_TGd)
        return self.o_proj(o_THd.flatten(1) * sigmoid(gate, self.is_exact))


class PackedAttention:
    """Attend for training: B sequences of S tokens, causal, windowed in sliding layers, optionally within documents.

    docs_BS: int document number of each token, or None to let documents of a sequence see each other.
    Make one per forward pass: masks (bool [B or 1, 1, S, S]) are built at first use and shared by the layers.
    Where no mask is needed (no documents, and a full layer or S <= window) the kernels' own causal path runs.
    With `batch_invariant` a token's result depends on the keys that it sees alone; a document must lie in one piece.
    """

    def __init__(self, config: ModelConfig, docs_BS: Tensor | None, batch: int, seq: int):
        assert docs_BS is None or docs_BS.shape == (batch, seq), f"docs {docs_BS.shape} for {batch} x {seq} tokens"
        self.config, self.docs_BS, self.batch, self.seq = config, docs_BS, batch, seq
        self._masks: dict[int | None, Tensor | None] = {}

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        if not self.config.batch_invariant or not batch_invariant.is_for(q_THd):
            return self._library(layer, q_THd, k_TGd, v_TGd)
        from trinity.ops.batch_invariant import attention

        return attention.differentiable(
            q_THd, k_TGd, v_TGd, *self._visible(layer), lambda q, k, v: self._library(layer, q, k, v)
        )

    def _visible(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys that each token sees, of the T of this pass: (first_T, end_T)."""
        at_T = torch.arange(self.batch * self.seq)
        begin_T = at_T - document_positions(self.docs_BS, self.batch, self.seq).cpu()
        if self.config.layer_types[layer] == "sliding_attention":
            begin_T = begin_T.maximum(at_T - self.config.sliding_window + 1)
        return begin_T, at_T + 1

    def _library(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        mask = self._mask(layer, q_THd.device)
        q, k, v = (x.unflatten(0, (self.batch, self.seq)).transpose(1, 2) for x in (q_THd, k_TGd, v_TGd))
        out_BHSd = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out_BHSd.transpose(1, 2).flatten(0, 1)

    def _mask(self, layer: int, device: torch.device) -> Tensor | None:
        sliding = self.config.layer_types[layer] == "sliding_attention" and self.config.sliding_window < self.seq
        window = self.config.sliding_window if sliding else None
        if window not in self._masks:
            plain = window is None and self.docs_BS is None
            self._masks[window] = None if plain else causal_mask(self.seq, window, self.docs_BS, device)
        return self._masks[window]


def causal_mask(seq: int, window: int | None, docs_BS: Tensor | None, device: torch.device) -> Tensor:
    """bool [B or 1, 1, S, S], True where query row may see key column: not later, in the window, of its document."""
    mask = torch.ones(seq, seq, dtype=torch.bool, device=device).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    if docs_BS is None:
        return mask[None, None]
    docs_BS = docs_BS.to(device)
    return (mask & (docs_BS[:, :, None] == docs_BS[:, None, :]))[:, None]


def document_positions(docs_BS: Tensor | None, batch: int, seq: int) -> Tensor:
    """int64 [B*S]: of each token in its document, or in its sequence where docs_BS is None."""
    if docs_BS is None:
        return packed_positions(batch, seq)
    at_S = torch.arange(seq, device=docs_BS.device)
    begins_BS = F.pad(docs_BS[:, 1:] != docs_BS[:, :-1], (1, 0), value=True)
    return (at_S - (at_S * begins_BS).cummax(1).values).flatten()


def packed_positions(batch: int, seq: int, device: torch.device | str | None = None) -> Tensor:
    """int64 [B*S]: 0..S-1 for each sequence. Documents do not restart: rotary angles matter by difference only."""
    return torch.arange(seq, device=device).repeat(batch)
