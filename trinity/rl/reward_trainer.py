"""A run that learns from its own answers: draw some to the next prompts, have them judged, take a step.

Decisions. A step's prompts depend on (seed, step), the seeds of its answers on their places in the step: so a run that is
killed and resumed draws the same answers from the same weights, and gives the same bits. Each worker draws and judges whole
groups.
Answers come from the weights that the step starts from (`staleness` 0: nothing trains while answers are drawn). What does not
count: an answer that nobody could judge, one that was cut off (`rl.mask_truncated`), and groups that say nothing. A step of
which no answer counts leaves the weights as they are.
"""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trinity.config import Config, EngineConfig
from trinity.data.prompts import Prompt
from trinity.engine.request import SamplingParams
from trinity.errors import ConfigError
from trinity.observability.train_log import StepMetrics
from trinity.rl.environment import Environment
from trinity.rl.episodes import Episodes
from trinity.rl.judges import ByEnvironment, ByRewards, ByTeacher, Judge, frozen, scores_of
from trinity.rl.policy import SAMPLED, Judged
from trinity.rl.policy_trainer import PolicyTrainer
from trinity.rl.rewards import Rewards
from trinity.rl.rollout import Rollout, Sample
from trinity.train.microbatches import BatchOf, means_of
from trinity.train.retry import RETRYABLE
from trinity.utils.deadline import Deadline

log = logging.getLogger(__name__)
PAUSE_S = 0.2  # before answers are drawn again
TURNS_APART = 500_000_003  # seeds of a conversation's answers
PRIORITY = 100  # behind whoever waits for an answer
VALIDATED = ("reward", "length", "truncated", "unjudged", "turns")


