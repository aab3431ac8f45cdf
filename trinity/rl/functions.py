"""The user's own functions, rewards and environments, asked in processes beside this one.

Decisions: a function that raises, says what it may not or takes too long fails for what it was asked about, and for nothing
else; a process that is stuck is ended, and another started for the next question.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from trinity.config import RewardConfig
from trinity.errors import ConfigError
from trinity.utils.boxes import Boxes

log = logging.getLogger(__name__)
PROGRAM = "import sys; sys.path += sys.argv[1:]; from trinity.rl.reward_worker import main; main()"
START_S = 60.0  # to look a function up, once it was imported
A = TypeVar("A")
T = TypeVar("T")


class Functions:
    """Functions by their import paths. Processes start with the first question, and end with this one."""

    def __init__(self, specs: Sequence[str], settings: RewardConfig):
        self.specs, self.timeout_s = tuple(specs), settings.reward_timeout_s
        command = [sys.executable, "-P", "-c", PROGRAM, *filter(None, sys.path)]
        greeting = json.dumps({"functions": self.specs}).encode()  # to import them takes no question's time
        self._boxes = Boxes(
            settings.reward_processes, command, None, greeting
        )  # the user's program, in the user's environment
        self._threads = ThreadPoolExecutor(settings.reward_processes, "trinity-reward")  # they only wait

    def check(self, what: str) -> None:
        """Raise ConfigError for one that cannot be imported."""
        for spec in self.specs:
            said = self.asked({"functions": [spec]}, START_S)
            if isinstance(said, str):
                raise ConfigError(f"the {what} {spec} cannot be imported: {said}")

    def asked(self, request: dict[str, Any], timeout_s: float | None = None) -> dict[str, Any] | str:
        """The reply, or why there is none."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        reply = self._boxes.ask(json.dumps(request).encode(), timeout_s)
        if reply is None:
            return f"it ended its process, or took longer than {timeout_s:g} s"
        said: dict[str, Any] = json.loads(reply)
        return str(said["error"]) if "error" in said else said

    def of_each(self, what: Callable[[A], T | str], asked: Sequence[A]) -> list[T | None]:
        """Results for each, side by side; None where it is words on why there is none, which are said."""
        found = list(self._threads.map(what, asked))
        for why, num in Counter(each for each in found if isinstance(each, str)).items():
            log.warning("%d of %d answers have no reward and are left out: %s", num, len(asked), why)
        return [None if isinstance(each, str) else each for each in found]
