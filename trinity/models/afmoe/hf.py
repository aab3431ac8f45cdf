"""`config.json` of a Hugging Face AFMoE checkpoint <-> ModelConfig. Refuses what the forward pass would get wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trinity.config import ModelConfig
from trinity.errors import CheckpointError

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


def from_hf(tree: Mapping[str, Any], source: str | Path) -> ModelConfig:
    """Raises CheckpointError naming the file, the field, its value and what it must be."""
    if tree.get("model_type") != "afmoe":
        raise CheckpointError(f"{source} holds a {tree.get('model_type')!r} model; Trinity runs 'afmoe' checkpoints")
    for key, wanted in FIXED.items():
        if tree.get(key, wanted) not in (wanted, None):
            raise CheckpointError(f"{source}/config.json: {key} is {tree[key]!r}; only {wanted!r} is implemented")
    fields = {key: tree[key] for key in ModelConfig.model_fields if tree.get(key) is not None and key != "dtype"}
    fields.update(_rope(tree, source), dtype=_dtype(tree))
    fields.setdefault("num_key_value_heads", tree.get("num_attention_heads"))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = tree.get(key)
        fields[key] = value[0] if isinstance(value, list) and value else value
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "config"
        raise CheckpointError(f"{source}/config.json: {where}: {first['msg']}") from None


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """What transformers >= 5, and the servers that read the older fields, expect."""
    own = config.model_dump(mode="json", exclude={"dtype", "rope_theta"})
    return {
        "architectures": ["AfmoeForCausalLM"],
        "model_type": "afmoe",
        **own,
        **FIXED,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": config.dtype,
    }


def _rope(tree: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    rope = tree.get("rope_parameters") or tree.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{source}/config.json: rope_parameters is {rope!r}, not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{source}/config.json: rope type {kind!r} is not implemented; AFMoE uses plain RoPE")
    return {"rope_theta": rope.get("rope_theta") or tree.get("rope_theta") or 10000.0}


def _dtype(tree: Mapping[str, Any]) -> str:
    named = str(tree.get("dtype") or tree.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return named if named in ("float32", "bfloat16") else "float32"
