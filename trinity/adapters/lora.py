"""Adapters on the matrices of a backbone: y = W x + (alpha / r) B A x, with W as it was (LoRA, arXiv 2106.09685).

Legend: N outputs and K inputs of a matrix, r rank.
Decisions: A is drawn as PEFT draws it, uniform up to 1 / sqrt(K), from the seed and the matrix's name alone; B is zero, so
that a run begins at its base, bit for bit. Both are fp32 whatever the model's type.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trinity.config import LoraConfig, OptimConfig
from trinity.errors import ConfigError
from trinity.models.common.decoder import CausalLM
from trinity.models.common.layers import Linear, product
from trinity.models.registry import family_of
from trinity.models.rules.init import named_generator
from trinity.ops import batch_invariant


class Adapter(nn.Module):
    """The adapter of one matrix, and the products with both of those that rows go through side by side."""

    def __init__(self, of: Linear, lora: LoraConfig):
        super().__init__()
        self.scale, device = lora.scale, of.weight.device
        self.lora_A = Linear(of.in_features, lora.rank, device=device, dtype=torch.float32)
        self.lora_B = Linear(lora.rank, of.out_features, device=device, dtype=torch.float32)
        self.lora_A.is_exact = self.lora_B.is_exact = of.is_exact

    def forward(self, x: Tensor, parts: Sequence[Linear]) -> list[Tensor]:
        """x times each part, which have adapters like this one; biases are the caller's."""
        adapters = [part.adapter for part in parts if isinstance(part.adapter, Adapter)]
        triples = [(part.weight, own.lora_A, own.lora_B) for part, own in zip(parts, adapters, strict=True)]
        is_exact = self.lora_A.is_exact
        if is_exact and torch.is_grad_enabled() and batch_invariant.is_for(x) and x.dtype == torch.float32:
            from trinity.ops.batch_invariant import low_rank  # a compiler comes with it

            return low_rank.linear(x, [(w_NK, a.weight, b.weight) for w_NK, a, b in triples], self.scale)
        shares = [b(a(x) * self.scale) for _, a, b in triples]
        return [product(x, w_NK, is_exact).add_(share) for (w_NK, *_), share in zip(triples, shares, strict=True)]


def choose_trained(model: CausalLM, optim: OptimConfig, seed: int) -> None:
    """Let those weights of a backbone require gradients that are trained, after adding adapters where they are wanted."""
    role = family_of(model.config).keys.role
    for key, weight in model.weights().items():
        weight.requires_grad_(optim.trains(role(key)))
    if optim.lora.rank:
        _attach(model, optim.lora, seed)


def _attach(model: CausalLM, lora: LoraConfig, seed: int) -> None:
    role, has_experts = family_of(model.config).keys.role, bool(model.config.moe_layers)
    keys = {model.key(f"{path}.weight"): part for path, part in model.named_modules() if isinstance(part, Linear)}
    wanted = {key: part for key, part in keys.items() if role(key) in lora.targets and part.weight.numel()}
    if not wanted and not (has_experts and "experts" in lora.targets):
        raise ConfigError(
            f"optim.lora.targets {', '.join(lora.targets)}: this model has none of these; name another part"
        )
    for key, part in wanted.items():
        part.adapter = adapter = Adapter(part, lora)
        with torch.no_grad():
            adapter.lora_A.weight.copy_(first_a(lora.rank, part.in_features, seed, key))
            adapter.lora_B.weight.zero_()


def first_a(rank: int, num_inputs: int, seed: int, key: str) -> Tensor:
    """a_rK that the adapter of the matrix with that key in a checkpoint begins with, fp32."""
    drawn = torch.rand(rank, num_inputs, generator=named_generator(seed, f"{key}.lora_A"))
    return (2 * drawn - 1) / math.sqrt(num_inputs)


def merged(weight_NK: Tensor, a_rK: Tensor, b_Nr: Tensor, scale: float) -> Tensor:
    """weight_NK of the matrix with its adapter, rounded once; where that adds nothing, the same bits."""
    change_NK = scale * (b_Nr.float() @ a_rK.float()).to(weight_NK.device)
    return torch.where(change_NK == 0, weight_NK, (weight_NK.float() + change_NK).to(weight_NK.dtype))
