"""The training loop of one worker: micro-batches through backbone and shards, then one step that all take or nobody does.

Legend: B sequences of a micro-batch, S sequence length, L layers with experts, E experts.
Decisions: a plain class without Ray; `Comm` is how workers agree. The loss of the whole step is a sum over all workers and
micro-batches, so gradients are summed, never averaged: on shards they are complete because every worker sends its rows
there, in the backbone by DDP. `version` counts committed steps and names the weights; `position` counts batches consumed
(a step skipped for a bad gradient consumes its batch), so that data order is a function of it alone. A step is tried until
it is decided: whatever fails makes the attempt void everywhere, and the same batch is computed again.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trinity.checkpoint import latest_checkpoint
from trinity.config import Config
from trinity.data.dataset import Batch
from trinity.data.prepare import Prepared
from trinity.errors import (
    TrinityError,
    Unavailable,
)
from trinity.models.common.decoder import CausalLM
from trinity.models.common.losses import max_vio
from trinity.models.registry import build
from trinity.observability.train_log import StepMetrics, TrainLog
from trinity.optim.optimizer import sq_norm
from trinity.optim.schedule import lr_factor
from trinity.pool.pool import ExpertPool, StepTicket
from trinity.rpc.messages import Stage
from trinity.state.versioned_store import Store
from trinity.train.backbone import Backbone
from trinity.train.checkpointer import AsyncCheckpointer
from trinity.train.collectives import Comm, sum_gradients
from trinity.train.loss import Losses, Objective
from trinity.train.recovery import HEALABLE, Recovery

log = logging.getLogger(__name__)
MAX_SKIPPED_IN_A_ROW = 20
USUAL_STEPS = 50  # over which the usual loss is averaged
PAUSE_S = 0.2  # before a step is tried again


class Totals(NamedTuple):
    """What a step added up to over all workers."""

    ce: float
    z: float
    balance: float
    num_failed: int  # workers whose exchanges with a shard failed: the attempt is void
    counts_LE: Tensor
    num_sent_ops: Counter[str]


class Trainer(Recovery):
    """One worker of a training job. Worker 0 also speaks for the job to the shards and writes its part of checkpoints.

    `store`: where the backbone's versions lie; one in a folder outlives this process (worker 0's).
    """

    def __init__(
        self,
        config: Config,
        pool: ExpertPool,
        data: Prepared,
        comm: Comm,
        device: str = "cpu",
        store: Store | None = None,
        objective: Callable[[CausalLM, Config], nn.Module] = Objective,
    ):
        self.config, self.pool, self.data, self.comm = config, pool, data, comm
        self.log: TrainLog | None = None
        self.device = torch.device(device)
        self.dispatcher = pool.dispatcher()
        self.model = build(config.model, self.dispatcher, device=self.device, dtype=torch.float32)
        self.backbone = Backbone(self.model, config.optim, store)
        self.saver = AsyncCheckpointer(config, pool, self.backbone, data.tokenizer)
        self.objective: nn.Module = objective(self.model, config)
        if comm.world > 1:
            self.objective = DistributedDataParallel(self.objective, broadcast_buffers=False)
            self.objective.register_comm_hook(None, sum_gradients)
        self.should_stop: Callable[[], bool] = lambda: False  # asked by worker 0 in every step
        self.stopped = False
        self._usual_loss: float | None = None
        self.position = self.num_skipped = self.num_replays = self._skipped_in_a_row = 0

    # -- the loop

    def run(self) -> dict[str, Any]:
        """Train to `steps`, evaluating and saving on the way; -> the last losses, position, version and checkpoint."""
        settings, loss, val_loss = self.config.train, math.nan, math.nan
        if self.position and self._saves_now() and self._lacks_checkpoint():  # the worker before died in between
            self.begin_save()
        while self.position < settings.steps and not self.stopped:
            loss = self.step().loss
            last = self.position == settings.steps
            if last or (settings.eval_every and self.position % settings.eval_every == 0):
                val_loss = self.evaluate()
            if last or self.stopped or self._saves_now():
                self.begin_save()
        if self.position == settings.steps and math.isnan(loss):  # the worker before died after its last step
            val_loss = self.evaluate()
            if self._lacks_checkpoint():
                self.begin_save()
        self.saver.wait()
        reached = {
            "position": self.position,
            "version": self.version,
            "stopped": self.stopped,
            "checkpoint": str(latest_checkpoint(settings.out_dir)),
        }
        return {"loss": loss, "val_loss": val_loss, "num_replays": self.num_replays, **reached}

    def step(self) -> StepMetrics:
        """One optimizer step: forward and backward of all micro-batches, prepare, then commit or abort, everywhere. It is tried
        until it succeeds; raises the reason when it has not for placement.recover_timeout_s."""
        until_s = time.monotonic() + self.config.placement.recover_timeout_s
        while (metrics := self._attempt(last=time.monotonic() > until_s)) is None:
            self.num_replays += 1
            time.sleep(PAUSE_S)
        return metrics

    def _attempt(self, last: bool) -> StepMetrics | None:
        """None: it came to nothing, anywhere. `last`: then raise what worker 0 knows of the reason."""
        started = time.perf_counter()
        ticket = self._boundary(last)
        if ticket is None:
            return None
        totals = self._sum(self._losses(ticket.attempt))
        norm = self._prepare(totals, ticket, last)
        if norm is None:
            return None
        lrs = self._learning_rates(self.position + 1)
        measured = partial(self._metrics, totals, norm, lrs, started)
        if not (math.isfinite(norm) and math.isfinite(totals.ce)):
            self._skip(ticket, f"the gradient norm is {norm}")
        elif (is_finite := self._stage(norm, lrs, totals.counts_LE, ticket, last)) is None:
            return None
        elif not is_finite:
            self._skip(ticket, "the new weights are not finite")
        else:
            self._commit(ticket, self._is_good(totals.ce), measured)
        metrics = measured()
        if self.log is not None:
            self.log.step(metrics)
        return metrics

    def _as_first(self, what: Callable[[], Sequence[float]], num: int, last: bool) -> list[float] | None:
        """Worker 0 does it and all learn the `num` numbers that come out; None where it failed and may succeed later."""
        said = torch.zeros(1 + num, dtype=torch.float64)
        if self.comm.rank == 0:
            try:
                said[1:] = torch.tensor(what(), dtype=torch.float64)
                said[0] = 1
            except HEALABLE as error:
                if last:
                    raise
                log.warning("step %d is tried again: %s", self.version + 1, error)
        there, *found = self.comm.from_first(said).tolist()
        return found if there else None

    def _boundary(self, last: bool) -> StepTicket | None:
        """Experts may move now; afterwards all workers send to the same places."""
        found: list[StepTicket] = []

        def ask() -> list[float]:
            found.append(self.pool.begin_attempt(self.version, self.backbone.num_updates))
            return [found[0].epoch, found[0].attempt]

        said = self._as_first(ask, 2, last)
        if said is None:
            return None
        self.pool.follow(int(said[0]))
        return found[0] if found else StepTicket(int(said[0]), int(said[1]))

    def _losses(self, attempt: int) -> list[Losses]:
        """Forward and backward of all micro-batches of this worker, some side by side."""
        num_of_all = self.config.train.global_batch_size // self.config.train.micro_batch_size
        num = len(range(self.comm.rank, num_of_all, self.comm.world))
        side = self.config.train.num_overlapped_microbatches
        self.dispatcher.use(self.version, attempt, self.comm.rank)
        self.objective.zero_grad(set_to_none=True)
        parts = [(first, min(num, first + side)) for first in range(0, num, side)]
        return [losses for first, end in parts for losses in self._micros(first, end, is_last=end == num)]

    def _micros(self, first: int, end: int, is_last: bool) -> list[Losses]:
        batches = [self._batch(micro) for micro in range(first, end)]
        with nullcontext() if is_last else self._no_sync():
            found = self.objective(batches)
            torch.stack([losses.total for losses in found]).sum().backward()
        return [Losses(*(value.detach() for value in losses)) for losses in found]

    def _batch(self, micro: int) -> Batch:
        settings, comm = self.config.train, self.comm
        place = (comm.rank, comm.world, micro, settings.micro_batch_size)
        return self._on_device(self.data.train.batch(self.position, settings.global_batch_size, *place))

    def _on_device(self, batch: Batch) -> Batch:
        return type(batch)(*(tensor.to(self.device) for tensor in batch))

    def _no_sync(self) -> AbstractContextManager:
        return self.objective.no_sync() if isinstance(self.objective, DistributedDataParallel) else nullcontext()

    def _sum(self, micros: list[Losses]) -> Totals:
        """Add up over micro-batches and workers. It is also the barrier after which no row of this step is under way."""
        if self.dispatcher.failure is not None:
            log.warning("step %d is tried again: %s", self.version + 1, self.dispatcher.failure)
        scalars = [torch.stack([getattr(m, name) for m in micros]).sum() for name in ("ce", "z", "balance")]
        scalars.append(torch.tensor(float(self.dispatcher.failure is not None), device=scalars[0].device))
        counts_LE = torch.stack([m.counts_LE for m in micros]).sum(0)
        issued = [self.dispatcher.num_sent_ops[shard] for shard in self.pool.table.shards]
        parts = [torch.stack(scalars), counts_LE.flatten(), torch.tensor(issued)]
        flat = self.comm.all_reduce(torch.cat([part.double().cpu() for part in parts]))
        ce, z, balance, num_failed = flat[:4].tolist()
        counts, ops = flat[4:].split([counts_LE.numel(), len(issued)])
        named = Counter(dict(zip(self.pool.table.shards, map(int, ops.tolist()), strict=True)))
        return Totals(ce, z, balance, int(num_failed), counts.long().view_as(counts_LE), named)

    def _prepare(self, totals: Totals, ticket: StepTicket, last: bool) -> float | None:
        """The global gradient norm, once every shard has exactly the gradients that the workers sent it. Worker 0's word on
        stopping travels with it, so that all stop after the same step."""

        def ask() -> list[float]:
            if totals.num_failed:
                raise self.dispatcher.failure or Unavailable(f"{totals.num_failed} workers could not reach a shard")
            reports = self.pool.prepare(self.version + 1, totals.num_sent_ops, ticket.attempt)
            squares = sq_norm(self._grads().values()) + sum(report.sq_norm for report in reports)
            return [squares, self.should_stop()]

        said = self._as_first(ask, 2, last)
        if said is None:
            return None
        self.stopped = bool(said[1])
        return math.sqrt(said[0]) if math.isfinite(said[0]) else math.inf

    def _grads(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.weights().items() if p.grad is not None}

    def _stage(
        self, norm: float, lrs: tuple[float, float], counts_LE: Tensor, ticket: StepTicket, last: bool
    ) -> bool | None:
        """Make the next version, on the shards and here side by side; -> whether it is finite everywhere."""
        scale = min(1.0, self.config.optim.grad_clip / (norm + 1e-12))
        keep = (*ticket.keep, *self.saver.versions)
        message = Stage(self.version + 1, *lrs, scale, ticket.attempt, keep)
        wait = self.pool.stage(message) if self.comm.rank == 0 else lambda: True
        mine = self.backbone.stage(self._grads(), message, counts_LE)
        said = self._as_first(lambda: [wait() and mine], 1, last)
        if said is None:
            self.backbone.discard_staged()
            return None
        return bool(said[0])

    def _is_good(self, loss: float) -> bool:
        """Whether the next version may be served: not after a loss far above the recent ones, its weights run away."""
        usual = loss if self._usual_loss is None else self._usual_loss
        self._usual_loss = usual + (loss - usual) / USUAL_STEPS
        if loss <= usual + self.config.train.loss_spike_threshold:
            return True
        log.error("version %d is not served: its loss was %.3f, usual is %.3f", self.version + 1, loss, usual)
        return False

    def _commit(self, ticket: StepTicket, is_good: bool, measured: Callable[[], StepMetrics]) -> None:
        """Decided is committed: a shard that does not hear of it now does so from the next call, or when it starts again."""
        self.position += 1
        if self.comm.rank == 0:
            row = asdict(replace(measured(), counts_LE=None))
            notes = {**self._notes(is_step=True), "attempt": ticket.attempt, "is_good": is_good, "metrics": row}
            self.pool.decide(self.version + 1, ticket.attempt, notes)
        self.comm.all_reduce(torch.zeros(1))
        self.backbone.commit()
        self._skipped_in_a_row = 0
        if self.comm.rank == 0:
            self._tell(lambda: self.pool.commit(self.version))

    def _tell(self, what: Callable[[], int]) -> None:
        """A courtesy to the shards, who hear it from the next call, too."""
        try:
            what()
        except HEALABLE as error:
            log.warning("not every shard knows yet how step %d ended: %s", self.version, error)

    def _skip(self, ticket: StepTicket, why: str) -> None:
        log.warning("step skipped: %s; its batch is consumed, the weights stay at %d", why, self.version)
        self.position += 1
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        self.backbone.discard_staged()
        if self.comm.rank == 0:
            self._tell(lambda: self.pool.abort(self.version + 1, ticket.attempt))
        self.comm.all_reduce(torch.zeros(1))
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise TrinityError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a gradient that is not finite, up to step {self.position}; "
                "lower the learning rates or go back to an earlier checkpoint"
            )

    def _learning_rates(self, step: int) -> tuple[float, float]:
        factor = lr_factor(step, self.config.optim, self.config.train.steps)
        return self.config.optim.muon_lr * factor, self.config.optim.adamw_lr * factor

    def _metrics(self, totals: Totals, norm: float, lrs: tuple[float, float], started: float) -> StepMetrics:
        return StepMetrics(
            step=self.position,
            loss=totals.ce,
            z_loss=totals.z,
            balance_loss=totals.balance,
            grad_norm=norm,
            muon_lr=lrs[0],
            adamw_lr=lrs[1],
            tokens=self.config.train.global_batch_size * self.config.train.seq_len,
            seconds=time.perf_counter() - started,
            max_vio=float(max_vio(totals.counts_LE).max()) if totals.counts_LE.numel() else 0.0,
            skipped=self.num_skipped,
            counts_LE=totals.counts_LE.tolist(),
        )

    # -- validation and checkpoints

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross-entropy in nats over the same validation sequences for any number of workers; nan without any."""
        settings, objective = self.config.train, Objective(self.model, self.config)
        num = min(settings.eval_sequences, self.data.val.num_sequences)
        self.dispatcher.use(self.version)
        ce = torch.zeros(1, dtype=torch.float64)
        mine = np.arange(self.comm.rank, num, self.comm.world)
        for start in range(0, len(mine), settings.micro_batch_size):
            batch = self.data.val.take(mine[start : start + settings.micro_batch_size])
            ce += objective([self._on_device(batch)])[0].ce.double().cpu()
        loss = float(self.comm.all_reduce(ce)) * settings.global_batch_size / num if num else math.nan
        if self.log is not None:
            self.log.validation(self.position, loss)
        return loss

    def save(self) -> Path:
        """Write checkpoint `step-<position>` and wait for it; -> its folder."""
        target = self.begin_save()
        self.saver.wait()
        self.comm.all_reduce(torch.zeros(1))
        return target

    def begin_save(self) -> Path:
        """Write it while training goes on: shards and backbone side by side; -> the folder that it will be."""
        if self.comm.rank == 0:
            return self.saver.begin(self.position, self._state())
        return self.saver.target(self.position)

    def _saves_now(self) -> bool:
        every = self.config.train.save_every
        return every > 0 and self.position % every == 0

    def _lacks_checkpoint(self) -> bool:
        """Whether the present position has none, written or on its way. Worker 0's word counts."""
        is_there = self.saver.target(self.position).is_dir() or bool(self.saver.versions)
        return not self.comm.from_first(torch.tensor(is_there)).item()

    def _state(self) -> dict[str, Any]:
        config = self.config.model_dump(mode="json", exclude={"serve": {"api_key", "admin_key"}})
        counts = {
            "position": self.position,
            "num_skipped": self.num_skipped,
            "num_updates": self.backbone.num_updates,
        }
        return {**counts, "order": self._order(), "config": config}
