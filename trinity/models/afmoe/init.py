"""Arcee's initialisation of the backbone (arXiv 2602.17004): matrices truncated normal, post-norm gains 1/sqrt(L).

L counts all layers. Gains of the other norms are 1 (those of q, k and the final norm are not published).
"""

import torch
from torch import nn

from trinity.config import ModelConfig
from trinity.models.rules.init import init_expert, init_std, named_generator, truncated_normal

__all__ = ["init_expert", "init_weights"]

POST_NORMS = ("post_attention_layernorm.weight", "post_mlp_layernorm.weight")


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Overwrite every parameter of an `Afmoe` and zero its expert biases; each value depends on (seed, name) alone."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.copy_(truncated_normal(tuple(weight.shape), init_std(config), named_generator(seed, name)))
        else:
            weight.fill_(config.num_hidden_layers**-0.5 if name.endswith(POST_NORMS) else 1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.zero_()
