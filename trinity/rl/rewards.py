"""Rewards of answers, by the user's own functions (functions.py): one that fails costs its answer, which is left out."""

from collections.abc import Sequence
from typing import Any

from trinity.config import RewardConfig
from trinity.errors import ConfigError
from trinity.rl.functions import Functions


class Rewards:
    """Asks the functions of `settings.rewards`."""

    def __init__(self, settings: RewardConfig):
        self.weights = settings.reward_weights or (1.0,) * len(settings.rewards)
        self._functions = Functions(settings.rewards, settings)

    def check(self) -> None:
        """Raise ConfigError where there is no function, or one that cannot be imported."""
        if not self._functions.specs:
            raise ConfigError(
                "rl.rewards is empty; name a function of (answer, row): module:function, or file.py:function"
            )
        self._functions.check("reward function")

    def of(self, answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float | None]:
        """The weighted sum for each answer to the prompt of a row; None where there is none, which is said."""
        return self._functions.of_each(self._one, list(zip(answers, rows, strict=True)))

    def _one(self, asked: tuple[str, dict[str, Any]]) -> float | str:
        total, (answer, row) = 0.0, asked
        for spec, weight in zip(self._functions.specs, self.weights, strict=True):
            said = self._functions.asked({"function": spec, "answer": answer, "row": row})
            if isinstance(said, str):
                return f"{spec}: {said}"
            total += weight * said["reward"]
        return total
