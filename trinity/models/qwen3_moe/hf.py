"""`config.json` of a Hugging Face Qwen3-MoE checkpoint <-> Qwen3MoeConfig. Refuses what the forward pass would get wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trinity.models.common.hf import fields_of, refuse_others, refuse_sliding, usual
from trinity.models.qwen3_moe.config import Qwen3MoeConfig

FIXED = {"hidden_act": "silu", "use_sliding_window": False, "tie_word_embeddings": False}
NAMES = {"num_local_experts": "num_experts"}  # transformers 5 writes the first, the published files have the second


def read_config(tree: Mapping[str, Any], source: str | Path) -> Qwen3MoeConfig:
    """Raises CheckpointError naming the file, the field, its value and what it must be."""
    refuse_others(tree, FIXED, source)
    refuse_sliding(tree, source, "Qwen3-MoE")
    return fields_of(Qwen3MoeConfig, tree, source, "Qwen3-MoE", NAMES)


def write_config(config: Qwen3MoeConfig) -> dict[str, Any]:
    own = config.model_dump(mode="json", exclude={"dtype", "rope_theta", "batch_invariant"})
    rope = {"rope_theta": config.rope_theta}
    return {**own, **FIXED, **usual(config, "Qwen3MoeForCausalLM", rope), "sliding_window": None}
