"""The training job: Ray Train workers hold the backbone and call the pool's shards; the experts live outside the job.

When a worker dies, Ray Train starts the worker group again; it goes on from the last step that was decided, which shards and
host still have, or else from the last checkpoint. Logic lives in trinity/train/trainer.py.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
import ray.train
import torch
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from actors import pool as pools
from actors.rendezvous import MeetingConfig
from actors.sync import shm_folders
from actors.train_metrics import TrainExporter, check_listener, exported
from trinity.checkpoint import latest_checkpoint, open_checkpoint
from trinity.config import Config, num_cpus
from trinity.data.prepare import prepare
from trinity.errors import TrinityError, Unavailable
from trinity.evaluate.exam import exam_of
from trinity.observability.train_log import StepMetrics, TrainLog
from trinity.rl.kinds import trainer_kind
from trinity.state.versioned_store import Store
from trinity.train.collectives import Alone, Comm, Distributed
from trinity.train.trainer import Trainer
from trinity.utils.disk import refusal_of
from trinity.utils.hugepages import ONE_HEAP, keep_freed_memory
from trinity.utils.niceness import give_way

MAX_PLACE_BYTES = 512
STOP = ".stop"  # a file in out_dir: finish the step, save, end
PAUSE = ".pause"  # a file in out_dir: take no further step until it is gone
PAUSE_POLL_S = 0.05


class Job(TorchTrainer):
    """Ray's, without processes that each run would have: for Ray's data sets, as ours reads its own; in a cluster that ends
    with the run also for slots that stay taken when the controller is lost."""

    unwanted: tuple[type, ...] = (DatasetsCallback,)

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, self.unwanted)]


def _store(config: Config, pool: pools.RayPool, comm: Comm, device: str) -> Store | None:
    """The backbone's, of the first worker on each node, in memory that outlives the process; the pool is told of all."""
    node = ray.get_runtime_context().get_node_id()
    is_first = node not in _said(comm, node)[: comm.rank]  # Ray's local rank would count by address
    folder = shm_folders.folder(config.placement, config.cluster.namespace, "backbone") if is_first else None
    texts = _said(comm, f"{node} {folder}" if folder is not None else "")
    pool.ledger.backbone_at = [(text.split(" ", 1)[0], text.split(" ", 1)[1]) for text in texts if text]
    return Store(folder, device) if folder is not None else None


def _said(comm: Comm, text: str) -> list[str]:
    """The words of each worker, of up to MAX_PLACE_BYTES."""
    said = torch.zeros(comm.world, MAX_PLACE_BYTES)
    said[comm.rank, : len(text.encode())] = torch.tensor(list(text.encode()), dtype=said.dtype)
    return [bytes(map(int, row)).rstrip(b"\0").decode() for row in comm.all_reduce(said).tolist()]


