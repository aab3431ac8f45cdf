"""The training loop of one worker: micro-batches through backbone and shards, then one step that all take or nobody does.

Legend: L layers with experts, E experts.
Decisions: a plain class without Ray; `Comm` is how workers agree. The loss of the whole step is a sum over all workers and
micro-batches, so gradients are summed, never averaged: on shards they are complete because every worker sends its rows
there, in the backbone by DDP. `version` counts committed steps and names the weights; `position` counts batches consumed
(a step skipped for a bad gradient consumes its batch), so that data order is a function of it alone. A step is tried until
it is decided: whatever fails makes the attempt void everywhere (RetryStep), and the same batch is computed again.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trinity.adapters.lora import choose_trained
from trinity.checkpoint import latest_checkpoint
from trinity.config import Config, Sequences
from trinity.data.prepare import Prepared
from trinity.errors import TrinityError
from trinity.models.common.losses import max_vio
from trinity.models.registry import build
from trinity.observability.train_log import RunLog, StepMetrics
from trinity.optim.optimizer import sq_norm
from trinity.optim.schedule import learning_rates
from trinity.pool.ledger import StepTicket
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Stage
from trinity.state.versioned_store import Store
from trinity.train.backbone import Backbone
from trinity.train.checkpointer import AsyncCheckpointer
from trinity.train.collectives import Comm, barrier, on_rank0, said_by_rank0, sum_gradients
from trinity.train.exam import Exam, Gate, NoExam
from trinity.train.flops import Utilization
from trinity.train.loss import Objective
from trinity.train.microbatches import BatchOf, MicroBatches, Totals, plain
from trinity.train.phases import PhaseClock, phase
from trinity.train.recovery import Recovery, RunCounts, RunIdentity
from trinity.train.retry import RETRYABLE, RetryStep, WorkerFailed
from trinity.train.validation import Recent, UsualLoss, validate
from trinity.utils.deadline import Deadline

log = logging.getLogger(__name__)
T = TypeVar("T")
MAX_SKIPPED_IN_A_ROW, MOST_SPIKES_IN_A_ROW = 20, 3
PAUSE_S = 0.2  # before a step is tried again


class Trainer:
    """One worker of a training job. Worker 0 also speaks for the job to the shards and writes its part of checkpoints.

    `store`: where the backbone's versions lie; one in a folder outlives this process (worker 0's). `job` is the same for all
    workers that one command starts.
    """

    def __init__(
        self,
        config: Config,
        pool: ExpertPool,
        data: Prepared,
        comm: Comm,
        device: str = "cpu",
        store: Store | None = None,
        job: str = "",
    ):
        self.config, self.pool, self.data, self.comm = config, pool, data, comm
        self.device = torch.device(device)
        self.dispatcher = pool.dispatcher()
        self.model = build(config.model, self.dispatcher, device=self.device, dtype=torch.float32)
        choose_trained(self.model, config.optim, config.train.seed)
        self.backbone = Backbone(self.model, config.optim, store)
        self.identity = RunIdentity.of(config, data, job)
        self.recovery = Recovery(config, pool, comm, self.backbone, self.identity)
        self.saver = AsyncCheckpointer(config, pool, self.backbone, data.tokenizer)
        self.objective = self.new_objective()
        if comm.world > 1 and self.backbone.trained:
            self.objective = DistributedDataParallel(self.objective, broadcast_buffers=False)
            self.objective.register_comm_hook(None, sum_gradients)
        self.micro_batches = MicroBatches(config, comm, self.objective, self.device)
        self.clock, self.usual_loss = PhaseClock(), UsualLoss(config.train.loss_spike_threshold)
        self.recent, self.is_usual = Recent(), True
        self.examine_with(NoExam())
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        self.utilization = Utilization(config, comm.world, name)
        self.logs: list[RunLog] = []  # told of every step, retry and validation, on worker 0
        self.should_stop: Callable[[], bool] = lambda: False  # asked by worker 0 in every step
        self.stopped = False
        self.position = self.num_skipped = self.num_replays = self._skipped_in_a_row = 0
        self._retries: Counter[str] = Counter()  # of the step under way, by reason
        self._source_tokens: Mapping[str, int] = {}  # of the step under way

    @property
    def version(self) -> int:
        return self.backbone.version

    @property
    def sequences(self) -> Sequences:
        """Those of the next step."""
        return self.config.train.sequences_of(self.position)

    def new_objective(self) -> nn.Module:
        """The loss of what its micro-batches are."""
        return Objective(self.model, self.config)

    def examine_with(self, exam: Exam) -> None:
        """Have that exam decide, with `run`, what is served; before the first step."""
        self.exam, self.gate = exam, Gate(exam)

    # -- the loop

    def start(self) -> None:
        """Get the weights that this run goes on from, here and on the shards; before the first step."""
        reached = self.recovery.start()
        self.position, self.num_skipped = reached.position, reached.num_skipped
        self._skipped_in_a_row = reached.usual.get("skipped_in_a_row", 0)
        self.usual_loss.mean = reached.usual.get("loss")
        for loss, norm in reached.usual.get("recent", ()):
            self.recent.add(loss, norm)

    @property
    def counts(self) -> RunCounts:
        """Counts of the run so far, with all that decides whether its next step is a usual one."""
        usual = {
            "skipped_in_a_row": self._skipped_in_a_row,
            "loss": self.usual_loss.mean,
            "recent": self.recent.steps,
        }
        return RunCounts(self.position, self.num_skipped, usual)

    def run(self) -> dict[str, Any]:
        """Train to `steps`, evaluating and saving on the way; -> the last losses, position, version and checkpoint."""
        settings, loss, val_loss = self.config.train, math.nan, math.nan
        if self.position and self.saver.is_due(self.position) and self._lacks_checkpoint():  # a worker died in between
            self.begin_save()
        if self.exam.is_due(self.position) or (self.position and self.exam.has_gates):  # a gate may have been closed
            self.examine()
        while self.position < settings.steps and not self.stopped:
            loss = self.step().loss
            last = self.position == settings.steps
            if last or (settings.eval_every and self.position % settings.eval_every == 0):
                val_loss = self.evaluate()
            if self.exam.is_due(self.position):
                self.examine()
            if last or self.stopped or self.saver.is_due(self.position):
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

    def step(self, batch_of: BatchOf | None = None) -> StepMetrics:
        """One optimizer step, on what comes next in the data or on the micro-batches given. It is tried until it succeeds;
        worker 0 raises the reason when it has not for placement.recover_timeout_s."""
        deadline, metrics = Deadline(self.config.placement.recover_timeout_s), None
        self._retries.clear()
        self._source_tokens = {} if batch_of else self.data.train.source_tokens(self.sequences)
        while metrics is None:
            is_last = deadline.expired
            try:
                metrics = self._attempt(batch_of or self._next_batch)
            except RetryStep as retry:
                self._wait_or_give_up(retry, is_last)
        metrics = replace(metrics, checkpoint_s=self.saver.pop_seconds())
        for each in self.logs:
            each.step(metrics)
        return metrics

    def _attempt(self, batch_of: BatchOf) -> StepMetrics:
        """Raises RetryStep where it came to nothing, anywhere."""
        self.clock = PhaseClock()
        ticket = self._begin_attempt()
        totals = self._forward_backward(ticket, batch_of)
        norm = self._prepare(totals, ticket)
        lrs = learning_rates(self.position + 1, self.config.optim, self.config.train.steps)
        if not (math.isfinite(norm) and math.isfinite(totals.ce)):
            self._skip(ticket, f"the gradient norm is {norm}")
        elif not totals.num_trained:  # what is left are the balance loss's gradients, which Muon would make full size
            self._skip(ticket, "nothing of it is trained", is_fault=False)
        elif spike := self._spike(totals.ce, norm):
            self._skip(ticket, spike)
        elif not self._stage(norm, lrs, totals, ticket):
            self._skip(ticket, "the new weights are not finite")
        else:
            self._commit(ticket, totals, norm, lrs)
        return self._metrics(totals, norm, lrs)

    def _wait_or_give_up(self, retry: RetryStep, is_last: bool) -> None:
        """Wait a little; at the last try raise the error on worker 0, which alone knows it and ends the job."""
        if is_last and retry.__cause__ is not None:
            raise retry.__cause__
        self._retries[retry.reason] += 1
        self.num_replays += 1
        if self.comm.rank == 0:
            log.warning("step %d is tried again (%s): %s", self.version + 1, retry.reason, retry.why)
        for each in self.logs:
            each.retry(retry.reason)
        time.sleep(PAUSE_S)

    # -- the phases of an attempt

    @phase("begin")
    def _begin_attempt(self) -> StepTicket:
        """Experts may move now; afterwards all workers send to the same places."""
        found = on_rank0(self.comm, lambda: self.pool.begin_attempt(self.version, self.backbone.num_updates))
        epoch, attempt, keep = found
        self.pool.follow(epoch)
        return StepTicket(epoch, attempt, tuple(keep))

    def _next_batch(self, micro: int) -> Any:
        return self.micro_batches.batch(self.data.train, self.position, micro)

    @phase("forward_backward")
    def _forward_backward(self, ticket: StepTicket, batch_of: BatchOf) -> Totals:
        """Sums over all workers; afterwards no row of this attempt is under way."""
        self.dispatcher.use(self.version, ticket.attempt, self.comm.rank)
        micros = self.micro_batches.run(batch_of, self.sequences.num)
        failure = self.dispatcher.failure
        if failure is not None:
            log.warning("step %d: rows of worker %d failed: %s", self.version + 1, self.comm.rank, failure)
        sent = Counter({shard: self.dispatcher.num_sent_ops[shard] for shard in self.pool.table.shards})
        return self.micro_batches.total(micros, sent, failure is not None)

    @phase("prepare")
    def _prepare(self, totals: Totals, ticket: StepTicket) -> float:
        """The global gradient norm, once every shard has exactly the gradients that the workers sent it. Worker 0's word on
        stopping travels with it, so that all stop after the same step."""

        def ask() -> tuple[float, bool]:
            if totals.num_failed:
                raise self.dispatcher.failure or WorkerFailed(f"{totals.num_failed} workers could not reach a shard")
            reports = self.pool.prepare(self.version + 1, totals.num_sent_ops, ticket.attempt)
            squares = sq_norm(self._grads().values()) + sum(report.sq_norm for report in reports)
            return squares, self.should_stop()

        squares, self.stopped = on_rank0(self.comm, ask)
        return math.sqrt(squares) if math.isfinite(squares) else math.inf

    def _grads(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.backbone.trained.items() if p.grad is not None}

    @phase("stage")
    def _stage(self, norm: float, lrs: Mapping[str, float], totals: Totals, ticket: StepTicket) -> bool:
        """Make the next version, on the shards and here side by side; -> whether it is finite everywhere."""
        scale = min(1.0, self.config.optim.grad_clip / (norm + 1e-12))
        idle = totals.idle(self.config.model.moe_layers)
        message = Stage(self.version + 1, lrs, scale, ticket.attempt, self.kept(ticket), totals.num_sent_ops, idle)
        wait = self.pool.stage(message) if self.comm.rank == 0 else lambda: True
        mine = self.backbone.stage(self._grads(), message, totals.counts_LE)
        try:
            return on_rank0(self.comm, lambda: wait() and mine)
        except RetryStep:
            self.backbone.discard_staged()
            raise

    def kept(self, ticket: StepTicket) -> tuple[int, ...]:
        """Older versions that shards, and this worker of its backbone, keep beside the next one."""
        return (*ticket.keep, *self.saver.versions) if self.comm.rank == 0 else ()

    @phase("commit")
    def _commit(self, ticket: StepTicket, totals: Totals, norm: float, lrs: Mapping[str, float]) -> None:
        """Decided is committed: a shard that does not hear of it now does so from the next call, or when it starts again."""
        self.is_usual = self.usual_loss.is_good(self.version + 1, totals.ce)
        is_good = self.is_usual and self.gate.is_open(self.position + 1)
        self.recent.add(totals.ce, norm)
        self.position += 1
        self._skipped_in_a_row = 0
        if self.comm.rank == 0:
            notes = self.identity.notes(self.counts, self.backbone.num_updates + 1)
            found = {"attempt": ticket.attempt, "is_good": is_good, "metrics": self._metrics(totals, norm, lrs).row()}
            self.pool.decide(self.version + 1, ticket.attempt, {**notes, **found})
        barrier(self.comm)
        self.backbone.commit()
        if self.comm.rank == 0:
            self._tell(lambda: self.pool.commit(self.version))

    def _tell(self, what: Callable[[], int]) -> None:
        """A courtesy to the shards, who hear it from the next call, too."""
        try:
            what()
        except RETRYABLE as error:
            log.warning("not every shard knows yet how step %d ended: %s", self.version, error)

    def _spike(self, loss: float, norm: float) -> str:
        """Words for a step that sticks out and is to be skipped; a level that stays is no spike."""
        most_sigma = self.config.optim.skip_above_sigma if self._skipped_in_a_row < MOST_SPIKES_IN_A_ROW else None
        return self.recent.spike(loss, norm, most_sigma)

    def _skip(self, ticket: StepTicket, why: str, is_fault: bool = True) -> None:
        log.warning("step skipped: %s; its batch is consumed, the weights stay at %d", why, self.version)
        self.position += 1
        self.num_skipped += 1
        self._skipped_in_a_row += is_fault
        self.backbone.discard_staged()
        if self.comm.rank == 0:
            self._tell(lambda: self.pool.abort(self.version + 1, ticket.attempt))
        barrier(self.comm)
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise TrinityError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped, up to step {self.position}: {why}; "
                "lower the learning rates or go back to an earlier checkpoint"
            )

    def _metrics(self, totals: Totals, norm: float, lrs: Mapping[str, float]) -> StepMetrics:
        """The attempt, so far as it has come."""
        return StepMetrics(
            step=self.position,
            loss=totals.ce,
            z_loss=totals.z,
            balance_loss=totals.balance,
            grad_norm=norm,
            tokens=totals.num_tokens,
            seconds=self.clock.seconds,
            max_vio=float(max_vio(totals.counts_LE).max()) if totals.counts_LE.numel() else 0.0,
            lrs=lrs,
            skipped=self.num_skipped,
            retries=dict(self._retries),
            phases_s=dict(self.clock.phases_s),
            counts_LE=totals.counts_LE.tolist(),
            batch_het=totals.batch_het,
            norm_kurtosis=self.recent.kurtosis,
            measures=totals.measures,
            source_tokens=self._source_tokens,
            global_batch_size=totals.num_sequences if self.config.train.ramp_words else None,
            **self.utilization.of(totals.num_tokens / max(self.clock.seconds, 1e-9)),
        )

    # -- validation and checkpoints

    def evaluate(self) -> float:
        """The loss of the same held-out sequences for any number of workers, of text in nats per token; nan without any."""
        self.dispatcher.use(self.version)
        found = validate(plain(self.objective), self.config, self.data.val, self.comm)
        for each in self.logs:
            each.validation(self.position, found.loss, found.by_source, found.measures)
        return found.loss

    def examine(self) -> None:
        """Ask the present weights the run's tasks; from now on they are served if they pass every gate."""
        rows = self._until_done(self.exam.ask)
        for each in self.logs:
            each.scores(self.position, rows)
        if not self.gate.heed(rows):
            log.error("version %d is not served: below its gate in %s", self.version, ", ".join(self.gate.failed))
        elif self.exam.has_gates and self.is_usual:
            self._until_done(lambda: self.pool.approve(self.version))

    def _until_done(self, what: Callable[[], T]) -> T:
        """Worker 0 does it, again and again for as long as a step would be tried; -> what all learn of it."""
        deadline = Deadline(self.config.placement.recover_timeout_s)
        while True:
            is_last = deadline.expired
            try:
                return on_rank0(self.comm, what)
            except RetryStep as retry:
                self._wait_or_give_up(retry, is_last)

    def save(self) -> Path:
        """Write checkpoint `step-<position>` and wait for it; -> its folder."""
        target = self.begin_save()
        self.saver.wait()
        barrier(self.comm)
        return target

    def begin_save(self) -> Path:
        """Write it while training goes on: shards and backbone side by side; -> the folder that it will be."""
        if self.comm.rank == 0:
            return self.saver.begin(self.position, self._state())
        return self.saver.target(self.position)

    def _lacks_checkpoint(self) -> bool:
        """Say whether the present position has none, written or on its way. Worker 0's word counts."""
        return not said_by_rank0(self.comm, self.saver.has(self.position))

    def _state(self) -> dict[str, Any]:
        config = self.config.model_dump(mode="json", exclude={"serve"})  # it holds keys
        counts = {**asdict(self.counts), "num_updates": self.backbone.num_updates}
        return {**counts, "order": dict(self.identity.order), "config": config}
