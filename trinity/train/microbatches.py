"""Forward and backward of one worker's share of a step: micro-batches, some of them side by side.

Legend: B sequences of a micro-batch, S sequence length, L layers with experts, E experts.
Decisions: gradients are summed over micro-batches and workers, never averaged; DDP reduces once, with the last backward. All
micro-batches of a step are there before the first is computed: the loss of each token is its share of all that are trained.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trinity.config import Config
from trinity.data.dataset import Dataset
from trinity.rpc.messages import Experts
from trinity.train.collectives import Comm
from trinity.train.loss import Losses, Objective, Whole
from trinity.train.retry import patiently

BatchOf = Callable[[int], Any]  # the number of a micro-batch of this worker -> what the objective takes


class Totals(NamedTuple):
    """Sums of a step over all workers' micro-batches."""

    ce: float
    z: float
    balance: float
    num_failed: int  # workers whose exchanges with a shard failed: the attempt is void
    counts_LE: Tensor
    num_sent_ops: Counter[str]
    means: Tensor  # cross-entropy of each micro-batch, over its own trained tokens
    num_tokens: int  # that were read, trained or not
    measures: Mapping[str, float]  # means, of those that anything came to
    num_trained: int  # targets that count
    num_sequences: int

    @property
    def batch_het(self) -> float:
        """Heterogeneity of the batch: the highest mean loss of a micro-batch over the mean of all (arXiv 2602.17004)."""
        return float(self.means.max() - self.means.mean()) if self.means.numel() else 0.0

    def idle(self, layers: Sequence[int]) -> Experts:
        """The experts of each of these layers, those of counts_LE, that no row came to."""
        found = zip(layers, self.counts_LE == 0, strict=True)
        return {layer: tuple(idle_E.nonzero()[:, 0].tolist()) for layer, idle_E in found}


def plain(objective: nn.Module) -> Objective:
    """The objective that DDP may hold."""
    inner: Any = objective.module if isinstance(objective, DistributedDataParallel) else objective
    found: Objective = inner
    return found


def means_of(names: Sequence[str], sums_M2: Tensor) -> dict[str, float]:
    """Means by name, of those whose number is not 0; `sums_M2` is empty where a step had none."""
    rows = zip(names, sums_M2.tolist(), strict=False)
    return {name: total / number for name, (total, number) in rows if number}


class MicroBatches:
    """Runs `objective`, which gives a Losses for each batch that it is given at once."""

    def __init__(self, config: Config, comm: Comm, objective: nn.Module, device: torch.device):
        self.config, self.comm, self.objective, self.device = config, comm, objective, device
        self.measures = plain(objective).measures
        self.num_read = 0  # tokens of this worker's share of the last step
        self.num_trained = 0  # of all workers' shares
        self.num_sequences = 0  # of the step

    def batch(self, data: Dataset, position: int, micro: int) -> Any:
        """This worker's micro-batch of that number, of the step that consumes the batch at `position`."""
        settings, comm = self.config.train, self.comm
        return data.batch(settings.sequences_of(position), comm.rank, comm.world, micro, settings.micro_batch_size)

    def run(self, batch_of: BatchOf, num_sequences: int) -> list[Losses]:
        """Forward and backward of all of a step of so many sequences over all workers; gradients of the backbone are in its
        parameters, fresh."""
        self.num_sequences = num_sequences
        num = len(range(self.comm.rank, self._num_micros, self.comm.world))
        side = self.config.train.num_overlapped_microbatches
        self.objective.zero_grad(set_to_none=True)
        batches = [patiently(partial(batch_of, micro)) for micro in range(num)]
        self.num_trained = self._num_trained(batches)
        whole = Whole(max(1, self.num_trained), num_sequences)  # where no token counts the losses are 0
        self.num_read = sum(batch.ids_BS.numel() for batch in batches)
        parts = [batches[first : first + side] for first in range(0, num, side)]
        return [losses for part in parts for losses in self._side_by_side(part, whole, is_last=part is parts[-1])]

    @property
    def _num_micros(self) -> int:
        """Number of micro-batches of the step, of all workers."""
        return self.num_sequences // self.config.train.micro_batch_size

    def _num_trained(self, batches: Sequence[Any]) -> int:
        """Number of targets that count, of all workers' micro-batches."""
        mine = torch.tensor([sum(batch.num_trained for batch in batches)], dtype=torch.float64)
        return int(self.comm.all_reduce(mine))

    def _side_by_side(self, part: Sequence[Any], whole: Whole, is_last: bool) -> list[Losses]:
        batches = [self.on_device(batch) for batch in part]
        with nullcontext() if is_last else self._no_sync():
            found = self.objective(batches, *whole)
            torch.stack([losses.total for losses in found]).sum().backward()
        return [Losses(*(value.detach() for value in losses)) for losses in found]

    def on_device(self, batch: Any) -> Any:
        """The same NamedTuple of tensors, where the model is."""
        return type(batch)(*(tensor.to(self.device) for tensor in batch))

    def _no_sync(self) -> AbstractContextManager[None]:
        return self.objective.no_sync() if isinstance(self.objective, DistributedDataParallel) else nullcontext()

    def total(self, micros: Sequence[Losses], num_sent_ops: Counter[str], has_failed: bool) -> Totals:
        """Add up over micro-batches and workers. It is also the barrier after which no row of this step is under way."""
        sums = [torch.stack([getattr(m, name) for m in micros]).sum() for name in ("ce", "z", "balance")]
        sums.append(torch.tensor(float(has_failed), device=sums[0].device))
        counts_LE = torch.stack([m.counts_LE for m in micros]).sum(0)
        num_sent, means = list(num_sent_ops.values()), self._placed([m.mean for m in micros])
        parts = [
            torch.stack(sums),
            counts_LE.flatten(),
            torch.tensor(num_sent),
            means,
            torch.tensor([self.num_read]),
            torch.stack([m.measures for m in micros]).sum(0).flatten(),
        ]
        flat = self.comm.all_reduce(torch.cat([part.double().cpu() for part in parts]))
        scalars, counts, ops, means, num_read, told = flat.split([part.numel() for part in parts])
        ce, z, balance, num_failed = scalars.tolist()
        return Totals(
            *(ce, z, balance, int(num_failed)),
            counts_LE=counts.long().view_as(counts_LE),
            num_sent_ops=Counter(dict(zip(num_sent_ops, map(int, ops.tolist()), strict=True))),
            means=means,
            num_tokens=int(num_read),
            measures=means_of(self.measures, told.view(-1, 2)),
            num_trained=self.num_trained,
            num_sequences=self.num_sequences,
        )

    def _placed(self, means: Sequence[Tensor]) -> Tensor:
        """Those of this worker's micro-batches at their places among all of the step's, and 0 elsewhere."""
        placed = torch.zeros(self._num_micros, dtype=torch.float64)
        placed[self.comm.rank :: self.comm.world] = torch.stack(list(means)).double().cpu()
        return placed
