"""Tasks, asked of whoever completes prompts: an engine in this process, or a server.

Decision: the one seam is `Ask` (asking.py). Our own tasks need nothing else; those of lm-eval go to lm-eval, and tasks with
rewards know their prompts (rewarded.py).
"""

from collections.abc import Sequence

from trinity.config import EvaluateConfig, TaskConfig
from trinity.data.documents import files
from trinity.errors import ConfigError
from trinity.evaluate import lm_eval, niah
from trinity.evaluate.asking import Ask, Wanted
from trinity.evaluate.niah import Count
from trinity.observability.scores import Score, of_right
from trinity.rl.rewards import Rewards

OWN = ("niah",)


def measure(task: TaskConfig, ask: Ask, count: Count, usual_length: int) -> list[Score]:
    """Scores of one of our own tasks, one for each length. Raises ConfigError for a length that is no question's."""
    return [_needles(task, length, ask, count) for length in task.lengths or (usual_length,)]


def _needles(task: TaskConfig, length: int, ask: Ask, count: Count) -> Score:
    asked = niah.questions(task.questions, length, count, task.seed, task.keys)
    texts = ask(Wanted([question.prompt for question in asked], niah.MAX_TOKENS, "\n"))
    num_right = sum(niah.is_right(*pair) for pair in zip(asked, texts, strict=True))
    return of_right(f"niah, {length:,} tokens", num_right, len(asked), niah.CHANCE, task.at_least)


def longest(tasks: Sequence[TaskConfig], usual_length: int) -> int:
    """Tokens of the longest question of our own tasks."""
    return max((length for task in tasks if task.task in OWN for length in task.lengths or (usual_length,)), default=0)


def check(settings: EvaluateConfig, usual_length: int, max_length: int) -> None:
    """Raise ConfigError for a task that nobody knows, a reward that cannot be asked, or a question longer than the model
    reaches, and DataError where there are no prompts."""
    for task in settings.tasks:
        if task.rewards:
            Rewards(task).check()
            for pattern in task.prompts:
                files(pattern)
        elif task.task not in OWN:
            lm_eval.check_task(task.task, settings.include_path)
    if settings.tasks and (length := longest(settings.tasks, usual_length)) > max_length:
        raise ConfigError(
            f"evaluate.tasks asks niah of {length:,} tokens; model.max_position_embeddings is {max_length:,}: shorter "
            "lengths, or more positions"
        )
