"""Numbers of shards, and of replicas of each expert: a pure decision for each window, from frozen state to frozen state.

Legend: L layers, E experts of a layer. A share is an expert's rows over those of the mean shard of its layer.
Decisions:
  - Growing looks at the newest window; giving back looks at the peak of all windows of the last `settle_s`.
  - Thresholds are apart (low < target < high, cold < even < hot): a change lands in between, so that it takes another load,
    not noise, to undo it.
  - All that changes, changes at once, and then nothing for `cooldown_s`; the planner may still move experts meanwhile.
The clock is the caller's and must not go backwards.
"""

from dataclasses import dataclass, replace
from math import ceil, inf

import numpy as np

from trinity.errors import ConfigError
from trinity.placement.planner import hottest_first


@dataclass(frozen=True, eq=False)
class Window:
    """Counts of `seconds`: rows of each expert [L, E]."""

    rows_LE: np.ndarray
    seconds: float

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ConfigError(f"a window of load lasts {self.seconds} s; use more than 0")
        if self.rows_LE.ndim != 2 or not (np.isfinite(self.rows_LE) & (self.rows_LE >= 0)).all():
            raise ConfigError(
                f"a window of load has shape {self.rows_LE.shape}; use [layers, experts] of counts from 0"
            )

    @property
    def rows_per_s(self) -> float:
        return float(self.rows_LE.sum()) / self.seconds

    def share_LE(self, num_shards: int) -> np.ndarray:
        """0 for layers without rows."""
        mean_L1 = self.rows_LE.sum(1, keepdims=True) / num_shards
        share_LE: np.ndarray = np.divide(self.rows_LE, mean_L1, out=np.zeros(self.rows_LE.shape), where=mean_L1 > 0)
        return share_LE


@dataclass(frozen=True)
class ScaleLimits:
    """Floor, ceiling, budget and thresholds. `rows_per_s` is what one shard computes at full speed, all layers together.

    high, target, low: utilisation of shards above which some are added, that a change aims at, below which some go.
    hot, even, cold: the same for the share of one replica.
    max_spare: replicas of a layer beyond one of each expert. slots: experts of a layer that one shard has room for.
    """

    rows_per_s: float
    min_shards: int = 1
    max_shards: int = 8
    shards_per_host: int = 1
    min_replicas: int = 1
    max_spare: int = 32
    slots: int | None = None
    high: float = 0.8
    target: float = 0.6
    low: float = 0.4
    hot: float = 0.6
    even: float = 0.4
    cold: float = 0.2
    cooldown_s: float = 60.0
    settle_s: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_shards <= self.max_shards:
            raise ConfigError(f"{self.min_shards} to {self.max_shards} shards; use 1 <= min_shards <= max_shards")
        for names in (("low", "target", "high"), ("cold", "even", "hot")):
            low, middle, high = (getattr(self, name) for name in names)
            if not 0 < low < middle < high:
                raise ConfigError(f"{', '.join(names)} are {low}, {middle}, {high}; each must be above the one before")
        for name, least in (("rows_per_s", 1e-9), ("cooldown_s", 0), ("settle_s", 0), ("max_spare", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} {getattr(self, name)} is below {least}; use {least} or more")
        for name in ("shards_per_host", "min_replicas", "slots"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} {value} is below 1; use 1 or more")

    def hosts(self, num_shards: int) -> int:
        """Hosts that so many shards need."""
        return ceil(num_shards / self.shards_per_host)

    def fewest(self, num_experts: int) -> int:
        """Shards that one replica of each expert needs. Raises ConfigError where that is more than the ceiling."""
        fewest = max(self.min_shards, ceil(num_experts / self.slots) if self.slots else 1)
        if fewest > self.max_shards:
            raise ConfigError(
                f"{num_experts} experts of a layer need {fewest} shards of {self.slots} slots; "
                f"max_shards is {self.max_shards}: raise it, or slots"
            )
        return fewest

    def spare(self, num_experts: int, num_shards: int) -> int:
        """Replicas beyond the first that so many shards may hold."""
        return min(self.max_spare, self.slots * num_shards - num_experts if self.slots else self.max_spare)


@dataclass(frozen=True, eq=False)
class Scale:
    """State of the decisions: what there should be, since when, and the windows (each with its end in seconds) that the next
    one looks back at."""

    num_shards: int
    replicas_LE: np.ndarray
    changed_s: float = -inf
    recent: tuple[tuple[float, Window], ...] = ()


def decide(window: Window, scale: Scale, limits: ScaleLimits, now_s: float) -> Scale:
    """The scale from now on; `changed_s` is `now_s` where it differs from the one before. Raises ConfigError."""
    if window.rows_LE.shape != scale.replicas_LE.shape:
        raise ConfigError(
            f"load is {window.rows_LE.shape}, replicas {scale.replicas_LE.shape}; give those of one model"
        )
    recent = (*((at_s, old) for at_s, old in scale.recent if now_s - at_s < limits.settle_s), (now_s, window))
    seen = replace(scale, recent=recent)
    if now_s - scale.changed_s < limits.cooldown_s:
        return seen
    num_shards = _num_shards(seen, limits)
    replicas_LE = _replicas_LE(seen, limits, num_shards)
    if num_shards == scale.num_shards and (replicas_LE == scale.replicas_LE).all():
        return seen
    return replace(seen, num_shards=num_shards, replicas_LE=replicas_LE, changed_s=now_s)


def _num_shards(scale: Scale, limits: ScaleLimits) -> int:
    now, peak = scale.recent[-1][1].rows_per_s, max(window.rows_per_s for _, window in scale.recent)
    have, wanted = scale.num_shards * limits.rows_per_s, scale.num_shards
    if now > limits.high * have:
        wanted = ceil(now / (limits.target * limits.rows_per_s))
    elif peak < limits.low * have:
        wanted = min(wanted, ceil(peak / (limits.target * limits.rows_per_s)))
    return min(max(wanted, limits.fewest(scale.replicas_LE.shape[1])), limits.max_shards)


def _replicas_LE(scale: Scale, limits: ScaleLimits, num_shards: int) -> np.ndarray:
    """Replicas as the share of each asks for, within the budget; the hottest first, but those that have, before."""
    held_LE, num_experts = scale.replicas_LE, scale.replicas_LE.shape[1]
    now_LE = scale.recent[-1][1].share_LE(num_shards)
    peak_LE = np.maximum.reduce([window.share_LE(num_shards) for _, window in scale.recent])
    wanted_LE = np.where(now_LE > limits.hot * held_LE, np.ceil(now_LE / limits.even), held_LE)
    wanted_LE = np.where(peak_LE < limits.cold * (held_LE - 1), np.ceil(peak_LE / limits.even), wanted_LE)
    least, ones_LE = min(limits.min_replicas, num_shards), np.ones_like(held_LE)
    budget_L = np.full(len(held_LE), num_experts + limits.spare(num_experts, num_shards))
    safe_LE = hottest_first(now_LE, ones_LE, ones_LE * least, budget_L, held_LE)
    return hottest_first(now_LE, safe_LE, np.clip(wanted_LE, least, num_shards), budget_L, held_LE)
