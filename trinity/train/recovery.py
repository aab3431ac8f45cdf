"""Where a worker of a training job gets its weights: from the last decision, from a checkpoint, or from the seed.

Part of the Trainer (trainer.py). Decisions: worker 0 finds out and the others follow; a decision is gone on from only by the
job that made it, or by one that resumes its run.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trinity.checkpoint import Checkpoint, latest_checkpoint, open_checkpoint, step_of
from trinity.config import Config
from trinity.data.prepare import Prepared
from trinity.errors import (
    ConfigError,
    DeadlineExceeded,
    InputGone,
    StepConflict,
    Unavailable,
    VersionGone,
    WrongEpoch,
)
from trinity.models.common.decoder import CausalLM
from trinity.models.registry import family_of
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Load
from trinity.state.versioned_store import Version
from trinity.train.backbone import Backbone
from trinity.train.collectives import Comm

log = logging.getLogger(__name__)
HEALABLE = (Unavailable, DeadlineExceeded, StepConflict, WrongEpoch, VersionGone, InputGone)


class Recovery:
    """`job` is the same for all workers that one command starts; `position` counts batches consumed."""

    config: Config
    pool: ExpertPool
    data: Prepared
    comm: Comm
    model: CausalLM
    backbone: Backbone
    job = ""
    position = num_skipped = 0
    metrics_before: dict[str, Any] | None = None  # of the step that it goes on from, which may be in no log yet

    @property
    def version(self) -> int:
        return self.backbone.version

    def start(self) -> None:
        """Go on from what the job decided last, if its shards and this host still have it; else from its last checkpoint; or
        begin: from `init_from`, or from the seed."""
        if self._go_on():
            return
        found = latest_checkpoint(self.config.train.out_dir)
        if found is not None:
            self._load(open_checkpoint(found), training=True)
        elif self.config.train.init_from:
            self._load(open_checkpoint(self.config.train.init_from), training=False)
        else:
            family_of(self.config.model).init_weights(self.model, self.config.train.seed)
            self._load_pool(Load(None, self.config.train.seed))
            self.backbone.begin(0)
        if self.comm.rank == 0:
            self.pool.begin(self.version, {**self._notes(is_step=False), "is_source": True})
        self.comm.all_reduce(torch.zeros(1))

    def _go_on(self) -> bool:
        """Without a checkpoint. Worker 0 finds the backbone where a worker before it left it; the others get it from there."""
        found = self._recovered() if self.comm.rank == 0 else None
        counts = [0, 0, 0, 0] if found is None else [found.number, *self._counts_of(found)]
        there, *said = self.comm.from_first(torch.tensor([found is not None, *counts])).tolist()
        if not there:
            return False
        number, num_updates, self.position, self.num_skipped = said
        tensors = {} if found is None else found.tensors
        received = {
            name: self.comm.from_first(tensors[name] if name in tensors else torch.empty(like.shape, dtype=like.dtype))
            for name, like in self.backbone.expected().items()
        }
        self.backbone.take(found or Version(number, received, {"num_updates": num_updates}))
        log.info("going on from version %d, position %d", self.version, self.position)
        return True

    def _counts_of(self, found: Version) -> tuple[int, int, int]:
        decision = self.pool.decided()
        assert decision is not None
        self.metrics_before = decision.notes.get("metrics")
        return found.notes["num_updates"], decision.notes["position"], decision.notes["num_skipped"]

    def _recovered(self) -> Version | None:
        """The backbone of the version that was decided last, once all shards are there. None: a checkpoint must do."""
        decision = self.pool.decided()
        if decision is None or not self._continues(decision.notes):
            return None
        try:
            found = self.backbone.store.versions.get(decision.version) or self.pool.backbone(decision.version)
            if found.notes.get("attempt") not in (None, decision.notes.get("attempt")):
                raise VersionGone(f"the backbone that is kept is another version {decision.version} than was decided")
            self.pool.commit(decision.version)
            return found
        except HEALABLE as error:
            log.warning("version %d cannot be gone on from: %s", decision.version, error)
            return None

    def _continues(self, notes: Mapping[str, Any]) -> bool:
        """Whether a decision is this job's, or of the run that it resumes: not of one that was begun anew or set back since."""
        settings, found = self.config.train, latest_checkpoint(self.config.train.out_dir)
        if notes["run"] != self._run:
            return False
        if notes["job"] == self.job and notes["order"] != self._order():
            raise ConfigError(
                f"the data of {self._run} has changed while it trained: {self._order()} instead of {notes['order']}; "
                "restore it, or start a new run"
            )
        if notes["order"] != self._order():
            return False
        if notes["job"] != self.job and not (settings.resume and settings.resume_from is None):
            return False
        return found is None or step_of(found) <= notes["position"]

    def _load(self, source: Checkpoint, training: bool) -> None:
        if training:
            self._check_order(source)
        self._load_pool(Load(str(source.path.resolve()), training=training))
        if training:
            self.backbone.restore(source)
            self.position, self.num_skipped = int(source.state["position"]), int(source.state["num_skipped"])
        else:
            source.load_backbone(self.model)
            self.backbone.begin(0)

    def _check_order(self, source: Checkpoint) -> None:
        """Raises ConfigError where the order of the data would be another one."""
        if source.state["order"] != self._order():
            raise ConfigError(
                f"{source.path} was trained on other data or batches, {source.state['order']} instead of {self._order()}; "
                "restore these settings, or start a new run with train.init_from"
            )

    def _load_pool(self, message: Load) -> None:
        if self.comm.rank == 0:
            self.pool.load(message)
        self.comm.all_reduce(torch.zeros(1))  # nobody sends a row before the shards have their weights

    @property
    def _run(self) -> str:
        return str(Path(self.config.train.out_dir).resolve())

    def _order(self) -> dict[str, int]:
        """What the sequence of batches depends on, besides the position."""
        settings = self.config.train
        batches = {name: getattr(settings, name) for name in ("seed", "seq_len", "global_batch_size")}
        return {**batches, "num_tokens": len(self.data.train.store.tokens)}

    def _notes(self, is_step: bool) -> dict[str, Any]:
        """What a job that takes over needs to know besides the weights. `is_step`: of the version that is staged."""
        counts = {"position": self.position, "num_skipped": self.num_skipped}
        return {
            "job": self.job,
            "run": self._run,
            "order": self._order(),
            **counts,
            "num_updates": self.backbone.num_updates + is_step,
        }
