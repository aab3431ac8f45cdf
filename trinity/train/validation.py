"""The loss on held-out data, and which losses and gradients are usual.

Legend: B sequences of a batch, S sequence length.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from trinity.config import Config
from trinity.data.dataset import Dataset, Source
from trinity.train.collectives import Comm
from trinity.train.loss import Objective
from trinity.train.microbatches import means_of
from trinity.train.retry import patiently

log = logging.getLogger(__name__)
USUAL_STEPS = 50  # over which the usual loss is averaged
NUM_RECENT, FEWEST_RECENT = 128, 16


class Validation(NamedTuple):
    """Loss on held-out data, nan without any; of a mixture the mean by share, and each; what else the objective tells of."""

    loss: float
    by_source: Mapping[str, float]
    measures: Mapping[str, float]


@torch.no_grad()
def validate(objective: Objective, config: Config, held_out: Dataset, comm: Comm) -> Validation:
    """The training loss over the same sequences in the same micro-batches for any number of workers: train.eval_sequences,
    shared out as in training, but of each source one."""
    sources = held_out.by_source
    found = [_of_source(objective, config, source, comm) for source in sources]
    known = [(each.share, one.loss) for each, one in zip(sources, found, strict=True) if not math.isnan(one.loss)]
    total = sum(share for share, _ in known)
    whole = sum(share * loss for share, loss in known) / total if total else math.nan
    if len(sources) == 1 and not sources[0].name:
        return found[0]
    return Validation(whole, {each.name: one.loss for each, one in zip(sources, found, strict=True)}, {})


def _of_source(objective: Objective, config: Config, source: Source, comm: Comm) -> Validation:
    settings, device = config.train, next(objective.parameters()).device
    wanted = max(min(1, settings.eval_sequences), round(source.share * settings.eval_sequences))
    num = min(wanted, source.dataset.num_sequences)
    parts = np.split(np.arange(num), range(settings.micro_batch_size, num, settings.micro_batch_size))
    batches = [patiently(partial(source.dataset.take, part)) for part in parts[comm.rank :: comm.world] if num]
    trained = torch.tensor([sum(batch.num_trained for batch in batches)], dtype=torch.float64)
    if not (num_tokens := int(comm.all_reduce(trained))):
        return Validation(math.nan, {}, {})
    sums_M2 = torch.zeros(1 + len(objective.measures), 2, dtype=torch.float64)
    for batch in batches:
        [found] = objective([type(batch)(*(tensor.to(device) for tensor in batch))], num_tokens, num)
        sums_M2[0, 0] += found.ce.double().cpu()
        sums_M2[1 : 1 + len(found.measures)] += found.measures.double().cpu()
    sums_M2 = comm.all_reduce(sums_M2)
    return Validation(float(sums_M2[0, 0]), {}, means_of(objective.measures, sums_M2[1:]))


class UsualLoss:
    """A running mean of the steps' losses (None before the first), and whether one is so far above it that its weights have run
    away."""

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

    @property
    def steps(self) -> list[tuple[float, float]]:
        """Loss and norm of each, the newest last: to be added again where a run goes on."""
        return list(zip(self._losses, self._norms, strict=True))

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
