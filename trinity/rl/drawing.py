"""Answers to prompts, drawn from some weights and judged: what a step on rewards learns from, and what is told of it.

Decision: the seed of an answer depends on the run's seed and its place among all of the run's answers, so that the same weights
give the same answers, whoever draws them and however often.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trinity.config import Config
from trinity.data.prompts import Prompt
from trinity.engine.request import SamplingParams
from trinity.rl.episodes import Episodes
from trinity.rl.judges import Judge, Verdict, scores_of
from trinity.rl.policy import SAMPLED, Judged
from trinity.rl.rollout import Rollout, Sample
from trinity.train.retry import RETRYABLE
from trinity.utils.deadline import Deadline

log = logging.getLogger(__name__)
PAUSE_S = 0.2  # before answers are drawn again
TURNS_APART = 500_000_003  # seeds of a conversation's answers
PRIORITY = 100  # behind whoever waits for an answer


class Drawing:
    """Draws by the rollout that `make` gives, and has the answers judged. One thread's at a time.

    `lasting`: errors after which nobody tries again.
    """

    def __init__(
        self,
        config: Config,
        make: Callable[[], Rollout],
        judge: Judge,
        reference: Rollout | None = None,
        episodes: Episodes | None = None,
        lasting: type[Exception] | tuple[type[Exception], ...] = (),
    ):
        self.config, self.judge, self.reference, self.episodes = config, judge, reference, episodes
        self._make, self._lasting, self.rollout = make, lasting, make()

    def drawn(self, prompts: Sequence[Prompt], first: int, num: int | None = None, **how: Any) -> list[Sample]:
        """`num` answers to each prompt, rl.group_size unless told otherwise; `first`: the place of the first. What dies
        meanwhile is waited for."""
        group, deadline = num or self.config.rl.group_size, Deadline(self.config.placement.recover_timeout_s)
        while True:
            try:
                return self._answers(prompts, first, group, how)
            except RETRYABLE as error:
                if deadline.expired or isinstance(error, self._lasting):
                    raise
                log.warning("answers are drawn again: %s", error)
            time.sleep(PAUSE_S)
            self.rollout = self._make()  # the old engine may hold half a pass

    def verdict(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> Verdict:
        """Judge these answers, rl.group_size to each prompt: with scores of the reference, where there is one, and without
        those that were cut off, where they do not count."""
        settings = self.config.rl
        found = self.judge.verdict(prompts, samples, settings.group_size)
        references = scores_of(self.reference, samples) if self.reference else [None] * len(samples)
        judged = [
            each._replace(
                counts=each.counts and not (settings.mask_truncated and is_cut(each.sample)), reference_T=score
            )
            for each, score in zip(found.judged, references, strict=True)
        ]
        return found._replace(judged=judged)

    def _answers(self, prompts: Sequence[Prompt], first: int, group: int, how: dict[str, Any]) -> list[Sample]:
        repeated = [prompt for prompt in prompts for _ in range(group)]

        def params(number: int, turn: int, num_ids: int) -> SamplingParams:
            return self.params(first + number, turn, num_ids, how)

        if self.episodes is not None:
            return self.episodes.play(self.rollout, repeated, params)
        each = [params(number, 0, len(prompt.ids)) for number, prompt in enumerate(repeated)]
        return self.rollout.generate([prompt.ids for prompt in repeated], each)

    def params(self, place: int, turn: int, num_ids: int, how: dict[str, Any]) -> SamplingParams:
        """Parameters of the answer after so many tokens."""
        seed = (self.config.train.seed * 1_000_003 + place + turn * TURNS_APART) % 2**31
        length = min(self.config.rl.max_tokens, self.config.train.seq_len + 1 - num_ids)
        return SamplingParams(max_tokens=length, seed=seed, priority=PRIORITY, **how)


def told(verdict: Verdict, version: int, config: Config) -> Tensor:
    """float32 [M, 2]: sum and number of SAMPLED, where the weights are of that version."""
    samples = [each.sample for each in verdict.judged]
    there = [reward for reward in verdict.rewards if reward is not None]
    num, tokens = len(samples), sum(sample.num_own for sample in samples)
    ages = [version - each for sample in samples for each in _own_versions(sample)]
    with_turns = samples if config.rl.environment else ()
    sums = {
        "reward": (math.fsum(there), len(there)),
        "length": (tokens, num),
        "truncated": (sum(map(is_cut, samples)), num),
        "staleness": (sum(ages), tokens),
        "staleness_max": (max(ages, default=0), 1),  # of this worker's; all draw from the same versions
        "unjudged": (num - len(there), num),
        "uniform": (verdict.num_uniform, num // config.rl.group_size),
        "turns": (sum(sample.num_turns for sample in with_turns), len(with_turns)),
    }
    return torch.tensor([sums[name] for name in SAMPLED], dtype=torch.float32)


def unjudged(samples: Sequence[Sample], rewards: Sequence[float | None]) -> Verdict:
    """The verdict on answers that nobody learns from."""
    return Verdict([Judged(sample, 0.0) for sample in samples], list(rewards))


def is_cut(sample: Sample) -> bool:
    return sample.finish_reason == "length"


def _own_versions(sample: Sample) -> list[int]:
    """Versions of the weights that gave each of the tokens which the model drew."""
    own = [True] * len(sample.versions) if sample.is_own_N is None else sample.is_own_N.tolist()
    return [version for version, is_own in zip(sample.versions, own, strict=True) if is_own]
