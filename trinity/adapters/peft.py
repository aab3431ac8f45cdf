"""PEFT's file format of adapters: names of tensors, and `adapter_config.json`. https://huggingface.co/docs/peft

Legend: N outputs and K inputs of a matrix, r rank.
`base_model.model.{module}.lora_A.weight` is [r, K], `…lora_B.weight` [N, r]; `module` is the matrix's name in a checkpoint
without `.weight`, and each routed expert has modules of its own. Decisions: what would make another forward pass is refused by
name; what PEFT has no field for stands under `trinity`, which PEFT passes over. Where transformers stacks a layer's experts
(from 5 on), PEFT takes the names of an expert's three matrices to mean routed experts, and those alone: other matrices of
these names are said to be targets by their parameter.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity.errors import CheckpointError
from trinity.models.common.keys import PROJECTIONS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = ("lora_A", "lora_B")
EXPERT = re.compile(r"\.experts\.\d+\.")
KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight")
PLAIN: dict[str, tuple[Any, ...]] = {  # field -> values of the adapters that we compute
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others begin by changing the base
    **dict.fromkeys(
        ("use_rslora", "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias"), (False, None)
    ),
    **dict.fromkeys(("arrow_config", "kasa_config", "monteclora_config"), (None, {})),
    **dict.fromkeys(("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication"), (None, {}, [])),
    **dict.fromkeys(("alora_invocation_tokens", "trainable_token_indices"), (None, [], {})),
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
        "target_modules": sorted({module.rpartition(".")[2] for module in modules if not _is_by_parameter(module)}),
        "target_parameters": sorted(
            {f"{'.'.join(module.split('.')[-2:])}.weight" for module in modules if _is_by_parameter(module)}
        ),
        "trinity": {"base_content": config.content},
    }


def _is_by_parameter(module: str) -> bool:
    """Say whether it has the name of an expert's matrix, and is none."""
    return module.endswith(PROJECTIONS) and not EXPERT.search(module)


def config_of(tree: Mapping[str, Any], source: str | Path) -> AdapterConfig:
    """The inverse, of anybody's. Raises CheckpointError naming the file, the field and its value."""
    parameters = tree.get("target_parameters") or []
    if others := [name for name in parameters if not str(name).endswith(".weight")]:
        raise CheckpointError(
            f"{source}: target_parameters {others} are stacks of experts; Trinity reads adapters of each expert's matrices"
        )
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
