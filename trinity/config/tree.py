"""The whole tree of settings: presets expanded, unknown keys refused, every value checked."""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, SerializeAsAny, ValidationError, field_validator, model_validator

from trinity.config.env import admin_key, api_key
from trinity.config.evaluate import EvaluateConfig
from trinity.config.model import ModelConfig, require
from trinity.config.objective import DistillConfig, PreferenceConfig, RLConfig
from trinity.config.placement import PlacementConfig, why_not
from trinity.config.serve import HIDDEN, ClusterConfig, EngineConfig, ServeConfig
from trinity.config.track import TrackConfig
from trinity.config.train import DataConfig, OptimConfig, TrainConfig
from trinity.config.yaml import PRESETS, Frozen, merge, parse_flags, preset_names, read_yaml
from trinity.errors import ConfigError

RENAMED = {
    "train.num_in_flight": "train.num_overlapped_microbatches",
    "engine.num_in_flight": "engine.num_overlapped_microbatches",
    "train.runaway_nats": "train.loss_spike_threshold",
    "serve.num_engines": "engine.replicas",
    "serve.max_engines": "engine.max_replicas",
    "serve.max_requests_per_engine": "engine.requests_per_replica",
    "engine.kv_policy": "engine.kv_max_age",
}  # refused with the new name
S = TypeVar("S", bound=BaseModel)
SECRET = ("key", "api_key", "admin_key")


