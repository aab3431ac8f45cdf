"""Reference scores: what the weights that a run begins with give each answer, computed once, before its first step.

Legend: N sequences of a dataset.
Decisions: by the path that training takes, in micro-batches that are shared out among the workers, so that they are the same
for any number of them. They lie in the run's folder and belong to the weights that it began with: whoever goes on from a later
step takes those that are there. Written whole or not at all: a kill before that costs the work, and no step.
"""

import logging
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trinity.checkpoint import open_checkpoint
from trinity.config import Config
from trinity.data.answers import PackedAnswers
from trinity.data.kept import fingerprint
from trinity.errors import ConfigError, DataError
from trinity.rl.preferences import AnswerObjective
from trinity.train.collectives import Comm, said_by_rank0
from trinity.train.microbatches import plain
from trinity.train.trainer import Trainer

log = logging.getLogger(__name__)


def reference_scores(trainer: Trainer, data: PackedAnswers) -> Tensor:
    """float32 [N, 2], for all workers: from the run's folder, or computed and written there. To be asked after `start`, before
    the first step. Raises ConfigError where a run goes on and they are gone."""
    config, comm = trainer.config, trainer.comm
    file = _file(config, data, is_begin=not trainer.position) if comm.rank == 0 else Path()
    if said_by_rank0(comm, file.is_file()):
        return comm.from_first(_read(file, data) if comm.rank == 0 else torch.empty_like(data.reference_N2))
    log.info("scoring %d answers by the weights that the run begins with", 2 * data.num_sequences)
    found_N2 = _computed(trainer, data, comm)
    if comm.rank == 0:
        _write(file, found_N2)
    return found_N2


def _file(config: Config, data: PackedAnswers, is_begin: bool) -> Path:
    folder = Path(config.train.out_dir) / "data"
    name = f"reference-{fingerprint(data.store.content, config.data.format, data.seq_len)}"
    if is_begin:
        return folder / f"{name}-{_origin(config)}.npy"
    found = sorted(folder.glob(f"{name}-*.npy"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(
            f"{folder} lacks the reference scores {name} of the weights that this run began with; put them back, or begin a "
            "new run with train.init_from"
        )
    return found[-1]


def _origin(config: Config) -> str:
    """Stands for the weights that a run begins with."""
    model = config.model.model_dump(mode="json")
    if config.train.init_from is None:
        return fingerprint(config.train.seed, model)
    source = open_checkpoint(config.train.init_from)
    files = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(source.path.glob("*.safetensors"))
    ]
    return fingerprint(source.name, source.manifest, files, model)


@torch.no_grad()
def _computed(trainer: Trainer, data: PackedAnswers, comm: Comm) -> Tensor:
    found_N2, size = torch.zeros_like(data.reference_N2), trainer.config.train.micro_batch_size
    objective = plain(trainer.objective)
    assert isinstance(objective, AnswerObjective)
    trainer.dispatcher.use(trainer.version)
    starts = range(0, data.num_sequences, size)
    for start in starts[comm.rank :: comm.world]:
        part = range(start, min(start + size, data.num_sequences))
        batch = trainer.micro_batches.on_device(data.answers(part))
        found_N2[part.start : part.stop] = objective.scores(batch).view(-1, 2).cpu()
    return comm.all_reduce(found_N2)  # each row is one worker's: sums with zeros keep its bits


def _read(file: Path, data: PackedAnswers) -> Tensor:
    try:
        found_N2 = torch.from_numpy(np.load(file))
    except (OSError, ValueError) as error:
        raise DataError(f"reference scores in {file} are damaged ({error}); delete it and begin the run anew") from None
    if found_N2.shape != data.reference_N2.shape or found_N2.dtype != torch.float32:
        raise DataError(
            f"{file} holds no reference scores of these {data.num_sequences} rows; delete it and begin the run anew"
        )
    return found_N2


def _write(file: Path, scores_N2: Tensor) -> None:
    scratch = file.with_suffix(".tmp")
    with scratch.open("wb") as out:
        np.save(out, scores_N2.numpy())
        out.flush()
        os.fsync(out.fileno())
    scratch.rename(file)
