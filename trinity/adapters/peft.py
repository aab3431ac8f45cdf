"""PEFT's file format of adapters: names of tensors, and `adapter_config.json`. https://huggingface.co/docs/peft

Legend: N outputs and K inputs of a matrix, r rank.
`base_model.model.{module}.lora_A.weight` is [r, K], `…lora_B.weight` [N, r]; `module` is the matrix's name in a checkpoint
without `.weight`, and each routed expert has modules of its own. Decisions: what would make another forward pass is refused by
name; what PEFT has no field for stands under `trinity`, which PEFT passes over.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = ("lora_A", "lora_B")
KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight")
PLAIN: dict[str, tuple[Any, ...]] = {  # field -> values of the adapters that we compute
    "peft_type": ("LORA",),
    "bias": ("none", None),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), (False, None)),
    **{
        name: (None, {}, [])
        for name in ("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "target_parameters")
    },
}


@dataclass(frozen=True)
class AdapterConfig:
    """`base`: by what a process finds the base's checkpoint; `content`: a fingerprint of its weights, where it is known."""

    base: str
    rank: int
    alpha: float
    content: str | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def key_of(weight_key: str, part: str) -> str:
    """The key of an adapter's part, of the matrix with that key in a checkpoint."""
    return f"{PREFIX}{weight_key.removesuffix('.weight')}.{part}.weight"


def module_of(key: str, source: str | Path) -> tuple[str, str]:
    """-> the module that a key's tensor belongs to, and which part of its adapter it is. Raises CheckpointError."""
    if (found := KEY.fullmatch(key)) is None:
        raise CheckpointError(
            f"{source}: {key!r} is no part of an adapter; there are {PREFIX}MODULE.lora_A.weight and lora_B"
        )
    return found[1], found[2]


def tree_of(config: AdapterConfig, modules: Collection[str]) -> dict[str, Any]:
    """Content of adapter_config.json for an adapter of these modules."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "trinity": {"base_content": config.content},
    }


def config_of(tree: Mapping[str, Any], source: str | Path) -> AdapterConfig:
    """The inverse, of anybody's. Raises CheckpointError naming the file, the field and its value."""
    for name, wanted in PLAIN.items():
        if (value := tree.get(name)) not in wanted:
            raise CheckpointError(
                f"{source}: {name} {value!r} is not implemented; Trinity computes {name} {wanted[0]!r}"
            )
    rank, alpha, base = (tree.get(name) for name in ("r", "lora_alpha", "base_model_name_or_path"))
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not alpha > 0:
        raise CheckpointError(f"{source}: r {rank!r} and lora_alpha {alpha!r} are no rank and no share of an adapter")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{source}: base_model_name_or_path {base!r} names no model; write the base's folder there"
        )
    own = tree.get("trinity")
    content = own.get("base_content") if isinstance(own, Mapping) else None
    return AdapterConfig(base, rank, float(alpha), content if isinstance(content, str) else None)
