"""Tasks that rewards score: a model answers prompts, and functions of the kind that `trinity rl` learns from judge the answers.

Decisions: an answer that nobody could judge is left out of the mean, counted and said, as in a run on rewards. Prompts are the
first of their files, so that all versions of a run answer the same.
"""

from itertools import islice

from trinity.config import TaskConfig
from trinity.data.prompts import IdsOf, prompts_of
from trinity.errors import ConfigError
from trinity.evaluate.asking import Ask, Wanted
from trinity.observability.scores import Score, of_rewards
from trinity.rl.rewards import Rewards


class RewardTask:
    """One such task with its prompts in memory. Raises DataError for a file or a row without any."""

    def __init__(self, settings: TaskConfig, ids_of: IdsOf):
        self.settings, self._rewards = settings, Rewards(settings)
        self.prompts = list(islice(prompts_of(settings.prompts, ids_of), settings.questions))

    @property
    def length(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(len(prompt.ids) for prompt in self.prompts) + self.settings.max_tokens

    def check(self, most: int) -> None:
        """Raise ConfigError for no prompt, or one that leaves too little of so many tokens for its answer."""
        if not self.prompts:
            raise ConfigError(f"task {self.settings.task} has no prompt in {', '.join(self.settings.prompts)}")
        if self.length > most:
            raise ConfigError(
                f"task {self.settings.task} takes {self.length:,} tokens, {self.settings.max_tokens:,} of them for the answer "
                f"(max_tokens); the model takes {most:,}: fewer, or shorter prompts"
            )

    def score(self, ask: Ask) -> Score:
        """The mean reward of its answers."""
        settings = self.settings
        ids = [prompt.ids for prompt in self.prompts]
        texts = ask(Wanted(ids, settings.max_tokens, temperature=settings.temperature, seed=settings.seed))
        rewards = self._rewards.of(texts, [prompt.row for prompt in self.prompts])
        return of_rewards(settings.task, rewards, settings.at_least)
