"""Plain nested settings from YAML files and `--dotted.flags`, merged and not yet checked; and the base of what checks them."""

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from os.path import expanduser
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from trinity.errors import ConfigError

MAX_BYTES = 1 << 20
NUMBERS = {  # YAML 1.1's, without those of base 60
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"([-+]?[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
}
PRESETS = Path(__file__).parent / "presets"


class Frozen(BaseModel):
    """Base of every setting: immutable, no unknown keys, numbers that are numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ignored_types=(cached_property,))


def at_home(path: Any) -> Any:
    """A path with the user's home for its `~`, which no shell says in a file of settings; another value as it is."""
    return expanduser(path) if isinstance(path, str) else path


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


class _Unique(yaml.SafeLoader):
    """Plain values only, and no key twice; no aliases, a page of which can stand for gigabytes; and 12:30:00 is a text, where
    YAML 1.1 has a number of base 60."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (the library's own declaration)
        first: [(tag, pattern) for tag, pattern in found if tag not in NUMBERS]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not taken; write the value again", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for key, num in Counter(filter(_is_hashable, keys)).items() if num > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern in NUMBERS.items():
    _Unique.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def _is_hashable(key: Any) -> bool:
    """Say whether the loader takes it as a key: not a list or a mapping, which it refuses by name."""
    return isinstance(key, Hashable)


def read_yaml(path: str | Path) -> dict[str, Any]:
    file = Path(expanduser(path))
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; name a YAML file in it")
    if not file.is_file():
        raise ConfigError(f"configuration file {file} does not exist; presets are {', '.join(preset_names())}")
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ConfigError(f"{file} has {size:,} bytes; a file of settings may have {MAX_BYTES:,}")
        tree = _Unique(file.read_text("utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold a mapping of sections such as `train:`, found {type(tree).__name__}")
    return {key: {} if value is None else value for key, value in tree.items()}


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """`["--train.steps", "20", "--train.resume"]` -> {"train": {"steps": 20, "resume": True}}; values are YAML scalars."""
    tree: dict[str, Any] = {}
    for key, value in _flag_pairs(flags):
        node = tree
        *parents, leaf = key.split(".")
        for part in parents:
            old = node.get(part, {})
            node[part] = old if isinstance(old, dict) else {"preset": old}  # --model tiny --model.num_experts 16
            node = node[part]
        node[leaf] = _scalar(key, value)
    return tree


def _scalar(key: str, value: str) -> Any:
    try:
        return _Unique(value).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"--{key}: {value!r} is not a value; quote lists and mappings as YAML does") from None


def _flag_pairs(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    queue = list(flags)
    while queue:
        flag = queue.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"{flag!r} is not a flag; settings are given as --section.key value")
        key, separator, value = flag[2:].replace("-", "_").partition("=")
        if separator:
            value = flag.split("=", 1)[1]
        elif queue and not queue[0].startswith("--"):
            value = queue.pop(0)
        else:
            value = "true"
        yield key, value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge; a preset's name as `model` becomes {"preset": name} so that flags can refine it."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if key == "model" and isinstance(old, str):
            old = {"preset": old}
        if key == "model" and isinstance(value, str) and isinstance(old, Mapping):
            value = {"preset": value}
        out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out
