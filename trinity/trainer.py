"""The training loop of one worker: micro-batches through backbone and shards, then one step that all take or nobody does.

Legend: B sequences of a micro-batch, S sequence length, L layers with experts, E experts.
Decisions: a plain class without Ray; `Comm` is how workers agree. The loss of the whole step is a sum over all workers and
micro-batches, so gradients are summed, never averaged: on shards they are complete because every worker sends its rows
there, in the backbone by DDP. `version` counts committed steps and names the weights; `position` counts batches consumed
(a step skipped for a bad gradient consumes its batch), so that data order is a function of it alone.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trinity.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    latest_checkpoint,
    open_checkpoint,
    prune,
    step_path,
    write_tensors,
)
from trinity.comm import Comm, sum_gradients
from trinity.config import Config
from trinity.data import Batch, Prepared
from trinity.errors import ConfigError, TrinityError
from trinity.messages import Commit, Load
from trinity.metrics import StepMetrics, TrainLog
from trinity.model.afmoe import Afmoe
from trinity.model.balance import sign_update, smebu
from trinity.model.init import init_weights
from trinity.model.losses import max_vio
from trinity.model.params import is_hidden_matrix
from trinity.objective import Losses, Objective
from trinity.optim import Matrix, Optimizer, lr_factor, sq_norm
from trinity.pool import ExpertPool

log = logging.getLogger(__name__)
MAX_SKIPPED_IN_A_ROW = 20


class Totals(NamedTuple):
    """What a step added up to over all workers."""

    ce: float
    z: float
    balance: float
    counts_LE: Tensor
    issued: Counter[str]


class Trainer:
    """One worker of a training job. Worker 0 also speaks for the job to the shards and writes its part of checkpoints."""

    def __init__(
        self,
        config: Config,
        pool: ExpertPool,
        data: Prepared,
        comm: Comm,
        device: str = "cpu",
        objective: Callable[[Afmoe, Config], nn.Module] = Objective,
    ):
        if pool.table.num_replicas_LE.max(initial=1) > 1:
            raise ConfigError("training takes one replica of each expert so far; this pool's table has more")
        self.config, self.pool, self.data, self.comm = config, pool, data, comm
        self.log: TrainLog | None = None
        self.device = torch.device(device)
        self.dispatcher = pool.dispatcher()
        self.model = Afmoe(config.model, self.dispatcher, device=self.device, dtype=torch.float32)
        self.objective: nn.Module = objective(self.model, config)
        if comm.world > 1:
            self.objective = DistributedDataParallel(self.objective, broadcast_buffers=False)
            self.objective.register_comm_hook(None, sum_gradients)
        self.should_stop: Callable[[], bool] = lambda: False  # asked by worker 0 in every step
        self.stopped = False
        self.version = self.position = self.num_skipped = self._skipped_in_a_row = 0

    # -- where the weights come from

    def start(self) -> None:
        """Take up the run where its last checkpoint left it, or begin: from `init_from`, or from the seed."""
        found = latest_checkpoint(self.config.train.out_dir)
        if found is not None:
            self._load(open_checkpoint(found), training=True)
        elif self.config.train.init_from:
            self._load(open_checkpoint(self.config.train.init_from), training=False)
        else:
            init_weights(self.model, self.config.model, self.config.train.seed)
            self._load_pool(Load(None, self.config.train.seed))
            self._make_optimizer()

    def _load(self, source: Checkpoint, training: bool) -> None:
        source.load_backbone(self.model)
        self._load_pool(Load(str(source.path.resolve()), training=training))
        self._make_optimizer()
        if training:
            self.version, self.position = source.version, int(source.state["position"])
            self.num_skipped = int(source.state["num_skipped"])
            self._restore(source)

    @torch.no_grad()
    def _restore(self, source: Checkpoint) -> None:
        """What the weights alone do not say. Raises ConfigError where the order of the data would be another one."""
        if source.state["order"] != self._order():
            raise ConfigError(
                f"{source.path} was trained on other data or batches, {source.state['order']} instead of {self._order()}; "
                "restore these settings, or start a new run with train.init_from"
            )
        self.optimizer.restore(source.training_tensors(self.optimizer.tensors()), int(source.state["num_updates"]))
        for name, mine in (self._momenta() | self._masters()).items():
            mine.copy_(source.training_tensors([name])[name])

    def _load_pool(self, message: Load) -> None:
        if self.comm.rank == 0:
            self.pool.load(message)
        self.comm.sum(torch.zeros(1))  # nobody sends a row before the shards have their weights

    def _make_optimizer(self) -> None:
        params = dict(self.model.named_parameters())
        matrices = {n: Matrix(*p.shape) for n, p in params.items() if is_hidden_matrix(n, p)}
        self.optimizer = Optimizer({n: p.detach() for n, p in params.items()}, matrices, self.config.optim)
        self.momentum = {layer: torch.zeros_like(bias) for layer, bias in self.model.expert_bias.items()}

    # -- the loop

    def run(self) -> dict[str, Any]:
        """Train to `steps`, evaluating and saving on the way; -> the last losses, position, version and checkpoint."""
        settings, loss, val_loss = self.config.train, math.nan, math.nan
        checkpoint = latest_checkpoint(settings.out_dir)
        while self.position < settings.steps and not self.stopped:
            loss = self.step().loss
            last = self.position == settings.steps
            if last or (settings.eval_every and self.position % settings.eval_every == 0):
                val_loss = self.evaluate()
            if last or self.stopped or (settings.save_every and self.position % settings.save_every == 0):
                checkpoint = self.save()
        reached = {
            "position": self.position,
            "version": self.version,
            "stopped": self.stopped,
            "checkpoint": str(checkpoint),
        }
        return {"loss": loss, "val_loss": val_loss, **reached}

    def step(self) -> StepMetrics:
        """One optimizer step: forward and backward of all micro-batches, prepare, then commit or abort, everywhere."""
        started, num, side = time.perf_counter(), self.config.train.num_micro, self.config.train.num_in_flight
        self._settle_placement()
        self.dispatcher.use(self.version)
        self.objective.zero_grad(set_to_none=True)
        totals = self._sum(
            [losses for first in range(0, num, side) for losses in self._micros(first, min(num, first + side))]
        )
        norm = self._prepare(totals.issued)
        self.position += 1
        muon_lr, adamw_lr = self._learning_rates()
        if math.isfinite(norm) and math.isfinite(totals.ce):
            self._commit(norm, muon_lr, adamw_lr, totals.counts_LE)
        else:
            self._abort(norm)
        return self._report(totals, norm, muon_lr, adamw_lr, time.perf_counter() - started)

    def _settle_placement(self) -> None:
        """Experts may move now; afterwards all workers send to the same places."""
        epoch = torch.zeros(1, dtype=torch.int64)
        if self.comm.rank == 0:
            epoch[0] = self.pool.at_boundary(self.version, self.optimizer.num_updates)
        self.pool.follow(int(self.comm.from_first(epoch)))

    def _micros(self, first: int, end: int) -> list[Losses]:
        """Forward and backward of the micro-batches `first` to `end`, side by side."""
        batches = [self._batch(micro) for micro in range(first, end)]
        with nullcontext() if end == self.config.train.num_micro else self._no_sync():
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
        scalars = [torch.stack([getattr(m, name) for m in micros]).sum() for name in ("ce", "z", "balance")]
        counts_LE = torch.stack([m.counts_LE for m in micros]).sum(0)
        issued = [self.dispatcher.issued[shard] for shard in self.pool.table.shards]
        parts = [torch.stack(scalars), counts_LE.flatten(), torch.tensor(issued)]
        flat = self.comm.sum(torch.cat([part.double().cpu() for part in parts]))
        ce, z, balance = flat[:3].tolist()
        ops = Counter(dict(zip(self.pool.table.shards, map(int, flat[3 + counts_LE.numel() :].tolist()), strict=True)))
        return Totals(ce, z, balance, flat[3 : 3 + counts_LE.numel()].long().view_as(counts_LE), ops)

    def _prepare(self, issued: Counter[str]) -> float:
        """The global gradient norm, once every shard has exactly the gradients that the workers sent it. Worker 0's word on
        stopping travels with it, so that all stop after the same step."""
        said = torch.zeros(2, dtype=torch.float64)
        if self.comm.rank == 0:
            reports = self.pool.prepare(self.version + 1, issued)
            said[0] = sq_norm(self._grads().values()) + sum(report.sq_norm for report in reports)
            said[1] = self.should_stop()
        squares, stop = self.comm.from_first(said).tolist()
        self.stopped = bool(stop)
        return math.sqrt(squares) if math.isfinite(squares) else math.inf

    def _grads(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def _commit(self, norm: float, muon_lr: float, adamw_lr: float, counts_LE: Tensor) -> None:
        scale = min(1.0, self.config.optim.grad_clip / (norm + 1e-12))
        if self.comm.rank == 0:
            self.pool.commit(Commit(self.version + 1, muon_lr, adamw_lr, scale))
        self.comm.sum(torch.zeros(1))
        self.optimizer.step(self._grads(), muon_lr, adamw_lr, scale)
        self._update_bias(counts_LE)
        self.version += 1
        self._skipped_in_a_row = 0

    def _abort(self, norm: float) -> None:
        log.warning(
            "step skipped: the gradient norm is %s; its batch is consumed, the weights stay at %s", norm, self.version
        )
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        if self.comm.rank == 0:
            self.pool.abort(self.version + 1)
        self.comm.sum(torch.zeros(1))
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise TrinityError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a gradient that is not finite, up to step {self.position}; "
                "lower the learning rates or go back to an earlier checkpoint"
            )

    @torch.no_grad()
    def _update_bias(self, counts_LE: Tensor) -> None:
        """Once per step, from the global counts, identically on every worker."""
        optim = self.config.optim
        for (layer, bias), counts_E in zip(self.model.expert_bias.items(), counts_LE.to(self.device), strict=True):
            if optim.bias_update == "smebu":
                rates = (optim.smebu_lambda, optim.smebu_beta, optim.smebu_kappa)
                new, self.momentum[layer] = smebu(bias, self.momentum[layer], counts_E, *rates)
                bias.copy_(new)
            elif optim.bias_update == "sign":
                bias.copy_(sign_update(bias, counts_E, optim.sign_gamma))

    def _learning_rates(self) -> tuple[float, float]:
        factor = lr_factor(self.position, self.config.optim, self.config.train.steps)
        return self.config.optim.muon_lr * factor, self.config.optim.adamw_lr * factor

    def _report(self, totals: Totals, norm: float, muon_lr: float, adamw_lr: float, seconds: float) -> StepMetrics:
        metrics = StepMetrics(
            step=self.position,
            loss=totals.ce,
            z_loss=totals.z,
            balance_loss=totals.balance,
            grad_norm=norm,
            muon_lr=muon_lr,
            adamw_lr=adamw_lr,
            tokens=self.config.train.global_batch_size * self.config.train.seq_len,
            seconds=seconds,
            max_vio=float(max_vio(totals.counts_LE).max()) if totals.counts_LE.numel() else 0.0,
            skipped=self.num_skipped,
            counts_LE=totals.counts_LE.tolist(),
        )
        if self.log is not None:
            self.log.step(metrics)
        return metrics

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
        loss = float(self.comm.sum(ce)) * settings.global_batch_size / num if num else math.nan
        if self.log is not None:
            self.log.validation(self.position, loss)
        return loss

    def save(self) -> Path:
        """Write checkpoint `step-<position>`: shards and backbone side by side; -> its folder."""
        out_dir = Path(self.config.train.out_dir).resolve()
        target = step_path(out_dir, self.position)
        if self.comm.rank == 0:
            self._write(CheckpointWriter(target, self.version))
            self.pool.set_source(Load(str(target)))
            prune(out_dir, self.config.train.keep_checkpoints)
        self.comm.sum(torch.zeros(1))
        return target

    def _write(self, writer: CheckpointWriter) -> None:
        parts = self.pool.save(str(writer.folder))
        parts += write_tensors(writer.folder, "model-backbone", self._backbone())
        state = {**self.optimizer.tensors(), **self._momenta(), **self._masters()}
        parts += write_tensors(writer.folder, "training/backbone", state.items())
        writer.finish(parts, self.config.model, self.data.tokenizer, self._state())

    def _backbone(self) -> Iterator[tuple[str, Tensor]]:
        """The backbone in the model's type; the selection biases stay fp32."""
        dtype = getattr(torch, self.config.model.dtype)
        for name, tensor in self.model.state_dict().items():
            yield name, tensor if name.endswith("expert_bias") else tensor.to(dtype)

    def _masters(self) -> dict[str, Tensor]:
        """The fp32 weights that a bf16 checkpoint rounds."""
        if self.config.model.dtype == "float32":
            return {}
        return {f"{name}::master": parameter.detach() for name, parameter in self.model.named_parameters()}

    def _order(self) -> dict[str, int]:
        """What the sequence of batches depends on, besides the position."""
        settings = self.config.train
        batches = {name: getattr(settings, name) for name in ("seed", "seq_len", "global_batch_size")}
        return {**batches, "num_tokens": len(self.data.train.store.tokens)}

    def _momenta(self) -> dict[str, Tensor]:
        return {f"model.layers.{layer}.mlp.expert_bias::momentum": m for layer, m in self.momentum.items()}

    def _state(self) -> dict[str, Any]:
        config = self.config.model_dump(mode="json", exclude={"serve": {"api_key", "admin_key"}})
        counts = {"position": self.position, "num_skipped": self.num_skipped, "num_updates": self.optimizer.num_updates}
        return {**counts, "order": self._order(), "config": config}
