"""The trainer of a run, as its data wants it."""

from typing import TYPE_CHECKING

from trinity.config import Config

if TYPE_CHECKING:
    from trinity.train.trainer import Trainer


def trainer_kind(config: Config) -> "type[Trainer]":
    """A Trainer, made as one is, whose `step` takes what comes next in the run's data."""
    if config.distill.teacher is not None:
        from trinity.rl.distillation import DistillationTrainer

        return DistillationTrainer
    if config.data.format in ("pairs", "labels"):
        from trinity.rl.preference_trainer import PreferenceTrainer

        return PreferenceTrainer
    if config.data.format == "prompts":
        from trinity.rl.reward_trainer import RewardTrainer

        return RewardTrainer
    from trinity.train.trainer import Trainer

    return Trainer


def check(config: Config) -> None:
    """Raise the ConfigError of a run that could not take a step, before anything is started for it."""
    if config.distill.teacher is not None:
        from trinity.rl import distillation

        distillation.check(config)
    if config.data.format in ("pairs", "labels"):
        from trinity.rl import preference_trainer

        preference_trainer.check(config)
    if config.data.format == "prompts":
        from trinity.rl import reward_trainer

        reward_trainer.check(config)
