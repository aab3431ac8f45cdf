"""Rules for all requests: types are strict, unknown names are refused, and null is absent, however deep."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and None in fields.values():
            return {key: value for key, value in fields.items() if value is not None}
        return fields

    def compact(self) -> Self:
        """The same request with less in it."""
        return self
