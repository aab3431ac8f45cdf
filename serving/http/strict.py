"""Rules for all requests: types are strict, unknown names are refused, and null is absent, however deep."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator

Refusals = Mapping[str, tuple[tuple[Any, ...], str]]  # field -> its neutral values, and why no other is taken


class Strict(BaseModel):
    """`IGNORES` and `REFUSES` are of one door, beside what all doors ignore and refuse (schema.py)."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    IGNORES: ClassVar[frozenset[str]] = frozenset()
    REFUSES: ClassVar[Refusals] = {}
    _ignored: frozenset[str] = PrivateAttr(default=frozenset())

    @property
    def ignored(self) -> frozenset[str]:
        """Names of the fields that came with this body and had no effect."""
        return self._ignored

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and None in fields.values():
            return {key: value for key, value in fields.items() if value is not None}
        return fields

    def compact(self) -> Self:
        """The same request with less in it."""
        return self
