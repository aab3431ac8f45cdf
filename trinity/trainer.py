"""The training loop of one worker: micro-batches through backbone and shards, then one step that all take or nobody does.

Legend: B sequences of a micro-batch, S sequence length, T = B*S tokens, L layers with experts, E experts.
Decisions: a plain class without Ray; `Comm` is how workers agree. The loss of the whole step is a sum over all workers and
micro-batches, so gradients are summed, never averaged: on shards they are complete because every worker sends its rows
there, in the backbone by DDP. `version` counts committed steps and names the weights; `position` counts batches consumed
(a step skipped for a bad gradient consumes its batch), so that data order is a function of it alone.
"""

import logging
import math
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trinity.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    backbone_tensors,
    latest_checkpoint,
    open_checkpoint,
    prune,
    step_path,
    write_tensors,
)
from trinity.config import Config
from trinity.data import Batch, Prepared
from trinity.messages import Commit, Load
from trinity.metrics import StepMetrics, TrainLog
from trinity.model.afmoe import Afmoe
from trinity.model.attention import PackedAttention, packed_positions
from trinity.model.balance import expert_counts, sign_update, smebu
from trinity.model.init import init_weights
from trinity.model.losses import loss_from_hidden, max_vio, sequence_balance_loss
from trinity.model.params import is_hidden_matrix
from trinity.optim import Matrix, Optimizer, lr_factor, sq_norm
from trinity.pool import ExpertPool

log = logging.getLogger(__name__)


class Comm(Protocol):
    """How the workers of one job agree. Every method is called by all of them in the same order."""

    rank: int
    world: int

    def sum(self, tensor: Tensor) -> Tensor: ...

    def from_first(self, tensor: Tensor) -> Tensor: ...


class Alone:
    """One worker: everything is already agreed."""

    rank, world = 0, 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def from_first(self, tensor: Tensor) -> Tensor:
        return tensor


class Distributed:
    """Workers of an initialised torch.distributed group; tensors are moved to the backend's device."""

    def __init__(self, device: torch.device):
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device

    def sum(self, tensor: Tensor) -> Tensor:
        moved = tensor.to(self.device).clone()
        dist.all_reduce(moved)
        return moved.cpu()

    def from_first(self, tensor: Tensor) -> Tensor:
        moved = tensor.to(self.device).clone()
        dist.broadcast(moved, src=0)
        return moved.cpu()


class Losses(NamedTuple):
    """Sums of one micro-batch, already divided by the step's totals: adding them up over all gives the step's means."""

    ce: Tensor
    z: Tensor
    balance: Tensor
    counts_LE: Tensor

    @property
    def total(self) -> Tensor:
        return self.ce + self.z + self.balance


class Objective(nn.Module):
    """The loss as a module, so that DDP sees its forward pass."""

    def __init__(self, model: Afmoe, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, ids_BS: Tensor, targets_BS: Tensor, docs_BS: Tensor | None) -> Losses:
        batch, seq = ids_BS.shape
        attend = PackedAttention(self.config.model, docs_BS, batch, seq)
        out = self.model(ids_BS.flatten(), packed_positions(batch, seq, ids_BS.device), attend)
        share = 1.0 / self.config.train.global_batch_size
        ce, z = loss_from_hidden(
            self.model.lm_head.weight, out.hidden_TD, targets_BS.flatten(), self.config.optim.z_loss
        )
        balance = sequence_balance_loss(out.routing, self.config.model, batch, seq, self.config.optim.balance_loss)
        counts = [expert_counts(r.ids_TK, self.config.model.num_experts) for r in out.routing]
        counts_LE = torch.stack(counts) if counts else torch.zeros(0, self.config.model.num_experts, dtype=torch.int64)
        return Losses(ce * share / seq, z * share / seq, balance * share * batch, counts_LE)


class Totals(NamedTuple):
    """What a step added up to over all workers."""

    ce: float
    z: float
    balance: float
    counts_LE: Tensor
    issued: Counter[str]


