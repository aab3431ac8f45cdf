"""`config.json` of a Hugging Face GLM-4-MoE checkpoint <-> Glm4MoeConfig. Refuses what the forward pass would get wrong.

Multi-token prediction layers, which published checkpoints have after the last layer, predict further tokens for speculation;
the next token is right without them: they are left out, and said to be.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trinity.models.common.hf import fields_of, refuse_others, refuse_sliding, usual
from trinity.models.glm4_moe.config import Glm4MoeConfig

log = logging.getLogger(__name__)

FIXED = {"hidden_act": "silu", "tie_word_embeddings": False}
NAMES = {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "first_k_dense_replace": "num_dense_layers",
    "routed_scaling_factor": "route_scale",
}


def read_config(tree: Mapping[str, Any], source: str | Path) -> Glm4MoeConfig:
    """Raises CheckpointError naming the file, the field, its value and what it must be."""
    refuse_others(tree, FIXED, source)
    refuse_sliding(tree, source, "GLM-4-MoE")
    if num := tree.get("num_nextn_predict_layers"):
        log.info(
            "%s: %d layer(s) for multi-token prediction are left out; the next token does not need them", source, num
        )
    ropes = tree.get("rope_parameters")
    factor = ropes.get("partial_rotary_factor") if isinstance(ropes, dict) else None
    return fields_of(Glm4MoeConfig, {"partial_rotary_factor": factor, **_set(tree)}, source, "GLM-4-MoE", NAMES)


def _set(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if value is not None}


def write_config(config: Glm4MoeConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in NAMES.items()}
    own = config.model_dump(mode="json", exclude={"dtype", "rope_theta", "batch_invariant"})
    named = {theirs.get(key, key): value for key, value in own.items()}
    rope = {"rope_theta": config.rope_theta, "partial_rotary_factor": config.partial_rotary_factor}
    return {**named, **FIXED, **usual(config, "Glm4MoeForCausalLM", rope), "num_nextn_predict_layers": 0}
