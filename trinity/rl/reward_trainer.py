"""A run that learns from its own answers: draw some to the next prompts, have them judged, take a step.

Decisions. A step's prompts depend on (seed, step), the seeds of its answers on their places in the step: so a run that is
killed and resumed draws the same answers from the same weights, and gives the same bits. Each worker draws and judges whole
groups.
Answers come from the weights that the step starts from (`staleness` 0: nothing trains while answers are drawn), or with
`rl.max_staleness` from those so many steps before, beside training (ahead.py). What does not count: an answer that nobody could
judge, one that was cut off (`rl.mask_truncated`), and groups that say nothing. A step of which no answer counts leaves the
weights as they are.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from trinity.checkpoint import list_checkpoints, step_of
from trinity.config import Config, EngineConfig
from trinity.data.kept import fingerprint
from trinity.data.prompts import Prompt
from trinity.engine.engine import Engine
from trinity.errors import ConfigError, VersionGone
from trinity.llm import LLM
from trinity.observability.train_log import StepMetrics
from trinity.pool.ledger import StepTicket
from trinity.rl.ahead import Ahead
from trinity.rl.drawing import Drawing, told, unjudged
from trinity.rl.environment import Environment
from trinity.rl.episodes import Episodes
from trinity.rl.judges import ByEnvironment, ByRewards, ByTeacher, Judge, Verdict, frozen
from trinity.rl.kept_answers import KeptAnswers
from trinity.rl.policy import SAMPLED
from trinity.rl.policy_trainer import PolicyTrainer
from trinity.rl.rewards import Rewards
from trinity.rl.rollout import PinnedWeights, Rollout
from trinity.train.collectives import barrier
from trinity.train.microbatches import BatchOf, means_of

T = TypeVar("T")
VALIDATED = ("reward", "length", "truncated", "unjudged", "turns")
UNLIKE = {"max_staleness", "reward_timeout_s", "reward_processes"}  # settings that answers do not depend on


class RewardTrainer(PolicyTrainer):
    """A PolicyTrainer whose `step` draws the answers that it learns from (data.format prompts)."""

    drawing: Drawing
    ahead: Ahead | None = None

    def start(self) -> None:
        """Get the weights, and see that answers can be drawn and judged. Raises ConfigError."""
        check(self.config)
        settings, engine, init_from = self.config.rl, self._engine(), self.config.train.init_from
        judge = self._judge(engine)
        reference = frozen(init_from, engine, str(self.device)) if settings.kl and init_from else None
        episodes = Episodes(self.config, self.data.tokenizer) if settings.environment else None
        super().start()
        self._decided = self._saved = self.position  # when that was last
        if not settings.max_staleness:
            self.drawing = Drawing(self.config, partial(Rollout.following, self, engine), judge, reference, episodes)
            return
        weights = PinnedWeights(self)

        def pinned() -> Rollout:
            return Rollout(LLM.over(Engine(weights, self.config.model, engine, self.data.tokenizer), weights))

        self.drawing = Drawing(self.config, pinned, judge, reference, episodes, lasting=VersionGone)
        self.ahead = Ahead(
            self._drawn_at, weights, self._kept_answers(), settings.max_staleness, self.config.train.steps
        )
        self.ahead.restore(self.position)

    def _judge(self, engine: EngineConfig) -> Judge:
        if self.config.rl.teacher is not None:
            return ByTeacher(self.config, engine, self.data.tokenizer, str(self.device))
        return ByEnvironment(self.config) if self.config.rl.environment else ByRewards(self.config)

    def _engine(self) -> EngineConfig:
        """The run's engine, for sequences as long as its data has them."""
        longest = min(self.config.train.seq_len + 1, self.config.model.max_position_embeddings)
        return self.config.engine.model_copy(update={"max_model_len": longest})

    def _kept_answers(self) -> KeptAnswers:
        facts = fingerprint(self.config.rl.model_dump(mode="json", exclude=UNLIKE), dict(self.identity.order))
        return KeptAnswers(Path(self.config.train.out_dir) / "rollouts", facts, self.comm.rank, self.comm.world)

    # -- a step

    def step(self, batch_of: BatchOf | None = None) -> StepMetrics:
        """One optimizer step, on answers to the next prompts; or on the micro-batches given."""
        if batch_of is not None:
            return super().step(batch_of)
        if self.ahead is None:
            verdict = self._drawn_at(self.position)
        else:
            checkpoints = map(step_of, list_checkpoints(self.config.train.out_dir))
            verdict = self.ahead.next(self.position, self.version, [self._decided, self._saved, *checkpoints])
        told_M2 = told(verdict, self.version, self.config)
        assert told_M2[SAMPLED.index("staleness_max"), 0] <= self.config.rl.max_staleness, "an answer is too old"
        return self.learn_from(verdict.judged, told_M2)

    def _drawn_at(self, position: int) -> Verdict:
        prompts, first = self.prompts_at(position)
        return self.drawing.verdict(prompts, self.drawing.drawn(prompts, first))

    def prompts_at(self, position: int) -> tuple[list[Prompt], int]:
        """This worker's prompts of the step at that position, and the place of its first answer among all of the run."""
        group, answers = self.config.rl.group_size, self.config.train.sequences_of(position)
        prompts = answers.groups(group)
        mine = np.array_split(self.data.train.sequences(prompts), self.comm.world)[self.comm.rank]
        place = self.comm.rank * (prompts.num // self.comm.world)
        return self.data.train.take(mine), answers.first + place * group

    # -- versions and checkpoints, where answers are drawn ahead

    def kept(self, ticket: StepTicket) -> tuple[int, ...]:
        return (*super().kept(ticket), *(self.ahead.versions if self.ahead else ()))

    def _commit(self, *what: Any) -> None:
        """A version is decided on once the answers of the step that begins with it are on the disk."""
        if self.ahead is not None:
            self.ahead.settle(self.position + 1, self.version)
            barrier(self.comm)
        super()._commit(*what)
        self._decided = self.position

    def begin_save(self) -> Path:
        """Write a checkpoint while training goes on; answers that were begun before it are there when it is."""
        if self.ahead is not None:
            self.ahead.drain(self.version)
            barrier(self.comm)
        self._saved = self.position
        return super().begin_save()

    # -- validation

    def evaluate(self) -> float:
        """Judge one answer, the likeliest, to each of the same held-out prompts; there is no loss of these: nan."""
        found = self._by_present(self._validated)
        means = means_of(SAMPLED, self.comm.all_reduce(told(found, self.version, self.config)))
        for each in self.logs:
            each.validation(self.position, math.nan, {}, {name: means[name] for name in VALIDATED if name in means})
        return math.nan

    def _by_present(self, what: Callable[[], T]) -> T:
        return what() if self.ahead is None else self.ahead.at(self.version, what)

    def _validated(self) -> Verdict:
        data, num = self.data.val, min(self.config.train.eval_sequences, self.data.val.num_sequences)
        prompts = data.take(np.arange(self.comm.rank, num, self.comm.world)) if num else []
        samples = self.drawing.drawn(prompts, 0, 1, temperature=0.0) if prompts else []
        return unjudged(samples, self.drawing.judge.rewards(prompts, samples) if prompts else [])


def check(config: Config) -> None:
    """Raise ConfigError for settings that no step could be taken with: sizes, reward functions, a reference."""
    settings, group = config.train, config.rl.group_size
    if uneven := next((size for size in settings.batch_sizes if size % (group * settings.num_workers)), 0):
        raise ConfigError(
            f"train.global_batch_size {uneven} answers are no groups of rl.group_size {group} for each of "
            f"{settings.num_workers} workers; make it a multiple of {group * settings.num_workers}"
        )
    if config.rl.kl and settings.init_from is None:
        raise ConfigError("rl.kl holds to the weights of train.init_from, and there are none; set it, or rl.kl 0")
    if config.rl.environment is not None:
        Environment(config.rl).check()
    elif config.rl.teacher is None:
        Rewards(config.rl).check()
