"""The contract of a model family: what everybody outside trinity/models/ may ask of one.

Adding a family is a folder with a `family.py` that holds a Family, and its name in registry.py. CONTRIBUTING.md shows how.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from trinity.config import ModelConfig
from trinity.models.common.decoder import CausalLM
from trinity.models.common.experts import ExpertLayer
from trinity.models.common.keys import KeyMap

MATRICES = ("attention", "dense", "shared")  # roles whose two-dimensional weights are hidden matrices
Group = Literal["matrices", "rest"]


class Build(Protocol):
    """Makes the backbone. dtype None means the config's."""

    def __call__(
        self,
        config: Any,
        experts: ExpertLayer,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> CausalLM: ...


@dataclass(frozen=True)
class Counts:
    """Parameters: all, those that a token uses, those that it is multiplied with, and all by what they are for (`experts` are
    the routed ones).

    Embedding and head are in the first two sums, matrices but the embedding in the third; selection biases are buffers and not
    counted.
    """

    total: int
    active: int
    multiplied: int
    by_role: Mapping[str, int]


@dataclass(frozen=True)
class Family:
    """All that is particular to one architecture.

    `read_config(tree, source)` is the family's part of reading a Hugging Face `config.json`: it raises CheckpointError for what
    the forward pass would get wrong. `write_config` is the inverse, as transformers reads it.
    """

    build: Build
    init_weights: Callable[[CausalLM, int], None]
    read_config: Callable[[Mapping[str, Any], str | Path], ModelConfig]
    write_config: Callable[[Any], dict[str, Any]]
    keys: KeyMap

    def group(self, key: str, tensor: Tensor) -> Group:
        """The parameter group of a tensor by its checkpoint key: hidden matrices, which Muon may have, or the rest."""
        is_matrix = tensor.ndim == 2 and tensor.numel() > 0 and self.keys.role(key) in MATRICES
        return "matrices" if is_matrix else "rest"

    def count_params(self, config: ModelConfig) -> Counts:
        """Counted on a backbone without memory (the meta device), routed experts by their shape."""
        backbone = self.build(config, Nobody(), device="meta")
        by_role, multiplied = Counter[str](), 0
        for key, weight in backbone.weights().items():
            role = self.keys.role(key)
            by_role[role] += weight.numel()
            multiplied += weight.numel() if weight.ndim == 2 and role != "embedding" else 0
        layers, one = len(config.moe_layers), config.expert_params
        here, routed = by_role.total(), layers * config.num_experts_per_tok * one
        by_role["experts"] = layers * config.num_experts * one
        return Counts(by_role.total(), here + routed, multiplied + routed, dict(by_role))


class Nobody:
    """An ExpertLayer of a model whose names and shapes alone are used."""

    priority = 0

    def begin(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Any:
        raise AssertionError("this model has no experts: only its names and shapes are used")