class Trainer:
    """One worker of a training job. Worker 0 also speaks for the job to the shards and writes its part of checkpoints."""

    def __init__(self, config: Config, pool: ExpertPool, data: Prepared, comm: Comm, device: str = "cpu"):
        if pool.table.num_replicas_LE.max(initial=1) > 1:
            raise NotImplementedError("training with more than one replica of an expert")
        self.config, self.pool, self.data, self.comm = config, pool, data, comm
        self.log: TrainLog | None = None
        self.device = torch.device(device)
        self.dispatcher = pool.dispatcher()
        self.model = Afmoe(config.model, self.dispatcher, device=self.device)
        self.objective: nn.Module = Objective(self.model, config)
        if comm.world > 1:
            self.objective = DistributedDataParallel(self.objective, broadcast_buffers=False)
            self.objective.register_comm_hook(None, _sum_gradients)
        self.version = self.position = self.num_skipped = 0

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
            self.optimizer.restore(source.training_tensors(self.optimizer.tensors()), int(source.state["num_updates"]))
            for name, momentum in source.training_tensors(self._momenta()).items():
                self._momenta()[name].copy_(momentum)

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
        while self.position < settings.steps:
            loss = self.step().loss
            last = self.position == settings.steps
            if last or (settings.eval_every and self.position % settings.eval_every == 0):
                val_loss = self.evaluate()
            if last or (settings.save_every and self.position % settings.save_every == 0):
                checkpoint = self.save()
        reached = {"position": self.position, "version": self.version, "checkpoint": str(checkpoint)}
        return {"loss": loss, "val_loss": val_loss, **reached}

    def step(self) -> StepMetrics:
        """One optimizer step: forward and backward of all micro-batches, prepare, then commit or abort, everywhere."""
        started = time.perf_counter()
        self.dispatcher.begin(self.version)
        self.objective.zero_grad(set_to_none=True)
        totals = self._sum([self._micro(m) for m in range(self.config.train.num_micro)])
        norm = self._prepare(totals.issued)
        self.position += 1
        muon_lr, adamw_lr = self._learning_rates()
        if math.isfinite(norm) and math.isfinite(totals.ce):
            self._commit(norm, muon_lr, adamw_lr, totals.counts_LE)
        else:
            self._abort(norm)
        return self._report(totals, norm, muon_lr, adamw_lr, time.perf_counter() - started)

    def _micro(self, micro: int) -> Losses:
        settings = self.config.train
        batch = self.data.train.batch(
            self.position, settings.global_batch_size, self.comm.rank, self.comm.world, micro, settings.micro_batch_size
        )
        last = micro == settings.num_micro - 1
        with nullcontext() if last else self._no_sync():
            losses = self.objective(*self._inputs(batch))
            losses.total.backward()
        return Losses(*(value.detach() for value in losses))

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        docs = batch.docs_BS.to(self.device) if self.config.data.intra_document_mask else None
        return batch.ids_BS.to(self.device), batch.targets_BS.to(self.device), docs

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
        """The global gradient norm, once every shard has exactly the gradients that the workers sent it."""
        squares = torch.zeros(1, dtype=torch.float64)
        if self.comm.rank == 0:
            reports = self.pool.prepare(self.version + 1, issued)
            squares[0] = sq_norm(self._grads().values()) + sum(report.sq_norm for report in reports)
        return math.sqrt(x) if math.isfinite(x := float(self.comm.from_first(squares))) else math.inf

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

    def _abort(self, norm: float) -> None:
        log.warning(
            "step skipped: the gradient norm is %s; its batch is consumed, the weights stay at %s", norm, self.version
        )
        self.num_skipped += 1
        if self.comm.rank == 0:
            self.pool.abort(self.version + 1)
        self.comm.sum(torch.zeros(1))

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
        """Mean cross-entropy in nats over the same validation sequences every time; nan without any."""
        settings = self.config.train
        per_pass = settings.micro_batch_size * self.comm.world
        num_passes = min(settings.eval_sequences, self.data.val.num_sequences) // per_pass
        self.dispatcher.begin(self.version)
        ce = torch.zeros(1, dtype=torch.float64)
        for index in range(num_passes):
            batch = self.data.val.batch(index, per_pass, self.comm.rank, self.comm.world, 0, settings.micro_batch_size)
            ce += self.objective(*self._inputs(batch)).ce.double().cpu()
        total = float(self.comm.sum(ce)) * settings.global_batch_size
        loss = total / (num_passes * per_pass) if num_passes else math.nan
        if self.log is not None:
            self.log.eval(self.position, loss)
        return loss

    def save(self) -> Path:
        """Write checkpoint `step-<version>`: shards and backbone side by side; -> its folder."""
        target = Path(self.config.train.out_dir).resolve()
        if self.comm.rank == 0:
            written = self._write(CheckpointWriter(step_path(target, self.version), self.version))
            self.pool.set_source(Load(str(written)))
            prune(target, self.config.train.keep_checkpoints)
        self.comm.sum(torch.zeros(1))
        return step_path(target, self.version)

    def _write(self, writer: CheckpointWriter) -> Path:
        parts = self.pool.save(str(writer.folder))
        parts += write_tensors(writer.folder, "model-backbone", backbone_tensors(self.model))
        state = {**self.optimizer.tensors(), **self._momenta()}
        parts += write_tensors(writer.folder, "training/backbone", state.items())
        return writer.finish(parts, self.config.model, self.data.tokenizer, self._state())

    def _momenta(self) -> dict[str, Tensor]:
        return {f"model.layers.{layer}.mlp.expert_bias::momentum": m for layer, m in self.momentum.items()}

    def _state(self) -> dict[str, Any]:
        config = self.config.model_dump(mode="json", exclude={"serve": {"api_key"}})
        counts = {"position": self.position, "num_skipped": self.num_skipped, "num_updates": self.optimizer.num_updates}
        return {**counts, "config": config}


def _sum_gradients(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's all-reduce without its division: the losses are shares of the global mean already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
