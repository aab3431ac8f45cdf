"""Sources of a mixture: what each is, and how much of the tokens is its."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from trinity.config.yaml import Frozen

Format = Literal["text", "chats"]
TrainOn = Literal["answers", "last"]
Packing = Literal["stream", "rsdb", "best_fit"]
NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}"
OF_DATA = (
    "train",
    "val",
    "format",
    "train_on",
    "packing",
    "rsdb_documents",
    "text_field",
    "max_documents",
    "length_bias",
)


class LengthBias(Frozen):
    """Long documents more often than they are there: their tokens have that share of the source's."""

    tokens: int = Field(ge=2, description="a document with so many is long")
    share: float = Field(gt=0, lt=1, description="of the source's tokens that long documents have")


class SourceConfig(Frozen):
    """One source of `data.sources`: its files, its share of the tokens, and what of `data` is other for it."""

    name: str | None = Field(default=None, description="in logs and refusals; default: that of its first path")
    train: tuple[str, ...] = Field(min_length=1)
    val: tuple[str, ...] = ()
    weight: float = Field(default=1.0, ge=0, description="its share of the tokens is this over the sum of all sources'")
    epochs: float | None = Field(default=None, gt=0, description="so often may the run read it; default: any number")
    format: Format | None = None
    train_on: TrainOn | None = None
    packing: Packing | None = None
    rsdb_documents: int | None = Field(default=None, ge=1)
    text_field: str | None = None
    max_documents: int | None = Field(default=None, ge=1)
    length_bias: LengthBias | None = None

    @field_validator("train", "val", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(NAME, value):
            raise ValueError("a source's name has 1 to 64 letters, digits, dots, dashes and lines")
        return value

    @property
    def label(self) -> str:
        """Its name, else what its first path is called: the last part of it without a pattern, without its ends."""
        parts = [part for part in re.split(r"[/:]+", self.train[0]) if part and not re.search(r"[*?\[]", part)]
        found = re.sub(r"[^A-Za-z0-9_-]+", "-", parts[-1].lstrip(".").partition(".")[0]) if parts else ""
        return self.name or found.strip("-")[:64] or "source"

    @property
    def own(self) -> dict[str, Any]:
        """The settings of `data` that it has a word of its own for, its files among them."""
        found = {name: getattr(self, name) for name in OF_DATA}
        return {name: value for name, value in found.items() if value is not None}
