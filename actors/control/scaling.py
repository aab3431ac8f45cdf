"""Shards and replicas that follow the load: when to decide, and what about; the rules are trinity/placement/autoscaler.py's.

Legend: L layers, E experts of a layer.
"""

import time
from dataclasses import replace

import numpy as np

from trinity.config import PlacementConfig
from trinity.placement.autoscaler import Scale, ScaleLimits, Window, decide

BOUNDS = ("rows_per_s", "min_shards", "max_shards", "max_spare", "cooldown_s", "settle_s")  # also settings


class LoadScaling:
    """One decision for each window."""

    def __init__(self, settings: PlacementConfig, num_shards: int, replicas_LE: np.ndarray):
        self._limits, self._min_replicas = settings.autoscale, 1 + settings.redundancy
        self._scale, self._decided_s = Scale(num_shards, replicas_LE), time.monotonic()

    @property
    def replicas_LE(self) -> np.ndarray:
        return self._scale.replicas_LE

    def decide(self, load_LE: np.ndarray, num_shards: int, now_s: float) -> int | None:
        """-> how many shards there should be from now on; None: no change. `num_shards`: how many are asked for. Raises
        ConfigError."""
        limits = self._limits
        if not limits.enabled or now_s - self._decided_s < limits.every_s:
            return None
        self._decided_s = now_s
        window = Window(load_LE * limits.every_s, limits.every_s)
        bounds = ScaleLimits(min_replicas=self._min_replicas, **{name: getattr(limits, name) for name in BOUNDS})
        self._scale = decide(window, replace(self._scale, num_shards=num_shards), bounds, now_s)
        return self._scale.num_shards if self._scale.changed_s == now_s else None
