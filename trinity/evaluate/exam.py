"""The exam of a run: its tasks, asked of the weights that it trains, by the engine that would serve them.

Decision: the engine computes with the trainer's own tensors and the same shards, so that what is asked is what would be served.
It is made with the first exam, with a cache for the longest question, and kept.
"""

import functools
from typing import TYPE_CHECKING

from trinity.config import Config, EngineConfig, TaskConfig
from trinity.data.prompts import prompt_ids
from trinity.engine.memory import memory_of, plan_memory
from trinity.engine.request import SamplingParams
from trinity.evaluate import lm_eval
from trinity.evaluate.asking import Wanted
from trinity.evaluate.rewarded import RewardTask
from trinity.evaluate.tasks import OWN, longest, measure
from trinity.observability.scores import Score
from trinity.rl.rollout import Rollout
from trinity.train.exam import Exam, NoExam, Row

if TYPE_CHECKING:
    from trinity.train.trainer import Trainer

SIDE_BY_SIDE = 16  # questions in one batch of the engine


class RunExam:
    """An Exam (trinity/train/exam.py) of a trainer's weights. Raises ConfigError for prompts that leave no room for answers."""

    def __init__(self, trainer: "Trainer"):
        self._trainer, self._config = trainer, trainer.config
        tasks = self._config.evaluate.tasks
        self.has_gates = any(task.at_least is not None for task in tasks)
        ids_of = functools.partial(prompt_ids, trainer.data.tokenizer)
        self._rewarded = {task.task: RewardTask(task, ids_of) for task in tasks if task.rewards}
        for each in self._rewarded.values():
            each.check(self._config.model.max_position_embeddings)

    def is_due(self, position: int) -> bool:
        """Say whether it is after so many steps."""
        settings = self._config.evaluate
        if position in (0, self._config.train.steps):
            return position > 0 or settings.at_start
        return bool(settings.every) and position % settings.every == 0

    def ask(self) -> list[Row]:
        """Ask the weights as they are. Raises what an engine does."""
        return [score.row() for task in self._config.evaluate.tasks for score in self._scores(task)]

    def _scores(self, task: TaskConfig) -> list[Score]:
        if task.task in self._rewarded:
            return [self._rewarded[task.task].score(self._texts)]
        if task.task in OWN:
            return measure(task, self._texts, self._num_tokens, self._config.train.seq_len)
        return lm_eval.measure(task, self._rollout, self._config.evaluate.include_path)

    def _num_tokens(self, prompt: str) -> int:
        return len(self._trainer.data.tokenizer.encode(prompt, add_special=True))

    def _texts(self, wanted: Wanted) -> list[str]:
        stop = () if wanted.stop is None else (wanted.stop,)
        params = SamplingParams(max_tokens=wanted.max_tokens, stop=stop, temperature=wanted.temperature)
        each = [params.model_copy(update={"seed": wanted.seed + at}) for at in range(len(wanted.prompts))]
        return [done.text for done in self._rollout.llm.generate(list(wanted.prompts), each)]  # type: ignore[arg-type]

    @functools.cached_property
    def _rollout(self) -> Rollout:
        lengths = [each.length for each in self._rewarded.values()]
        return Rollout.following(self._trainer, engine_for(self._config, str(self._trainer.device), max([0, *lengths])))


def engine_for(config: Config, device: str, longest_rewarded: int = 0) -> EngineConfig:
    """The run's engine, no larger than its tasks need: lm-eval's may be as long as the model reaches."""
    tasks, length = config.evaluate.tasks, config.model.max_position_embeddings
    if all(task.task in OWN or task.rewards for task in tasks):
        length = max(longest(tasks, config.train.seq_len), longest_rewarded)
    wanted = config.engine.model_copy(update={"max_model_len": length, "max_num_seqs": SIDE_BY_SIDE, "kv_max_age": 0})
    return plan_memory(config.model, wanted, config.model.itemsize, memory_of(device)).fixed(wanted)


def exam_of(trainer: "Trainer") -> Exam:
    """The exam that the trainer's settings ask for."""
    return RunExam(trainer) if trainer.config.evaluate.tasks else NoExam()
