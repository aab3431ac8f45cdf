"""Tasks of lm-eval: asked of weights as they train, and its findings as scores with chance and interval.

Decision: lm-eval gets a model of its own kind over an engine in this process, so that a run's exam needs no server;
log-probabilities are those of the training path, which on CPUs in float32 are a server's to the bit.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from trinity.config import TaskConfig
from trinity.engine.request import SamplingParams
from trinity.errors import ConfigError
from trinity.observability.scores import Score, of_right, of_values

if TYPE_CHECKING:
    from trinity.rl.rollout import Rollout

ACCURACY = "acc"  # lm-eval's name of whether the likeliest choice is right
INSTALL = "lm-eval is not installed here; pip install 'trinity-moe[eval]'"


def check_task(name: str, include_path: str | None = None) -> None:
    """Raise ConfigError where lm-eval is not installed or knows no such task."""
    if find_spec("lm_eval") is None:
        raise ConfigError(f"{name} is none of our own tasks, and {INSTALL}")
    if not _manager(include_path).match_tasks([name]):
        raise ConfigError(f"lm-eval knows no task {name}; see `lm-eval ls tasks`")


@functools.cache
def _manager(include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def measure(task: TaskConfig, rollout: "Rollout", include_path: str | None) -> list[Score]:
    """Scores of a task, or of each of a group's, asked of a rollout's weights."""
    from lm_eval import simple_evaluate

    settings = {
        "num_fewshot": task.num_fewshot,
        "limit": task.questions,
        "random_seed": task.seed,
        "verbosity": "ERROR",
    }
    manager = _manager(include_path)
    found = simple_evaluate(
        model=_model(rollout), tasks=[task.task], task_manager=manager, log_samples=True, **settings
    )
    return list(scores_of(found or {}, task.at_least))


def scores_of(results: Mapping[str, Any], at_least: float | None = None) -> Iterator[Score]:
    """Scores of each task that was asked. Of choices, somebody who guesses has one in so many right. Raises ConfigError for a
    gate on what is better when it is lower."""
    for task, samples in results.get("samples", {}).items():
        metric = ACCURACY if all(ACCURACY in sample for sample in samples) else samples[0]["metrics"][0]
        if at_least is not None and not results["higher_is_better"][task].get(metric, True):
            raise ConfigError(f"{task} has a gate, at_least {at_least:g}; its {metric} is the better the lower it is")
        if metric == ACCURACY:
            chance = sum(1 / max(1, len(sample["resps"])) for sample in samples) / len(samples)
            yield of_right(task, round(sum(sample[ACCURACY] for sample in samples)), len(samples), chance, at_least)
        elif isinstance(
            samples[0][metric], tuple
        ):  # (sum, weight) of each text, which lm-eval puts together in its own way
            mean = float(results["results"][task][f"{metric},none"])
            yield Score(f"{task}, {metric}", mean, math.nan, math.nan, len(samples))
        else:
            yield of_values(f"{task}, {metric}", [float(sample[metric]) for sample in samples], at_least)


def _model(rollout: "Rollout") -> Any:
    """A model of lm-eval's over these weights."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class OverRollout(TemplateLM):  # type: ignore[misc]  # the base is known where lm-eval is installed
        """Requests of lm-eval, answered by a rollout."""

        tokenizer = rollout.llm.tokenizer
        max_length = rollout.llm.engine.max_model_len - 1
        eot_token_id = tokenizer.eos_id
        prefix_token_id = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return self.tokenizer.encode(string, add_special=bool(add_special_tokens))

        def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            asked = [(context or [self.prefix_token_id], ending) for _, context, ending in requests]
            sequences = [[*context, *ending][-self.max_length - 1 :] for context, ending in asked]
            found = zip(rollout.score(sequences, top=1), asked, strict=True)
            return [
                (
                    float(score.logprobs_T[-len(ending) :].sum()),
                    score.top_ids_TC[-len(ending) :, 0].tolist() == list(ending),
                )
                for score, (_, ending) in found
            ]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return [self._rolling(request.args[0]) for request in requests]

        def _rolling(self, text: str) -> float:
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            return sum(value for value, _ in self._loglikelihood_tokens(parts))

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            prompts = [self._cut(context, wanted) for context, wanted in (request.args for request in requests)]
            params = [_params(request.args[1]) for request in requests]
            return [done.text for done in rollout.llm.generate(prompts, params)]

        def _cut(self, context: str, wanted: Mapping[str, Any]) -> list[int]:
            """The end of a prompt that is too long."""
            return self.tok_encode(context, add_special_tokens=True)[-(self.max_length - _max_tokens(wanted)) :]

    return OverRollout()


def _max_tokens(wanted: Mapping[str, Any]) -> int:
    return int(wanted.get("max_gen_toks") or 256)


def _params(wanted: Mapping[str, Any]) -> SamplingParams:
    until = wanted.get("until") or []
    stop = tuple([until] if isinstance(until, str) else until)
    temperature = float(wanted.get("temperature") or 0.0) if wanted.get("do_sample") else 0.0
    return SamplingParams(max_tokens=_max_tokens(wanted), temperature=temperature, stop=stop)