def fit(config: Config, loop: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Run the job to its end in the cluster this process has joined; -> what rank 0's `Trainer.run` returned.

    `loop`: what each worker runs, `train_loop` unless told otherwise.

    The pool must be there, and holds the final weights afterwards. A run that is in `out_dir` already is continued, with
    its own tokenizer. Raises the TrinityError that ended a worker for good.
    """
    check_listener(config)
    out_dir = Path(config.train.out_dir).resolve()
    config = _with_own_tokenizer(config.replace(train={"out_dir": str(out_dir)}))
    prepare(config.data, config.train, config.model, out_dir)
    settings = config.train
    resources = {"train_slot": 1.0}  # no CPU: a node's slots say how many workers it takes
    use_gpu = settings.num_gpus_per_worker > 0
    is_elastic = settings.fewest_workers < settings.num_workers
    num_workers = (settings.fewest_workers, settings.num_workers) if is_elastic else settings.num_workers
    if use_gpu:
        resources["GPU"] = settings.num_gpus_per_worker
    trainer = Job(
        loop or train_loop,
        train_loop_config={"config": config.model_dump(mode="json"), "job": uuid4().hex},
        torch_config=MeetingConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name="ray",
            storage_path=str(out_dir),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            worker_runtime_env={"env_vars": dict(ONE_HEAP)},
        ),
    )
    if config.cluster.address == "local":
        trainer.unwanted = (DatasetsCallback, PlacementGroupCleanerCallback)
    return outcome_of(lambda: trainer.fit().return_value)


def outcome_of(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `run`, a job of Ray Train, returns. Raises the TrinityError that ended a worker for good, and Unavailable
    where Ray Train's own processes died, which see to the workers: they leave the workers' slots taken, so that no other job
    could begin here."""
    try:
        return run()
    except WorkerGroupError as error:
        raise _reason(error) from error
    except (ControllerError, RayActorError, OutOfMemoryError) as error:
        why = next(iter(str(getattr(error, "controller_failure", error)).splitlines()), type(error).__name__)
        raise Unavailable(f"Ray Train has ended ({why}); go on from the last checkpoint with --resume") from error


def _with_own_tokenizer(config: Config) -> Config:
    """A run that goes on keeps the tokenizer of its checkpoint, whatever became of the files it was trained on."""
    found = latest_checkpoint(config.train.out_dir)
    if found is None or config.data.tokenizer:
        return config
    kept = Path(config.train.out_dir) / "data" / "tokenizer"
    open_checkpoint(found).tokenizer.save(kept)
    return config.replace(data={"tokenizer": str(kept)})


def _reason(error: WorkerGroupError) -> Exception:
    """The typed error of a worker, or its disk's refusal, if there is one, out of Ray's wrapping."""
    for failure in error.worker_failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, TrinityError):
                return cause
            if refusal := refusal_of(cause):
                return refusal
            cause = getattr(cause, "cause", None) or cause.__cause__
    return error


def train_loop(settings: dict[str, Any], prepared: Callable[[Trainer], None] = lambda trainer: None) -> dict[str, Any]:
    """The loop of each worker, in its own process. `prepared` sees the trainer before it starts."""
    config = Config.model_validate(settings["config"])
    context = ray.train.get_context()
    give_way(config.placement.niceness)
    keep_freed_memory()
    torch.set_num_threads(config.train.num_threads_per_worker or max(1, num_cpus() // context.get_local_world_size()))
    device = str(ray.train.torch.get_device())
    comm = Distributed(torch.device(device)) if context.get_world_size() > 1 else Alone()
    pool = pools.connect(config.placement, config.cluster.namespace)
    data = prepare(config.data, config.train, config.model, config.train.out_dir)
    backbone = _store(config, pool, comm, device)
    trainer = trainer_kind(config)(config, pool, data, comm, device, backbone, job=settings["job"])
    trainer.should_stop = partial(_asked_to_stop, Path(config.train.out_dir))
    trainer.examine_with(exam_of(trainer))
    prepared(trainer)
    trainer.start()
    with _logged(trainer) if comm.rank == 0 else nullcontext():
        result = trainer.run()
    ray.train.report(result)
    return result


@contextmanager
def _logged(trainer: Trainer) -> Iterator[None]:
    """Inside the block its steps are in the run's log, and at /metrics where that is wanted."""
    config = trainer.config
    log, exporter = TrainLog(config.train.out_dir, config.train.steps), TrainExporter(config.model.moe_layers)
    if trainer.recovery.metrics_before is not None:
        log.catch_up(StepMetrics.of_row(trainer.recovery.metrics_before))
    trainer.logs = [log, exporter]
    with exported(exporter, config), closing(log):
        yield


def _asked_to_stop(out_dir: Path) -> bool:
    """Waits while the run is to pause."""
    while (out_dir / PAUSE).exists() and not (out_dir / STOP).exists():
        time.sleep(PAUSE_POLL_S)
    return (out_dir / STOP).exists()