class RewardTrainer(PolicyTrainer):
    """A PolicyTrainer whose `step` draws the answers that it learns from (data.format prompts)."""

    judge: Judge

    def start(self) -> None:
        """Get the weights, and see that answers can be drawn and judged. Raises ConfigError."""
        check(self.config)
        settings, engine, device = self.config.rl, self._engine(), str(self.device)
        if settings.teacher is not None:
            self.judge = ByTeacher(self.config, engine, self.data.tokenizer, device)
        else:
            self.judge = ByEnvironment(self.config) if settings.environment else ByRewards(self.config)
        self.episodes = Episodes(self.config, self.data.tokenizer) if settings.environment else None
        init_from = self.config.train.init_from
        self.reference = frozen(init_from, engine, device) if settings.kl and init_from else None
        super().start()
        self.rollout = Rollout.following(self, engine)

    def _engine(self) -> EngineConfig:
        """The run's engine, for sequences as long as its data has them."""
        longest = min(self.config.train.seq_len + 1, self.config.model.max_position_embeddings)
        return self.config.engine.model_copy(update={"max_model_len": longest})

    def step(self, batch_of: BatchOf | None = None) -> StepMetrics:
        """One optimizer step, on answers to the next prompts; or on the micro-batches given."""
        if batch_of is not None:
            return super().step(batch_of)
        prompts, first = self.next_prompts()
        return self.learn_from(*self.judged(prompts, self.drawn(prompts, first)))

    def next_prompts(self) -> tuple[list[Prompt], int]:
        """This worker's prompts of the step, and the place of its first answer among all answers of the run."""
        group, answers = self.config.rl.group_size, self.sequences
        prompts = answers.groups(group)
        mine = np.array_split(self.data.train.sequences(prompts), self.comm.world)[self.comm.rank]
        place = self.comm.rank * (prompts.num // self.comm.world)
        return self.data.train.take(mine), answers.first + place * group

    def drawn(self, prompts: Sequence[Prompt], first: int, num: int | None = None, **how: Any) -> list[Sample]:
        """`num` answers to each prompt, rl.group_size unless told otherwise. What dies meanwhile is waited for."""
        group, deadline = num or self.config.rl.group_size, Deadline(self.config.placement.recover_timeout_s)
        while True:
            try:
                return self._answers(prompts, first, group, how)
            except RETRYABLE as error:
                if deadline.expired:
                    raise
                log.warning("answers are drawn again: %s", error)
            time.sleep(PAUSE_S)
            self.rollout = Rollout.following(self, self._engine())  # the old engine may hold half a pass

    def _answers(self, prompts: Sequence[Prompt], first: int, group: int, how: dict[str, Any]) -> list[Sample]:
        repeated = [prompt for prompt in prompts for _ in range(group)]

        def params(number: int, turn: int, num_ids: int) -> SamplingParams:
            return self._params(first + number, turn, num_ids, how)

        if self.episodes is not None:
            return self.episodes.play(self.rollout, repeated, params)
        each = [params(number, 0, len(prompt.ids)) for number, prompt in enumerate(repeated)]
        return self.rollout.generate([prompt.ids for prompt in repeated], each)

    def _params(self, place: int, turn: int, num_ids: int, how: dict[str, Any]) -> SamplingParams:
        """For the answer after so many tokens."""
        seed = (self.config.train.seed * 1_000_003 + place + turn * TURNS_APART) % 2**31
        length = min(self.config.rl.max_tokens, self.config.train.seq_len + 1 - num_ids)
        return SamplingParams(max_tokens=length, seed=seed, priority=PRIORITY, **how)

    def judged(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> tuple[list[Judged], Tensor]:
        """The samples with their advantages, and SAMPLED of them."""
        settings = self.config.rl
        verdict = self.judge.verdict(prompts, samples, settings.group_size)
        references = scores_of(self.reference, samples) if self.reference else [None] * len(samples)
        found = [
            each._replace(
                counts=each.counts and not (settings.mask_truncated and _is_cut(each.sample)), reference_T=score
            )
            for each, score in zip(verdict.judged, references, strict=True)
        ]
        return found, self._told(samples, verdict.rewards, verdict.num_uniform)

    def _told(self, samples: Sequence[Sample], rewards: Sequence[float | None], num_uniform: int) -> Tensor:
        """float32 [M, 2]: sum and number of SAMPLED."""
        there = [reward for reward in rewards if reward is not None]
        num, tokens = len(samples), sum(sample.num_own for sample in samples)
        with_turns = samples if self.episodes else ()
        sums = {
            "reward": (math.fsum(there), len(there)),
            "length": (tokens, num),
            "truncated": (sum(map(_is_cut, samples)), num),
            "staleness": (sum(self._staleness(sample) for sample in samples), tokens),
            "unjudged": (num - len(there), num),
            "uniform": (num_uniform, num // self.config.rl.group_size),
            "turns": (sum(sample.num_turns for sample in with_turns), len(with_turns)),
        }
        return torch.tensor([sums[name] for name in SAMPLED], dtype=torch.float32)

    def _staleness(self, sample: Sample) -> int:
        """Versions since each of the tokens that the model drew, summed."""
        own = [True] * len(sample.versions) if sample.is_own_N is None else sample.is_own_N.tolist()
        return sum(self.version - version for version, is_own in zip(sample.versions, own, strict=True) if is_own)

    def evaluate(self) -> float:
        """Judge one answer, the likeliest, to each of the same held-out prompts; there is no loss of these: nan."""
        data, num = self.data.val, min(self.config.train.eval_sequences, self.data.val.num_sequences)
        prompts = data.take(np.arange(self.comm.rank, num, self.comm.world)) if num else []
        samples = self.drawn(prompts, 0, 1, temperature=0.0) if prompts else []
        rewards = self.judge.rewards(prompts, samples) if prompts else []
        told = means_of(SAMPLED, self.comm.all_reduce(self._told(samples, rewards, 0)))
        for each in self.logs:
            each.validation(self.position, math.nan, {}, {name: told[name] for name in VALIDATED if name in told})
        return math.nan


def _is_cut(sample: Sample) -> bool:
    return sample.finish_reason == "length"


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
