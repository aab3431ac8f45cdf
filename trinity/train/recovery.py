"""Recovery of a run: its last decision, a checkpoint, other weights, or the seed.

Decisions: worker 0 finds out and the others follow; a decision is gone on from only by the job that made it, or by one that
resumes its run.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from trinity.checkpoint import Checkpoint, check_adapter, latest_checkpoint, open_checkpoint, step_of
from trinity.config import Config, OptimConfig, differences
from trinity.data.dataset import Facts
from trinity.data.prepare import Prepared
from trinity.errors import ConfigError, VersionGone
from trinity.models.registry import family_of
from trinity.optim.schedule import learning_rates
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Load
from trinity.state.versioned_store import Version
from trinity.train.backbone import Backbone
from trinity.train.collectives import Comm, barrier, said_by_rank0
from trinity.train.retry import RETRYABLE
from trinity.utils.trying import tried

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunCounts:
    """Position of a run: batches consumed, steps skipped, and what the next ones are compared with (validation.py)."""

    position: int = 0
    num_skipped: int = 0
    usual: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, notes: Mapping[str, Any]) -> "RunCounts":
        """Those that a checkpoint or a decision notes, of an older release without what was usual."""
        return cls(int(notes["position"]), int(notes["num_skipped"]), notes.get("usual", {}))


@dataclass(frozen=True)
class RunIdentity:
    """Which run this is. `job` is the same for all workers that one command starts; `order` is what the sequence of batches
    depends on, besides the position."""

    job: str
    run: str
    order: Facts

    @classmethod
    def of(cls, config: Config, data: Prepared, job: str) -> "RunIdentity":
        settings = config.train
        batches = {name: getattr(settings, name) for name in ("seed", "seq_len", "global_batch_size")}
        ramp = {"batch_ramp": settings.ramp_words} if settings.ramp_words else {}
        kind = {} if config.data.format in ("text", "chats") else {"format": config.data.format}
        return cls(job, str(Path(settings.out_dir).resolve()), {**batches, **ramp, **data.train.facts, **kind})

    def notes(self, counts: RunCounts, num_updates: int) -> dict[str, Any]:
        """Notes for a job that takes over from a version, besides the weights."""
        names = {"job": self.job, "run": self.run, "order": dict(self.order)}
        return {**names, **asdict(counts), "num_updates": num_updates}


class Recovery:
    """Gives a worker's backbone, and the pool, the weights that the run goes on from."""

    def __init__(self, config: Config, pool: ExpertPool, comm: Comm, backbone: Backbone, identity: RunIdentity):
        self.config, self.pool, self.comm, self.backbone, self.identity = config, pool, comm, backbone, identity
        self.metrics_before: Mapping[str, Any] | None = None  # of the step it went on from, which may be in no log yet

    def start(self) -> RunCounts:
        """Go on from what the job decided last, if its shards and this host still have it; else from its last checkpoint; or
        begin: from `init_from`, or from the seed."""
        found = self._go_on()
        if found is not None:
            return found
        reached = self._load_newest()
        if self.comm.rank == 0:
            notes = self.identity.notes(reached, self.backbone.num_updates)
            self.pool.begin(self.backbone.version, {**notes, "is_source": True})
        barrier(self.comm)
        return reached

    # -- from a decision

    def _go_on(self) -> RunCounts | None:
        """Go on without a checkpoint. Worker 0 finds the backbone where a worker before it left it; the others get it there."""
        found = self._decided_version() if self.comm.rank == 0 else None
        said = said_by_rank0(self.comm, None if found is None else self._facts_of(found))
        if said is None:
            return None
        number, num_updates, notes = said
        tensors = {} if found is None else found.tensors
        received = {
            name: self.comm.from_first(tensors[name] if name in tensors else torch.empty(like.shape, dtype=like.dtype))
            for name, like in self.backbone.expected().items()
        }
        self.backbone.take(found or Version(number, received, {"num_updates": num_updates}))
        reached = RunCounts.of(notes)
        log.info("going on from version %d, position %d", self.backbone.version, reached.position)
        return reached

    def _facts_of(self, found: Version) -> tuple[int, int, dict[str, Any]]:
        """Its number, the updates that made it, and what its decision notes."""
        decision = self.pool.decided()
        assert decision is not None
        self.metrics_before = decision.notes.get("metrics")
        return found.number, found.notes["num_updates"], dict(decision.notes)

    def _decided_version(self) -> Version | None:
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
        except RETRYABLE as error:
            latest = self.pool.decided()
            if latest is not None and latest.version > decision.version:  # by the worker that we replace, just now
                return self._decided_version()
            log.warning("version %d cannot be gone on from: %s", decision.version, error)
            return None

    def _continues(self, notes: Mapping[str, Any]) -> bool:
        """Say whether a decision is this job's, or of the run that it resumes: not of one begun anew or set back since."""
        settings, mine = self.config.train, self.identity
        if notes["run"] != mine.run:
            return False
        if notes["job"] == mine.job and notes["order"] != mine.order:
            raise ConfigError(
                f"the data of {mine.run} has changed while it trained: {mine.order} instead of {notes['order']}; "
                "restore it, or start a new run"
            )
        if notes["order"] != mine.order:
            return False
        if notes["job"] != mine.job and not (settings.resume and settings.resume_from is None):
            return False
        found = latest_checkpoint(settings.out_dir)
        return found is None or step_of(found) <= notes["position"]

    # -- from a checkpoint or the seed

    def _load_newest(self) -> RunCounts:
        settings = self.config.train
        if (found := latest_checkpoint(settings.out_dir)) is not None:
            return self._resume(open_checkpoint(found))
        source = open_checkpoint(settings.init_from) if settings.init_from else None
        check_adapter(source, self.config.optim, is_own=False)
        if source is not None:
            if settings.carry == "all":
                return self._carry_on(source)
            self._load_pool(Load(source.name, settings.seed, training=False))
            self.backbone.load(source)
        else:
            family_of(self.config.model).init_weights(self.backbone.model, settings.seed)
            self._load_pool(Load(None, settings.seed))
        self.backbone.begin(0)
        return RunCounts()

    def _carry_on(self, source: Checkpoint) -> RunCounts:
        """Begin the next stage of a run: data, schedule and shape of a step anew, everything else as it was."""
        if not source.has_training_state:
            raise ConfigError(
                f"{source.name} has no optimizer state, which train.carry all asks for; take a checkpoint that training "
                "wrote, or carry weights"
            )
        self._load_pool(Load(source.name, training=True))
        self.backbone.restore(source)
        return RunCounts()

    def _resume(self, source: Checkpoint) -> RunCounts:
        """Raises ConfigError where the order of the data would be another one."""
        check_adapter(source, self.config.optim, is_own=True)
        before = source.state["order"]
        if "content" not in before and "content" in self.identity.order:  # of a release that did not write it
            log.warning("%s does not say which documents it has seen: they may come again", source.path)
        now = {name: value for name, value in self.identity.order.items() if name in before or name != "content"}
        if before != now:
            raise ConfigError(
                f"{source.path} was trained on other data or batches ({'; '.join(differences(before, now))}), {before} instead "
                f"of {self.identity.order}; restore these settings, or start a new run with train.init_from"
            )
        self._load_pool(Load(str(source.path.resolve()), training=True))
        self.backbone.restore(source)
        return RunCounts.of(source.state)

    def _load_pool(self, message: Load) -> None:
        if self.comm.rank == 0:
            self.pool.load(message)
        barrier(self.comm)  # nobody sends a row before the shards have their weights


def rates_changed(config: Config) -> str:
    """Return words for who resumes a run with another schedule of the learning rate than it had so far; empty for nobody."""
    if (found := latest_checkpoint(config.train.out_dir)) is None:
        return ""
    state = open_checkpoint(found).state
    before = tried(lambda: OptimConfig.model_validate(state["config"]["optim"]), ValueError, KeyError)
    if isinstance(before, Exception):  # of a version with other settings
        return ""
    done, steps = int(state["position"]), state["config"]["train"]["steps"]
    last, usual = (learning_rates(step, before, steps) for step in (done, done + 1))
    now = learning_rates(done + 1, config.optim, config.train.steps)
    rates = (
        f"{name} {rate:.3g} after {last.get(name, 0):.3g}, not {usual.get(name, 0):.3g}" for name, rate in now.items()
    )
    return (
        ""
        if now == usual
        else f"step {done + 1} has the learning rate of another schedule than before: {', '.join(rates)}"
    )
