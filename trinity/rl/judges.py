"""Judges of answers: reward functions, by groups; or a teacher, token by token.

Legend: N tokens of an answer, T tokens of prompt and answer but the first.
Decisions. Of a group whose rewards are all alike nothing counts: it says nothing. A teacher's word (on-policy distillation) is
log p_teacher - log p of each token that the student drew: what lowers the divergence of the student from the teacher where the
student goes; no reward is asked, and no group compared.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from trinity.config import Config, EngineConfig
from trinity.data.prompts import Prompt
from trinity.errors import ConfigError
from trinity.llm import LLM
from trinity.rl.policy import Judged
from trinity.rl.policy_trainer import group_advantages
from trinity.rl.rewards import Rewards
from trinity.rl.rollout import Rollout, Sample
from trinity.text.tokenizer import Tokenizer


class Verdict(NamedTuple):
    """The answers with their advantages; how good each was, None where nobody could say; groups that say nothing."""

    judged: list[Judged]
    rewards: list[float | None]
    num_uniform: int = 0


class Judge(Protocol):
    def rewards(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[float | None]:
        """A number for the one sample of each prompt."""

    def verdict(self, prompts: Sequence[Prompt], samples: Sequence[Sample], group_size: int) -> Verdict:
        """Judge so many samples for each prompt, in the order of the prompts."""


class ByRewards:
    """Rewards against the mean of their group."""

    def __init__(self, config: Config):
        self.settings, self.functions = config.rl, Rewards(config.rl)

    def rewards(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[float | None]:
        return self.functions.of([sample.text for sample in samples], [prompt.row for prompt in prompts])

    def verdict(self, prompts: Sequence[Prompt], samples: Sequence[Sample], group_size: int) -> Verdict:
        rewards = self.rewards([prompt for prompt in prompts for _ in range(group_size)], samples)
        found, num_uniform = list[Judged](), 0
        for at in range(0, len(samples), group_size):
            group = rewards[at : at + group_size]
            advantages, is_uniform = _advantages(group, self.settings.scale_by_std)
            num_uniform += is_uniform
            pairs = zip(samples[at : at + group_size], group, advantages, strict=True)
            found += [
                Judged(sample, advantage, reward is not None and not is_uniform) for sample, reward, advantage in pairs
            ]
        return Verdict(found, rewards, num_uniform)


def _advantages(rewards: Sequence[float | None], scale_by_std: bool) -> tuple[list[float], bool]:
    """Advantages of a group, 0 where there is no reward; and whether the rewards are all alike."""
    there = [reward for reward in rewards if reward is not None]
    if len(set(there)) < 2:
        return [0.0] * len(rewards), True
    found = iter(group_advantages(there, len(there), scale_by_std))
    return [0.0 if reward is None else next(found) for reward in rewards], False


class ByEnvironment(ByRewards):
    """Rewards that the environment gave, against the mean of their group."""

    def __init__(self, config: Config):
        self.settings = config.rl

    def rewards(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[float | None]:
        return [sample.reward for sample in samples]


class ByTeacher:
    """The log-probabilities of `rl.teacher`, a checkpoint with the same tokenizer, held in this process."""

    def __init__(self, config: Config, engine: EngineConfig, tokenizer: Tokenizer, device: str):
        assert config.rl.teacher is not None
        self.teacher = frozen(config.rl.teacher, engine, device)
        if self.teacher.llm.tokenizer.to_json() != tokenizer.to_json():
            raise ConfigError(
                f"rl.teacher {config.rl.teacher} has another tokenizer than the model; a teacher shares it"
            )

    def rewards(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[float | None]:
        """Mean over an answer's tokens of log p_teacher - log p: minus an estimate of the divergence from the teacher."""
        return [float(gain_N.mean()) for gain_N in self._gains(samples)]

    def verdict(self, prompts: Sequence[Prompt], samples: Sequence[Sample], group_size: int) -> Verdict:
        gains = self._gains(samples)
        judged = [Judged(sample, gain_N) for sample, gain_N in zip(samples, gains, strict=True)]
        return Verdict(judged, [float(gain_N.mean()) for gain_N in gains])

    def _gains(self, samples: Sequence[Sample]) -> list[Tensor]:
        pairs = zip(samples, scores_of(self.teacher, samples), strict=True)
        return [score_T[len(sample.prompt_ids) - 1 :] - sample.logprobs_N for sample, score_T in pairs]


def frozen(source: str, engine: EngineConfig, device: str) -> Rollout:
    """A checkpoint's weights in this process, to score with."""
    return Rollout(LLM(source, engine=engine, device=device))


def scores_of(model: Rollout, samples: Sequence[Sample]) -> list[Tensor]:
    """logprobs_T of each sample's tokens but the first."""
    return [score.logprobs_T for score in model.score([sample.prompt_ids + sample.token_ids for sample in samples])]
