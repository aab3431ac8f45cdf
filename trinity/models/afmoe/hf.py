"""`config.json` of a Hugging Face AFMoE checkpoint <-> AfmoeConfig. Refuses what the forward pass would get wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trinity.models.afmoe.config import AfmoeConfig
from trinity.models.common.hf import fields_of, refuse_others, usual

# What every release has and we implement; another value means another forward pass.
FIXED = {
    "hidden_act": "silu",
    "score_func": "sigmoid",
    "route_norm": True,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_groups": 1,
    "num_limited_groups": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def read_config(tree: Mapping[str, Any], source: str | Path) -> AfmoeConfig:
    """Raises CheckpointError naming the file, the field, its value and what it must be."""
    refuse_others(tree, FIXED, source)
    return fields_of(AfmoeConfig, tree, source, "AFMoE")


def write_config(config: AfmoeConfig) -> dict[str, Any]:
    own = config.model_dump(mode="json", exclude={"dtype", "rope_theta"})
    rope = {"rope_theta": config.rope_theta}
    return {**own, **FIXED, **usual(config, "AfmoeForCausalLM", rope), "initializer_range": 0.02}
