"""An environment that answers the model: a function of the user's own (functions.py), asked after each of the model's answers.

    def environment(messages, row):  # what was said since the prompt of that row, the model's answer last
        return 1.0                                    # the end, and what the conversation is worth
        return "lower"                                # the user's next message; or one or several with their roles
        return {"role": "tool", "content": "7"}, 0.5  # the same, and what the conversation is worth if it is cut off here

Decision: it keeps nothing between two calls, which may come in any process and twice: all that it needs is in what it is told.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from trinity.config import RLConfig
from trinity.rl.functions import Functions

Message = dict[str, Any]


class Turn(NamedTuple):
    """Messages that come next, none at the end; and what the conversation is worth so far."""

    messages: list[Message]
    reward: float


class Environment:
    """Asks the function of `settings.environment`."""

    def __init__(self, settings: RLConfig):
        assert settings.environment is not None
        self._functions = Functions((settings.environment,), settings)

    def check(self) -> None:
        """Raise ConfigError where it cannot be imported."""
        self._functions.check("environment")

    def turns(self, asked: Sequence[tuple[list[Message], dict[str, Any]]]) -> list[Turn | None]:
        """The turn of each conversation about a row; None where there is none, which is said."""
        return self._functions.of_each(self._one, asked)

    def _one(self, asked: tuple[list[Message], dict[str, Any]]) -> Turn | str:
        [spec], (messages, row) = self._functions.specs, asked
        said = self._functions.asked({"function": spec, "messages": messages, "row": row})
        return f"{spec}: {said}" if isinstance(said, str) else Turn(said["next"], said["reward"])
