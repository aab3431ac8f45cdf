"""Grouped-query attention, and the attention of training batches.

Legend: T tokens (= B*S in training), B batch, S sequence, D model, H query heads, G key-value heads, d head dim, e value dim.
The layer projects, normalises, rotates and gates; how the tokens see each other is injected (`Attend`): masks in
training, a paged cache in the engine. What a layer sees is in its LayerCache (trinity/config/model.py).
"""

from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity.config import LayerCache, ModelConfig
from trinity.models.common.layers import Device, Dtype, Linear, Made, RMSNorm, project, rotate, sigmoid
from trinity.ops import batch_invariant


class Attend(Protocol):
    """Softmax attention of this forward pass's tokens; knows from `layer` its LayerCache: scale, window, what is kept."""

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGe: Tensor | None) -> Tensor:
        """-> o_THe. q, k come normalised and rotated. Query head h uses key head h // (H / G). `v_TGe` is None in a latent
        layer: there the first e numbers of a key are its value."""
        ...


class Attention(nn.Module):
    """Grouped-query attention of one layer.

    `qk_norm_eps`: q and k are normalised per head (None: not). `rotates`: they are turned by their positions. `is_gated`: the
    output is multiplied by sigmoid(gate(x)), elementwise, before the output projection. Biases of q, k, v, and of the output.
    """

    is_exact = False

    def __init__(
        self, layer: int, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, *, rotates: bool = True,
        qk_norm_eps: float | None = None, rounds_first: bool = True, is_gated: bool = False, has_bias: bool = False,
        has_output_bias: bool = False, device: Device = None, dtype: Dtype = None,
    ):  # fmt: skip
        super().__init__()
        made: Made = {"device": device, "dtype": dtype}
        q_dim, kv_dim = num_heads * head_dim, num_kv_heads * head_dim
        self.layer, self.head_dim, self.rotates = layer, head_dim, rotates
        self.q_proj = Linear(dim, q_dim, bias=has_bias, **made)
        self.k_proj = Linear(dim, kv_dim, bias=has_bias, **made)
        self.v_proj = Linear(dim, kv_dim, bias=has_bias, **made)
        self.gate_proj = Linear(dim, q_dim, **made) if is_gated else None
        self.o_proj = Linear(q_dim, dim, bias=has_output_bias, **made)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps, rounds_first=rounds_first, **made)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps, rounds_first=rounds_first, **made)

    def forward(self, x_TD: Tensor, table: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        gates = () if self.gate_proj is None else (self.gate_proj,)
        q, k, v, *gate = project(x_TD, self.q_proj, self.k_proj, self.v_proj, *gates)
        q_THd, k_TGd, v_TGd = (projected.unflatten(1, (-1, self.head_dim)) for projected in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q_THd, k_TGd = self.q_norm(q_THd), self.k_norm(k_TGd)
        if self.rotates:
            q_THd, k_TGd = rotate(q_THd, table), rotate(k_TGd, table)
        o_TX = attend(self.layer, q_THd, k_TGd, v_TGd).flatten(1)
        return self.o_proj(o_TX * sigmoid(gate[0], self.is_exact) if gate else o_TX)


class PackedAttention:
    """Attend for training: B sequences of S tokens, causal, windowed where a layer is, optionally within documents.

    docs_BS: int document number of each token, or None to let documents of a sequence see each other.
    Make one per forward pass: masks (bool [B or 1, 1, S, S]) are built at first use and shared by the layers.
    Where no mask is needed (no documents, and a full layer or S <= window) the kernels' own causal path runs.
    With `batch_invariant` a token's result depends on the keys that it sees alone; a document must lie in one piece.
    """

    def __init__(self, config: ModelConfig, docs_BS: Tensor | None, batch: int, seq: int):
        assert docs_BS is None or docs_BS.shape == (batch, seq), f"docs {docs_BS.shape} for {batch} x {seq} tokens"
        self.caches, self.is_exact = config.layer_caches, config.batch_invariant
        self.docs_BS, self.batch, self.seq = docs_BS, batch, seq
        self._masks: dict[int | None, Tensor | None] = {}

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGe: Tensor | None) -> Tensor:
        cache = self.caches[layer]
        if v_TGe is None:
            v_TGe = k_TGd[..., : cache.value_dim]
        if not self.is_exact or not batch_invariant.is_for(q_THd) or not is_plain(cache):
            return self._library(cache, q_THd, k_TGd, v_TGe)
        from trinity.ops.batch_invariant import attention

        seen = attention.Seen(*self._visible(cache))
        return attention.differentiable(q_THd, k_TGd, v_TGe, seen, partial(self._gradients, cache))

    def _visible(self, cache: LayerCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Seen keys of each token, of the T of this pass: all T, first_T, end_T, and its document's first token."""
        at_T = torch.arange(self.batch * self.seq)
        origin_T = at_T - document_positions(self.docs_BS, self.batch, self.seq).cpu()
        first_T = origin_T if cache.window is None else origin_T.maximum(at_T - cache.window + 1)
        return at_T, first_T, at_T + 1, origin_T

    def _library(self, cache: LayerCache, q_THd: Tensor, k_TGd: Tensor, v_TGe: Tensor) -> Tensor:
        mask = self._mask(cache, q_THd.device)
        q, k, v = map(self._sequences, (q_THd, k_TGd, v_TGe))
        out_BHSe = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=cache.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out_BHSe.transpose(1, 2).flatten(0, 1)

    def _gradients(
        self, cache: LayerCache, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse_TH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The library's on a CPU, of a result that is ours: to let it compute that once more would take half as long again. In
        fp32, which is twice as fast there as bf16."""
        mask, dtype = self._mask(cache, q.device), q.dtype
        do, q, k, v, o = (t.float() for t in (do, q, k, v, o))
        if mask is not None:  # what is added to scores
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        lse_BHS = self._sequences(lse_TH[..., None]).squeeze(-1)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(self._sequences, (do, q, k, v, o)), lse_BHS, 0.0, mask is None, attn_mask=mask, scale=cache.scale
        )
        dq, dk, dv = (grad_BHSd.transpose(1, 2).flatten(0, 1).to(dtype) for grad_BHSd in found)
        return dq, dk, dv

    def _sequences(self, x_THd: Tensor) -> Tensor:
        return x_THd.unflatten(0, (self.batch, self.seq)).transpose(1, 2)

    def _mask(self, cache: LayerCache, device: torch.device) -> Tensor | None:
        window = cache.window if cache.window is not None and cache.window < self.seq else None
        if window not in self._masks:
            plain = window is None and self.docs_BS is None
            self._masks[window] = None if plain else causal_mask(self.seq, window, self.docs_BS, device)
        return self._masks[window]


def is_plain(cache: LayerCache) -> bool:
    """Say whether the batch-invariant kernel computes it: keys and values of one size, scores scaled by its root."""
    return cache.key_dim == cache.value_dim and not cache.is_latent and cache.scale == cache.key_dim**-0.5


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
