"""The loss on held-out text, and which losses and gradients are usual.

Legend: B sequences of a batch, S sequence length.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from trinity.config import Config
from trinity.data.dataset import Dataset, Source
from trinity.models.common.decoder import CausalLM
from trinity.train.collectives import Comm
from trinity.train.loss import Objective, num_trained

log = logging.getLogger(__name__)
USUAL_STEPS = 50  # over which the usual loss is averaged
NUM_RECENT, FEWEST_RECENT = 128, 16


class Validation(NamedTuple):
    """Mean cross-entropy in nats on held-out text, nan without any; of a mixture the mean by share, and each."""

    loss: float
    by_source: Mapping[str, float]


@torch.no_grad()
def validation(model: CausalLM, config: Config, held_out: Dataset, comm: Comm) -> Validation:
    """The losses over the same sequences for any number of workers: train.eval_sequences, shared out as in training, but of
    each source one."""
    sums = [_sums(model, config, source, comm) for source in held_out.by_source]
    found = comm.all_reduce(torch.stack(sums)).tolist()
    losses = [ce / num_tokens if num_tokens else math.nan for ce, num_tokens in found]
    known = [(each.share, loss) for each, loss in zip(held_out.by_source, losses, strict=True) if not math.isnan(loss)]
    total = sum(share for share, _ in known)
    whole = sum(share * loss for share, loss in known) / total if total else math.nan
    names = [source.name for source in held_out.by_source]
    return Validation(whole, dict(zip(names, losses, strict=True)) if names != [""] else {})


def _sums(model: CausalLM, config: Config, source: Source, comm: Comm) -> torch.Tensor:
    """(losses, tokens), float64: of this worker's share of a source's sequences."""
    settings, objective = config.train, Objective(model, config)
    device, sums = next(model.parameters()).device, torch.zeros(2, dtype=torch.float64)
    wanted = max(min(1, settings.eval_sequences), round(source.share * settings.eval_sequences))
    mine = np.arange(comm.rank, min(wanted, source.dataset.num_sequences), comm.world)
    for start in range(0, len(mine), settings.micro_batch_size):
        batch = source.dataset.take(mine[start : start + settings.micro_batch_size])
        losses = objective([type(batch)(*(tensor.to(device) for tensor in batch))], num_tokens=1)
        sums += torch.tensor([float(losses[0].ce), num_trained(batch)], dtype=torch.float64)
    return sums


class UsualLoss:
    """A running mean of the steps' losses, and whether one is so far above it that its weights have run away."""

    def __init__(self, spike_threshold: float):
        self.spike_threshold = spike_threshold
        self.mean: float | None = None

    def is_good(self, version: int, loss: float) -> bool:
        """Say whether the version that a step with this loss makes may be served."""
        usual = loss if self.mean is None else self.mean
        self.mean = usual + (loss - usual) / USUAL_STEPS
        if loss <= usual + self.spike_threshold:
            return True
        log.error("version %d is not served: its loss was %.3f, usual is %.3f", version, loss, usual)
        return False


class Recent:
    """Losses and gradient norms of the last steps: how heavy the tail of the norms is, and what sticks out."""

    def __init__(self, num: int = NUM_RECENT):
        self._losses, self._norms = deque[float](maxlen=num), deque[float](maxlen=num)

    def add(self, loss: float, norm: float) -> None:
        self._losses.append(loss)
        self._norms.append(norm)

    def spike(self, loss: float, norm: float, most_sigma: float | None) -> str:
        """Words for a step whose loss or norm is so many standard deviations above the mean; empty for a usual one, and while
        there are few."""
        if most_sigma is None or len(self._norms) < FEWEST_RECENT:
            return ""
        for what, value, before in (("loss", loss, self._losses), ("gradient norm", norm, self._norms)):
            mean, deviation = float(np.mean(before)), float(np.std(before))
            if value > mean + most_sigma * deviation:
                return f"the {what} is {value:.4g}, usual is {mean:.4g} +- {deviation:.2g}"
        return ""

    @property
    def kurtosis(self) -> float | None:
        """Fourth moment about the mean over the squared variance: 3 where norms are normal. None of few."""
        if len(self._norms) < FEWEST_RECENT:
            return None
        centred = np.array(self._norms) - np.mean(self._norms)
        variance = float((centred**2).mean())
        return float((centred**4).mean()) / variance**2 if variance else None