class Config(Frozen):
    """Everything. `Config.load("run.yaml", ["--train.steps", "20"])`."""

    model: SerializeAsAny[ModelConfig]
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    preferences: PreferenceConfig = PreferenceConfig()
    rl: RLConfig = RLConfig()
    distill: DistillConfig = DistillConfig()
    track: TrackConfig = TrackConfig()
    placement: PlacementConfig = PlacementConfig()
    engine: EngineConfig = EngineConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _of_its_family(cls, value: Any) -> Any:
        return ModelConfig.of(value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _check_forms(self) -> "Config":
        """Refuse forms that experts cannot have, before anything is started."""
        placed, sides = self.placement, (self.model.hidden_size, self.model.moe_intermediate_size)
        device = "cuda" if placed.device == "auto" and placed.num_gpus_per_shard else placed.device
        for name in placed.expert_dtype:
            why = None if name == self.model.dtype else why_not(name, sides, device, self.optim.lora.rank)
            require(why is None, str(why))
        return self

    @classmethod
    def load(cls, path: str | Path | None = None, flags: Sequence[str] = (), **base: Any) -> "Config":
        """Merge `base` < the YAML file < flags like `--train.steps 20`. Raises ConfigError that names key and remedy."""
        return cls.from_tree(merged(path, flags, **base))

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "Config":
        """Validate a plain nested mapping; `model` may be a preset's name or a mapping with `preset`."""
        tree = _expand_preset(dict(tree))
        _refuse_unknown(cls, tree)
        if found := {name: key for name, key in (("api_key", api_key()), ("admin_key", admin_key())) if key}:
            tree["serve"] = {**found, **tree.get("serve", {})}
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError("; ".join(_sentence(e) for e in error.errors())) from None

    def replace(self, **sections: Mapping[str, Any]) -> "Config":
        """A copy with some fields of some sections changed, validated again: `cfg.replace(train={"steps": 5})`."""
        tree = self.model_dump()
        return type(self).from_tree(merge(tree, sections))

    def to_yaml(self) -> str:
        """All settings as YAML; keys are not shown."""
        tree = self.model_dump(mode="json")
        tree["serve"] |= {name: HIDDEN for name in ("api_key", "admin_key") if tree["serve"][name]}
        for client in tree["serve"]["clients"].values():
            client["key"] = HIDDEN
        return yaml.safe_dump(tree, sort_keys=False)


def preset(name: str) -> ModelConfig:
    """The architecture of a preset, one of `preset_names()`."""
    return Config.from_tree({"model": name}).model


def merged(path: str | Path | None = None, flags: Sequence[str] = (), **base: Any) -> dict[str, Any]:
    """The plain tree `base` < the YAML file < flags, not yet checked."""
    return merge(merge(base, read_yaml(path) if path else {}), parse_flags(flags))


def section(kind: type[S], name: str, tree: Mapping[str, Any]) -> S:
    """One section alone, checked as a part of the whole tree is; `name` is empty for a tree of its own."""
    prefix = f"{name}." if name else ""
    _refuse_unknown(kind, tree, prefix)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{prefix}{_sentence(e)}" for e in error.errors())) from None


def differences(theirs: Mapping[str, Any], mine: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings in which two plain trees differ, each with both values; keys of clients and operators are not shown."""
    found = []
    for name in dict.fromkeys((*theirs, *mine)):
        there, here = theirs.get(name), mine.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            found += differences(there, here, f"{prefix}{name}.")
        elif there != here:
            told = "another" if _has_key(name, there, here) else f"{there!r}, not {here!r}"
            found.append(f"{prefix}{name} is {told}")
    return found


def _has_key(name: str, *values: Any) -> bool:
    inside = [each for value in values if isinstance(value, Mapping) for each in value]
    return name in SECRET or any(_has_key(each) for each in inside)


def _expand_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace `model: name` (or a mapping with `preset`) by the preset's values; its other sections become defaults."""
    model = tree.get("model")
    if isinstance(model, str):
        model = {"preset": model}
    if not isinstance(model, Mapping) or "preset" not in model:
        return tree
    name = model["preset"]
    if name not in preset_names():
        raise ConfigError(f"unknown preset {name!r}; there are {', '.join(preset_names())}")
    own = {key: value for key, value in model.items() if key != "preset"}
    return merge(read_yaml(PRESETS / f"{name}.yaml"), {**tree, "model": own})


def _refuse_unknown(kind: type[BaseModel], tree: Mapping[str, Any], prefix: str = "") -> None:
    """Name the nearest known key for each unknown one (pydantic alone would only say that it is extra)."""
    for key, value in tree.items():
        if key not in kind.model_fields:
            raise ConfigError(f"unknown setting {prefix + str(key)!r}; {_hint(kind, prefix, str(key))}")
        annotation = kind.model_fields[key].annotation
        inner = _section(annotation)
        if inner is not None and not isinstance(value, Mapping | str | None):
            raise ConfigError(f"{prefix}{key} is a section of settings, not {value!r}")
        if inner is ModelConfig and isinstance(value, Mapping):
            inner = ModelConfig.family(value)
        if inner is not None and isinstance(value, Mapping):
            _refuse_unknown(inner, value, f"{prefix}{key}.")
        for number, item in _items(annotation, value):
            _refuse_unknown(typing.get_args(annotation)[0], item, f"{prefix}{key}.{number}.")
        if isinstance(value, bool) and inner is None and bool not in (annotation, *typing.get_args(annotation)):
            raise ConfigError(f"{prefix}{key} needs a value, such as {kind.model_fields[key].default!r}")


def _hint(kind: type[BaseModel], prefix: str, key: str) -> str:
    """The keys that may have been meant by an unknown one of a section."""
    if prefix + key in RENAMED:
        return f"it is called {RENAMED[prefix + key]!r} now"
    near = difflib.get_close_matches(key, kind.model_fields, n=1, cutoff=0.6)
    found = (_elsewhere(key) if kind is Config else []) or [prefix + name for name in near]
    return f"did you mean {found[0]!r}?" if found else f"known: {', '.join(kind.model_fields)}"


def _elsewhere(key: str) -> list[str]:
    """The dotted name of a setting that lives in some section, for keys given at the top level."""
    sections = {name: _section(field.annotation) for name, field in Config.model_fields.items()}
    return [f"{name}.{key}" for name, kind in sections.items() if kind and key in kind.model_fields][:1]


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _items(annotation: Any, value: Any) -> list[tuple[int, Mapping[str, Any]]]:
    """The sections in a list of them, with their places; none of other settings."""
    is_list = typing.get_origin(annotation) is tuple and _section(typing.get_args(annotation)[0]) is not None
    given = value if is_list and isinstance(value, list | tuple) else ()
    return [(number, item) for number, item in enumerate(given) if isinstance(item, Mapping)]


def _sentence(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "config"
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    got = (
        f" (got {value!r})" if isinstance(value, str | int | float | bool | None) and not where.endswith("_key") else ""
    )
    return f"{where}: {message}{got}"
