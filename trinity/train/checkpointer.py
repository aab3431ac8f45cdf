"""Checkpoints beside the training that goes on: shards and backbone write a version that nobody changes any more.

Decisions: one save at a time, the next waits for it; a save that fails is said and tried again at the next one, and ends the
job only when it was the last.
"""

import logging
import threading
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trinity.adapters.peft import AdapterConfig
from trinity.checkpoint import (
    CheckpointWriter,
    adaptable,
    kept_generation,
    latest_checkpoint,
    open_checkpoint,
    prune,
    step_path,
    write_tensors,
)
from trinity.config import Config
from trinity.errors import CheckpointError
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Load, Part
from trinity.train.backbone import Backbone

if TYPE_CHECKING:
    from trinity.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class AsyncCheckpointer:
    """Worker 0's. Owned by one thread; the writing is on another."""

    def __init__(self, config: Config, pool: ExpertPool, backbone: Backbone, tokenizer: "Tokenizer"):
        self.config, self.pool, self.backbone, self.tokenizer = config, pool, backbone, tokenizer
        self._generation = kept_generation(config.train.out_dir, config.train.init_from)
        self._thread: threading.Thread | None = None
        self._version = -1  # that is being written
        self._error: Exception | None = None
        self._seconds: float | None = None  # of the last save, until somebody asks

    @cached_property
    def _adapter(self) -> tuple[AdapterConfig, list[str]]:
        """The adapter that this run trains, and the matrices that it is for."""
        model, lora, out_dir = self.config.model, self.config.optim.lora, self.config.train.out_dir
        base = open_checkpoint(latest_checkpoint(out_dir) or str(self.config.train.init_from)).base
        modules = [name for name, matrix in adaptable(model).items() if matrix.role in lora.targets]
        return AdapterConfig(base.name, lora.rank, lora.alpha, base.content), modules

    def target(self, position: int) -> Path:
        return step_path(Path(self.config.train.out_dir).resolve(), position)

    def is_due(self, position: int) -> bool:
        """Say whether train.save_every asks for a checkpoint there."""
        every = self.config.train.save_every
        return every > 0 and position % every == 0

    def has(self, position: int) -> bool:
        """Say whether that position's is written, or one is on its way."""
        return self.target(position).is_dir() or bool(self.versions)

    def pop_seconds(self) -> float | None:
        """The seconds of the save that was finished since the last call."""
        seconds, self._seconds = self._seconds, None
        return seconds

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions that are being written and must stay."""
        if self._thread is not None and not self._thread.is_alive():
            self._finish()
        return () if self._thread is None else (self._version,)

    def begin(self, position: int, state: dict[str, Any]) -> Path:
        """Start to write the present version as checkpoint `step-<position>`; -> the folder that it will be."""
        if self._finish() is not None:
            log.error("the checkpoint before was not written: %s", self._error)
        target, self._error = self.target(position), None
        try:
            writer = CheckpointWriter(target, self.backbone.version)
        except CheckpointError as error:
            self._error = error
            return target
        parts = self.pool.save(str(writer.folder), writer.step)
        self.backbone.store.hold(writer.step)
        self._version = writer.step
        self._thread = threading.Thread(target=self._run, args=(writer, parts, state), name="trinity-save", daemon=True)
        self._thread.start()
        return target

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what prevented the last save."""
        if (error := self._finish()) is not None:
            raise error

    def _finish(self) -> Exception | None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.backbone.store.release(self._version)
        return self._error

    def _run(self, writer: CheckpointWriter, parts: Callable[[], list[Part]], state: dict[str, Any]) -> None:
        began_s = time.perf_counter()
        try:
            with writer:
                self._write(writer, parts, state)
            self._seconds = time.perf_counter() - began_s
        except Exception as error:  # the edge of this thread: `wait` raises it
            self._error = error

    def _write(self, writer: CheckpointWriter, parts: Callable[[], list[Part]], state: dict[str, Any]) -> None:
        version = self.backbone.store.get(writer.step)
        dtype, is_adapter = getattr(torch, self.config.model.dtype), self.config.optim.lora.rank > 0
        values = self.backbone.adapter(version) if is_adapter else self.backbone.values(dtype, version)
        own = write_tensors(writer.folder, "model-backbone", values)
        own += write_tensors(writer.folder, "training/backbone", self.backbone.training_state(version).items())
        if is_adapter:
            writer.finish_adapter([*parts(), *own], *self._adapter, self.config.model, self.tokenizer, state)
        else:
            writer.finish([*parts(), *own], self.config.model, self.tokenizer, state, self._generation)
        self.pool.set_source(Load(str(writer.target)))
        prune(writer.target.parent, self.config.train.keep_checkpoints, self.config.train.keep_every)
