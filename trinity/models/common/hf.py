"""Shared parts of reading a Hugging Face `config.json`: fixed values, rotary settings, types, token ids."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from trinity.config import ModelConfig
from trinity.errors import CheckpointError

C = TypeVar("C", bound=ModelConfig)
TOKENS = ("bos_token_id", "pad_token_id")
ROPE_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


def refuse_others(tree: Mapping[str, Any], fixed: Mapping[str, Any], source: str | Path) -> None:
    """Raise CheckpointError for a field that has another value than the one that is implemented."""
    for key, wanted in fixed.items():
        if tree.get(key, wanted) not in (wanted, None):
            raise CheckpointError(f"{source}/config.json: {key} is {tree[key]!r}; only {wanted!r} is implemented")


def rope(tree: Mapping[str, Any], source: str | Path, family: str) -> dict[str, Any]:
    """The plain rotary settings, wherever they stand. Raises CheckpointError for any other kind of rotary embedding."""
    found = tree.get("rope_parameters") or tree.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{source}/config.json: rope_parameters is {found!r}, not an object")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{source}/config.json: rope type {kind!r} is not implemented; {family} uses plain RoPE")
    if unknown := sorted(set(found) - ROPE_KEYS):
        raise CheckpointError(f"{source}/config.json: rope_parameters has {unknown[0]!r}, which is not implemented")
    return {"rope_theta": found.get("rope_theta") or tree.get("rope_theta") or 10000.0}


def eos(tree: Mapping[str, Any]) -> Any:
    """The ids that end a text: one, or several."""
    value = tree.get("eos_token_id")
    if not isinstance(value, list):
        return value
    return tuple(value) if len(value) > 1 else value[0] if value else None


def refuse_sliding(tree: Mapping[str, Any], source: str | Path, family: str) -> None:
    """Raise CheckpointError where a layer is not to see all tokens, of a family whose layers do here."""
    kinds = tree.get("layer_types") or []
    if others := [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind != "full_attention"]:
        raise CheckpointError(f"{source}/config.json: layer_types has {others[0]!r}; {family} has full attention here")


def dtype(tree: Mapping[str, Any]) -> str:
    """The type that weights are computed in: float32 unless it is bfloat16, which is the usual."""
    named = str(tree.get("dtype") or tree.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return named if named in ("float32", "bfloat16") else "float32"


def fields_of(
    kind: type[C], tree: Mapping[str, Any], source: str | Path, family: str, names: Mapping[str, str] | None = None
) -> C:
    """The family's config from the fields that have its names, or `names` (theirs -> ours)."""
    theirs = {ours: name for name, ours in (names or {}).items()}
    found = {key: tree.get(theirs.get(key, key), tree.get(key)) for key in kind.model_fields}
    fields = {key: value for key, value in found.items() if value is not None}
    heads = fields.get("num_attention_heads")
    fields.setdefault("num_key_value_heads", heads)
    if isinstance(heads, int) and heads and isinstance(fields.get("hidden_size"), int):
        fields.setdefault("head_dim", fields["hidden_size"] // heads)
    fields.update(rope(tree, source, family), dtype=dtype(tree))
    for key in TOKENS:
        value = tree.get(key)
        fields[key] = value[0] if isinstance(value, list) and value else value
    fields["eos_token_id"] = eos(tree)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "config"
        raise CheckpointError(f"{source}/config.json: {where}: {first['msg']}") from None


def usual(config: ModelConfig, architecture: str, rope_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that every family's `config.json` has."""
    return {
        "architectures": [architecture],
        "model_type": config.model_type,
        "rope_theta": rope_parameters["rope_theta"],
        "rope_parameters": {**rope_parameters, "rope_type": "default"},
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": config.dtype,
    }
