"""Rewards of answers, by the user's own functions, in processes beside this one.

Decisions: a function that raises, returns no finite number or takes too long costs its answer, which is left out and counted; a
process that is stuck is ended, and another started for the next answer.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trinity.config import RewardConfig
from trinity.errors import ConfigError
from trinity.utils.boxes import Boxes

log = logging.getLogger(__name__)
PROGRAM = "import sys; sys.path += sys.argv[1:]; from trinity.rl.reward_worker import main; main()"
START_S = 60.0  # to look a function up, once it was imported


class Rewards:
    """Asks the functions of `settings.rewards`. Processes start with the first answer, and end with this one."""

    def __init__(self, settings: RewardConfig):
        self.settings = settings
        self.weights = settings.reward_weights or (1.0,) * len(settings.rewards)
        command = [sys.executable, "-P", "-c", PROGRAM, *filter(None, sys.path)]
        greeting = json.dumps({"functions": settings.rewards}).encode()  # to import them takes no answer's time
        self._boxes = Boxes(
            settings.reward_processes, command, None, greeting
        )  # the user's program, in the user's environment
        self._threads = ThreadPoolExecutor(settings.reward_processes, "trinity-reward")  # they only wait

    def check(self) -> None:
        """Raise ConfigError where there is no function, or one that cannot be imported."""
        if not self.settings.rewards:
            raise ConfigError(
                "rl.rewards is empty; name a function of (answer, row): module:function, or file.py:function"
            )
        for spec in self.settings.rewards:
            said = self._asked({"functions": [spec]}, START_S)
            if isinstance(said, str):
                raise ConfigError(f"the reward function {spec} cannot be imported: {said}")

    def of(self, answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float | None]:
        """The weighted sum for each answer to the prompt of a row; None where there is none, which is said."""
        found = list(self._threads.map(self._one, answers, rows))
        failed = Counter(each for each in found if isinstance(each, str))
        for why, num in failed.items():
            log.warning("%d of %d answers have no reward and are left out: %s", num, len(answers), why)
        return [None if isinstance(each, str) else each for each in found]

    def _one(self, answer: str, row: dict[str, Any]) -> float | str:
        total = 0.0
        for spec, weight in zip(self.settings.rewards, self.weights, strict=True):
            said = self._asked({"function": spec, "answer": answer, "row": row}, self.settings.reward_timeout_s)
            if isinstance(said, str):
                return f"{spec}: {said}"
            total += weight * said
        return total

    def _asked(self, request: dict[str, Any], timeout_s: float) -> float | str:
        """The number, or why there is none."""
        reply = self._boxes.ask(json.dumps(request).encode(), timeout_s)
        if reply is None:
            return f"it ended its process, or took longer than {timeout_s:g} s"
        said = json.loads(reply)
        return str(said["error"]) if "error" in said else float(said.get("reward", 0.0))
