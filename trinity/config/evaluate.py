"""The settings of evaluation while a run trains: tasks, when they are asked, and the bounds that its weights must reach."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from trinity.config.objective import RewardConfig
from trinity.config.yaml import Frozen, at_home


class TaskConfig(RewardConfig):
    """One task: `niah`, a task of lm-eval by its name, or, with `rewards`, answers to `prompts` that they judge."""

    task: str = Field(min_length=1)
    lengths: tuple[int, ...] = Field(default=(), description="of niah: tokens of a question; default: train.seq_len")
    questions: int = Field(default=64, ge=1, le=100_000, description="of each length of niah; of other tasks, at most")
    keys: int = Field(
        default=1024, ge=4, le=4096, description="of niah: that there are; lines of one question are fewer"
    )
    seed: int = 0
    prompts: tuple[str, ...] = Field(
        default=(), description="with rewards: files of prompts, as data.format prompts has them"
    )
    max_tokens: int = Field(default=256, ge=1, description="with rewards: of an answer")
    temperature: float = Field(
        default=0.0, ge=0, le=100, description="with rewards: 0 is the likeliest answer; else seed says which"
    )
    num_fewshot: int | None = Field(default=None, ge=0, description="of a task of lm-eval; default: its own")
    at_least: float | None = Field(
        default=None, description="gate: weights that score less are not served, and their stage is not exported"
    )

    @field_validator("lengths", "prompts", mode="before")
    @classmethod
    def _one_stands_alone(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | str) else value

    @model_validator(mode="after")
    def _check(self) -> "TaskConfig":
        if self.lengths and self.task != "niah":
            raise ValueError(f"task {self.task!r} has lengths; only niah has them")
        if bool(self.rewards) != bool(self.prompts):
            raise ValueError(
                f"task {self.task!r} has rewards or prompts alone; rewards judge answers to prompts: give both"
            )
        if self.rewards and self.task == "niah":
            raise ValueError("niah has an answer of its own; call the task of these rewards otherwise")
        if any(length < 32 for length in self.lengths):
            raise ValueError(f"niah has lengths {self.lengths}; a question takes 32 tokens or more")
        return self


class EvaluateConfig(Frozen):
    """Tasks that the weights of a run are asked while it trains, by the engine that would serve them."""

    tasks: tuple[TaskConfig, ...] = ()
    every: int = Field(default=0, ge=0, description="steps; 0: only at the end")
    include_path: str | None = Field(default=None, description="a folder with tasks for lm-eval (YAML)")
    at_start: bool = Field(default=False, description="ask before the first step, too")

    _at_home = field_validator("include_path")(at_home)

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        names = [task.task for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluate.tasks names a task twice: {', '.join(names)}; niah takes several lengths")
        return self
