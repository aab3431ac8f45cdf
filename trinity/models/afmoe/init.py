"""Arcee's initialisation of the backbone (arXiv 2602.17004): matrices truncated normal, post-norm gains 1/sqrt(L).

L counts all layers. Gains of the other norms are 1 (those of q, k and the final norm are not published).
"""

from trinity.models.common import init
from trinity.models.common.decoder import CausalLM

POST_NORMS = ("post_attention_layernorm.weight", "post_mlp_layernorm.weight")


def init_weights(model: CausalLM, seed: int) -> None:
    """Overwrite every parameter and zero the selection biases; each value depends on (seed, checkpoint key) alone."""
    small = model.config.num_hidden_layers**-0.5
    init.init_weights(model, seed, lambda key: small if key.endswith(POST_NORMS) else 1.0)
