"""Draws of fresh weights, by name: the same weight wherever and in whatever order it is made.

Legend: D model, F expert hidden.
Every matrix is TruncNormal(0, sigma) on [-3 sigma, 3 sigma]; sigma is the family's (`ModelConfig.init_std`).
Drawn on the CPU in float32 from a generator seeded by (seed, name), then cast: device, dtype, placement and order of
creation change nothing. Shards make their own experts with `init_expert`, so this file imports no model code.
"""

import hashlib

import torch
from torch import Tensor

from trinity.config import ModelConfig


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, name) alone; torch seeds it with 32 bits."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def truncated_normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """float32 CPU tensor of the given shape from N(0, std^2), truncated at 3 std."""
    empty = torch.empty(shape, dtype=torch.float32)
    return torch.nn.init.trunc_normal_(empty, 0.0, std, -3 * std, 3 * std, generator=generator)


def init_expert(
    config: ModelConfig, layer: int, expert: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (gate_FD, up_FD, down_DF) of one routed expert, in the checkpoint's layout; arguments decide all."""
    generator = named_generator(seed, f"model.layers.{layer}.mlp.experts.{expert}")
    dim, hidden, std = config.hidden_size, config.moe_intermediate_size, config.init_std
    gate, up, down = (truncated_normal(s, std, generator) for s in ((hidden, dim), (hidden, dim), (dim, hidden)))
    return gate.to(dtype), up.to(dtype), down.to(dtype)
