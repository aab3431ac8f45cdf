"""Fresh weights of a backbone: matrices drawn, gains 1 unless the family says otherwise, biases 0."""

from collections.abc import Callable

import torch

from trinity.models.common.decoder import CausalLM
from trinity.models.rules.init import named_generator, truncated_normal


@torch.no_grad()
def init_weights(model: CausalLM, seed: int, gain: Callable[[str], float] = lambda key: 1.0) -> None:
    """Overwrite every parameter and zero the selection biases; each value depends on (seed, checkpoint key) alone."""
    std = model.config.init_std
    for key, weight in model.weights().items():
        if weight.ndim > 1:
            weight.copy_(truncated_normal(tuple(weight.shape), std, named_generator(seed, key)))
        else:
            weight.fill_(0.0 if key.endswith("bias") else gain(key))
    for bias in model.expert_bias.values():
        bias.zero_()
