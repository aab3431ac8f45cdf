"""The settings of tracking: who is told how a training run goes, besides its own log."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from trinity.config.yaml import Frozen

Label = Annotated[str, Field(min_length=1, max_length=64)]


class TrackConfig(Frozen):
    """Trackers of a run. Keys and addresses of their servers are the libraries' own settings, and none of ours."""

    to: tuple[Literal["trackio", "wandb", "mlflow", "jsonl"], ...] = Field(
        default=(), description="who is told of steps, validations, stages and exports"
    )
    project: str = Field(default="trinity", min_length=1, max_length=128)
    name: str | None = Field(
        default=None, min_length=1, max_length=128, description="of the run; default: that of its folder"
    )
    tags: tuple[Label, ...] = ()

    @field_validator("to", "tags", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("to")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"a tracker is named twice in {', '.join(value)}; name each once")
        return value
