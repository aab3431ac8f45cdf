"""The settings of a pool of shards."""

import re
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator

from trinity.config.yaml import Frozen, at_home
from trinity.utils.niceness import IDLE

FP4_GROUP = 16  # numbers of a matrix in nvfp4 that share a scale
Thing = TypeVar("Thing")
ExpertDtype = Literal["float32", "bfloat16", "int8", "fp8", "nvfp4"]


def turn_of(shard: str, things: Sequence[Thing]) -> Thing | None:
    """Return what a shard gets of several things: the one whose turn its number is."""
    number = re.search(r"\d*$", shard)
    return things[int(number[0] or 0) % len(things)] if number and things else None


def why_not(dtype: str, sides: Sequence[int], device: str, lora_rank: int) -> str | None:
    """Return why experts with matrices of these sides cannot be computed in a form that is not the model's own; None: they
    can."""
    if device not in ("auto", "cpu"):
        return f"placement.expert_dtype {dtype} is computed on CPUs, not on {device}; leave it out there"
    if lora_rank:
        return f"placement.expert_dtype {dtype} knows no adapters: leave it out, or set optim.lora.rank to 0"
    if any(side % FP4_GROUP for side in sides) and dtype == "nvfp4":
        return f"placement.expert_dtype {dtype} needs multiples of {FP4_GROUP}; the model's experts are {tuple(sides)}"
    return None


class AutoscaleConfig(Frozen):
    """Shards and replicas that come and go with the load (trinity/placement/autoscaler.py has the rules)."""

    enabled: bool = False
    min_shards: int = Field(default=1, ge=1)
    max_shards: int = Field(default=8, ge=1)
    max_spare: int = Field(default=32, ge=0, description="replicas of a layer beyond one of each expert")
    rows_per_s: float = Field(
        default=20_000.0, gt=0, description="what one shard computes at full speed, all layers together: measure yours"
    )
    every_s: float = Field(default=10.0, gt=0, description="a window of load, and one decision")
    cooldown_s: float = Field(default=60.0, ge=0)
    settle_s: float = Field(default=300.0, ge=0, description="so long the load must stay low before shards go")


class PlacementConfig(Frozen):
    """The pool of expert shards and how rows reach it."""

    pool: str = Field(default="default", pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")
    num_shards: int = Field(default=2, ge=1)
    transport: Literal["direct", "ray"] = Field(default="direct", description="how rows travel: sockets, or Ray calls")
    data_host: str = Field(
        default="127.0.0.1", description="where shards listen for rows; `node`: the node's own address"
    )
    data_tls: bool = Field(default=False, description="seal rows between hosts, so that nobody reads or changes them")
    backend: Literal["auto", "reference", "torch", "megablocks"] = "auto"
    expert_dtype: tuple[ExpertDtype, ...] = Field(
        default=(),
        max_length=16,
        description="what inference computes routed experts with, made of their weights at each commit; default: the model's. "
        "Several: shard-0 has the first, shard-1 the second, and so on around, and answers say that any may have computed them",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_cpus_per_shard: float = Field(default=0, ge=0)
    num_gpus_per_shard: float = Field(default=0, ge=0)
    num_threads_per_shard: int = Field(default=1, ge=1)
    niceness: int | None = Field(
        default=None,
        ge=0,
        le=IDLE,
        description="how far workers, and their calls on shards, give way to whoever else wants a core: 0 not at all, 20 they "
        "take idle cores only; default: 20 with `train --serve`, else 10",
    )
    resources: dict[str, float] = Field(
        default={}, description="custom resources of each shard, such as expert_shard: 1"
    )
    redundancy: int = Field(default=0, ge=0, description="shards that may be lost at once without an expert: replicas")
    experts_per_layer: int | None = Field(
        default=None, ge=1, description="room of one shard in each layer; default: a quarter more than its even share"
    )
    lost_after_s: float = Field(
        default=120.0, gt=0, description="a shard that is away for so long is given up, and another one made"
    )
    attempt_timeout_s: float = Field(
        default=5.0, gt=0, description="at most, for a shard to compute rows that another one could compute, too"
    )
    near_rows: int = Field(
        default=0,
        ge=0,
        description="calls of up to so many rows go to replicas on the caller's node, else in its rack; 0: all are spread, "
        "which gives a token the same bits in any company and on any node",
    )
    watch_every_s: float = Field(default=1.0, gt=0, description="how often the placement service looks at its shards")
    window_s: float = Field(default=30.0, gt=0, description="the load of an expert is its rate over about so long")
    balance_every_s: float = Field(
        default=30.0, ge=0, description="how often it looks for better places; 0: when asked"
    )
    balance_goal: float = Field(
        default=0.9, gt=0, le=1, description="mean / max rows of shards, worth moving experts for"
    )
    autoscale: AutoscaleConfig = AutoscaleConfig()
    drain_s: float = Field(default=0.5, ge=0, description="from a new epoch to the end of the replicas it leaves out")
    activation_cache_bytes: int = Field(
        default=2 << 30, ge=0, description="forward activations a shard keeps for backward"
    )
    ordered_gradients: bool = Field(
        default=True,
        description="sum the gradients of several workers in the workers' order: the same bits whoever is faster, for one "
        "fp32 gradient of the shard's experts for each worker",
    )
    durable: bool = Field(
        default=True, description="committed weights and optimizer state of a training pool outlive their process"
    )
    memory_dir: str | None = Field(
        default=None, description="where they do; default: shared memory, which is as fast as a process's own"
    )
    call_timeout_s: float = Field(default=120.0, gt=0, description="for rows and steps")
    recover_timeout_s: float = Field(
        default=600.0, gt=0, description="for a training step to succeed, whatever dies meanwhile"
    )
    checkpoint_timeout_s: float = Field(default=3600.0, gt=0, description="for a shard to load or save its part")
    keep: bool = Field(default=False, description="leave the pool alive when the command that made it ends")
    ready_timeout_s: float = Field(default=180.0, gt=0)
    state_dir: str | None = Field(
        default=None, description="where epochs are persisted; a server's own pool otherwise keeps them with its node"
    )

    _at_home = field_validator("memory_dir", "state_dir")(at_home)

    @field_validator("expert_dtype", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return () if value is None else (value,) if isinstance(value, str) else value

    def expert_dtype_of(self, shard: str) -> str | None:
        """The form in which that shard computes experts; None: the model's own."""
        return turn_of(shard, self.expert_dtype)
