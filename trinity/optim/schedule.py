"""Learning-rate schedules: the share of the peak rate at each step (arXiv 2602.17004)."""

import math

from trinity.config import OptimConfig
from trinity.optim.optimizer import peak_lrs


def learning_rates(step: int, config: OptimConfig, total_steps: int) -> dict[str, float]:
    """Parameter group -> learning rate of the update that makes version `step` (1-based)."""
    factor = lr_factor(step, config, total_steps)
    return {group: peak * factor for group, peak in peak_lrs(config).items()}


def lr_factor(step: int, config: OptimConfig, total_steps: int) -> float:
    """Share of the peak learning rate for the update that makes version `step` (1-based): warmup, flat, decay."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    start = config.warmup_steps if config.decay_start is None else max(config.decay_start, config.warmup_steps)
    if config.decay == "none" or step <= start:
        return 1.0
    done = min(1.0, (step - start) / max(1, total_steps - start))
    left = 1.0 - done if config.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.final_lr_ratio + (1.0 - config.final_lr_ratio) * left
