"""The model families. Everybody outside trinity/models/ comes in here, and knows the contract only (common/family.py).

A family's numbers (`config.py`) are known at once and need no torch; the rest of it is imported when a model is asked for.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinity.config.model import ModelConfig
from trinity.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from trinity.models.common.decoder import CausalLM
    from trinity.models.common.experts import ExpertLayer
    from trinity.models.common.family import Family

FAMILIES = ("afmoe", "glm4_moe", "qwen3_moe")  # folders beside this file, named as `model_type` is

for _name in FAMILIES:
    importlib.import_module(f"trinity.models.{_name}.config")


def family_of(config: ModelConfig) -> "Family":
    return importlib.import_module(f"trinity.models.{config.model_type}.family").FAMILY


def build(
    config: ModelConfig,
    experts: "ExpertLayer",
    *,
    device: "torch.device | str | None" = None,
    dtype: "torch.dtype | None" = None,
) -> "CausalLM":
    """The family's backbone over these experts; dtype None means the config's. Weights are not initialised."""
    return family_of(config).build(config, experts, device=device, dtype=dtype)


def weight_bytes(config: ModelConfig, weight_dtype: str = "auto") -> tuple[int, int]:
    """Bytes in memory of the backbone, its matrices as `engine.weight_dtype` has them, and of all routed experts."""
    from trinity.models.common.family import Nobody

    backbone = build(config, Nobody(), device="meta")
    backbone.round_to(weight_dtype)
    scales = sum(part.num_scale_bytes for part in backbone.rounded().values())
    experts = len(config.moe_layers) * config.num_experts * config.expert_params
    return sum(weight.nbytes for weight in backbone.parameters()) + scales, experts * config.itemsize


def read_config(tree: Mapping[str, Any], source: str | Path) -> ModelConfig:
    """A checkpoint's `config.json`. Raises CheckpointError naming the file, the field, its value and what it must be."""
    name = tree.get("model_type")
    if name not in FAMILIES:
        raise CheckpointError(
            f"{source} holds a {name!r} model; Trinity runs {', '.join(map(repr, FAMILIES))} checkpoints"
        )
    return family_of(ModelConfig.families[name].model_construct()).read_config(tree, source)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The inverse: what transformers >= 5, and the servers that read older fields, expect."""
    return family_of(config).write_config(config)
