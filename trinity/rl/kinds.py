"""The trainer of a run, as its data wants it."""

from trinity.config import Config
from trinity.train.trainer import Trainer


def trainer_kind(config: Config) -> type[Trainer]:
    """A Trainer, made as one is, whose `step` takes what comes next in the run's data."""
    if config.data.format in ("pairs", "labels"):
        from trinity.rl.preference_trainer import PreferenceTrainer

        return PreferenceTrainer
    return Trainer
