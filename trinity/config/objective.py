"""The settings of what is learned from: preferences, rewards, a teacher."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from trinity.config.yaml import Frozen, at_home


class PreferenceConfig(Frozen):
    """Settings of learning from answers, with data.format pairs or labels (formulas: trinity/rl/preferences.py)."""

    beta: float = Field(default=0.1, gt=0, description="how far the model may go from the weights that it begins with")
    nll: float = Field(default=0.0, ge=0, description="share of the preferred answers' own loss, of pairs")
    length_normalized: bool = Field(
        default=False, description="compare means over an answer's tokens, not sums; with a beta of about 5"
    )
    reference: bool = Field(
        default=True, description="of pairs; false: none, as SimPO has it, with length_normalized and a margin"
    )
    margin: float = Field(default=0.0, ge=0, description="by which the preferred answer's reward is to lead, of pairs")
    desirable_weight: float = Field(default=1.0, gt=0, description="of wanted answers, with labels")
    undesirable_weight: float = Field(default=1.0, gt=0, description="of unwanted ones")


class DistillConfig(Frozen):
    """Settings of learning from a teacher, with data.format text or chats (formulas: trinity/rl/distillation.py)."""

    teacher: str | None = Field(default=None, description="a checkpoint with the same tokenizer; default: no teacher")
    top_k: int = Field(
        default=64, ge=1, description="of its most likely tokens in each place; the others are one bucket"
    )
    ce: float = Field(default=0.0, ge=0, description="share of the usual cross-entropy besides")

    _at_home = field_validator("teacher")(at_home)


class RewardConfig(Frozen):
    """Reward functions, and what they may take."""

    rewards: tuple[str, ...] = Field(
        default=(), description="functions of (answer, row): module:function, or file.py:function; their sum counts"
    )
    reward_weights: tuple[float, ...] = Field(default=(), description="of each in that sum; default: 1")
    reward_timeout_s: float = Field(
        default=10.0, gt=0, description="of one call; an answer that takes longer is left out"
    )
    reward_processes: int = Field(default=2, ge=1, description="beside each training worker")

    @field_validator("rewards", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("rewards")
    @classmethod
    def _found_from_anywhere(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """A file is named by its whole path, since workers run elsewhere."""
        return tuple(_whole(each) for each in value)

    @model_validator(mode="after")
    def _check_weights(self) -> "RewardConfig":
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"{len(self.reward_weights)} reward_weights for {len(self.rewards)} rewards; give one for each"
            )
        return self


class RLConfig(RewardConfig):
    """Settings of learning from rewards, with data.format prompts (formulas: trinity/rl/policy.py)."""

    teacher: str | None = Field(
        default=None, description="a checkpoint that judges every token, instead of rewards (on-policy distillation)"
    )
    environment: str | None = Field(
        default=None,
        description="instead of rewards: a function of (messages, row) that goes on with the conversation, or ends it",
    )
    max_turns: int = Field(default=8, ge=1, description="answers of the model in a conversation with the environment")
    group_size: int = Field(
        default=8, ge=2, description="answers to one prompt; train.global_batch_size is a multiple of it"
    )
    max_staleness: int = Field(
        default=0, ge=0, le=64, description="steps by which answers are drawn ahead, beside training; 0: between steps"
    )
    max_tokens: int = Field(default=256, ge=1, description="of an answer, within train.seq_len with its prompt")
    scale_by_std: bool = Field(default=True, description="advantages over their group's deviation; false: Dr. GRPO")
    divisor: Literal["tokens", "constant", "answers"] = Field(
        default="tokens",
        description="of the loss: tokens that count in the step (DAPO), train.global_batch_size x max_tokens (Dr. GRPO), or "
        "each answer's own tokens and their number (GRPO, GSPO)",
    )
    ratio: Literal["token", "sequence"] = Field(
        default="token", description="to the weights that drew it, of each token or of the whole answer (GSPO)"
    )
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.28, gt=0)
    correction: Literal["clip", "tis", "icepop"] = Field(
        default="clip", description="of weights that are not the sampler's: PPO's ratio, or a factor min(ratio, tis_cap), or "
        "the ratio within icepop_band and 0 outside"
    )  # fmt: skip
    tis_cap: float = Field(default=2.0, gt=0)
    icepop_band: tuple[float, float] = (0.2, 5.0)
    kl: float = Field(
        default=0.0, ge=0, description="coefficient of the divergence from train.init_from, which is held a second time"
    )
    kl_unbiased: bool = Field(
        default=False, description="weigh the divergence by the ratio to the sampler, so that its gradient is unbiased"
    )
    mask_truncated: bool = Field(default=True, description="answers that max_tokens cut off do not count")
    replay: bool = Field(default=False, description="send tokens to the experts that sampling chose")

    _at_home = field_validator("teacher")(at_home)

    @field_validator("environment")
    @classmethod
    def _one_found_from_anywhere(cls, value: str | None) -> str | None:
        return value and _whole(value)

    @model_validator(mode="after")
    def _check(self) -> "RLConfig":
        if bool(self.rewards) + (self.teacher is not None) + (self.environment is not None) > 1:
            raise ValueError("rewards, a teacher and an environment each judge; give one of them")
        low, high = self.icepop_band
        if not 0 < low < 1 < high:
            raise ValueError(f"icepop_band {low} to {high} does not have 1 inside; the usual one is 0.2 to 5")
        return self


def _whole(spec: str) -> str:
    where, separator, name = spec.rpartition(":")
    if not separator or not where or not name.isidentifier():
        raise ValueError(f"{spec!r} names no function; write module:function, or file.py:function")
    return f"{Path(at_home(where)).resolve()}:{name}" if where.endswith(".py") else spec
