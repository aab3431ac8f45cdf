"""Specification of a shard: what it is made from."""

from __future__ import annotations  # so that those who only make shards elsewhere need no torch

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trinity.config import ModelConfig, OptimConfig, turn_of
from trinity.rpc.messages import Experts

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ShardSpec:
    """`experts` are what it is to hold when nothing outlived another shard of its name. `optim` None: it serves and does
    not train."""

    name: str
    model: ModelConfig
    experts: Experts
    optim: OptimConfig | None = None
    backend: str = "auto"
    device: str = "cpu"
    activation_cache_bytes: int = 1 << 30
    ordered_gradients: bool = True
    expert_dtype: str | None = None  # of inference; None: as the weights are
    pool_dtypes: tuple[str, ...] = ()  # of all shards, where they are of several on purpose

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights; optimizer state and gradients are fp32 whatever it is."""
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.model.dtype]

    def dtype_at(self, shard: str) -> str:
        """The form in which another shard of the pool has experts."""
        return turn_of(shard, self.pool_dtypes) or self.expert_dtype or self.model.dtype
