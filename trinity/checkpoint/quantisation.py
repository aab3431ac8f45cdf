"""Settings of a quantised checkpoint: what `quantization_config` says that the headers of its files do not.

Decisions: of compressed-tensors, DeepSeek's fp8 and ModelOpt (config.json or hf_quant_config.json); a word that is not known is
refused, because it could change numbers. Patterns (`re:...`) come with the files: Rust's expressions match them, in linear
time.
"""

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeGuard

from pydantic import StringConstraints, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from trinity.checkpoint.layout import MODELOPT
from trinity.checkpoint.strict import read_json
from trinity.errors import CheckpointError

METHODS = ("compressed-tensors", "fp8", "modelopt")
FORMATS = (
    "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized", "mixed-precision",
)  # fmt: skip
ALGORITHMS = {"NVFP4": (("float", 4), (1, 16)), "FP8": (("float", 8), (0, 0))}  # of ModelOpt
WHOLE = {"tensor": (0, 0), "channel": (1, 0)}  # strategies: rows and columns that share a scale; 0: all
REMEDY = "take the weights in another format, or in bf16"


@dataclass(frozen=True)
class Scheme:
    """A way to store some matrices. `kind`: type and bits; `block`: rows and columns that share a scale, 0 for all of them;
    None: it is not said. `is_symmetric`: without zero points."""

    targets: tuple[str, ...]
    kind: tuple[str, int] | None
    block: tuple[int, int] | None
    is_symmetric: bool = True


class Quantisation:
    """Settings of a checkpoint for its quantised matrices; without any nothing is said."""

    def __init__(self, source: str, schemes: Iterable[Scheme] = (), ignore: Iterable[str] = ()):
        self._source, self._schemes, self._ignore = source, tuple(schemes), tuple(ignore)
        self._ignored: dict[str, str] = {}  # module -> the pattern that names it
        self._scheme_of: dict[str, Scheme] = {}

    @property
    def is_said(self) -> bool:
        """Say whether there are settings."""
        return bool(self._schemes)

    def check_ignored(self, keys: Iterable[str]) -> None:
        """Find out which modules are meant. Raises CheckpointError for a pattern that none of them has."""
        if not self._schemes:
            return
        names = sorted({part for key in keys for part in _paths(key)})
        for pattern in self._ignore:
            found = self._matching(pattern, names)
            if not found:
                raise CheckpointError(
                    f"{self._source}: ignore names {pattern!r}, which no module of the checkpoint has"
                )
            self._ignored |= dict.fromkeys(found, pattern)
        for scheme in reversed(self._schemes):  # of several the first counts
            for target in scheme.targets:
                found = names if target == "Linear" else self._matching(target, names)
                self._scheme_of |= dict.fromkeys(found, scheme)

    def check(self, module: str, kind: tuple[str, int]) -> None:
        """Raise CheckpointError where a matrix that is stored in this way is to be plain, or another."""
        if module in self._ignored:
            raise CheckpointError(
                f"{self._source}: ignore names {module} ({self._ignored[module]}), which is stored as {kind[0]}{kind[1]}"
            )
        scheme = self._scheme(module)
        if scheme is not None and scheme.kind not in (None, kind):
            said, stored = ("".join(map(str, each)) for each in (scheme.kind or (), kind))
            raise CheckpointError(f"{self._source}: {module} is said to be {said} and stored as {stored}")

    def unlike_others(self, parts: Mapping[str, Collection[str]]) -> frozenset[str]:
        """Matrices that are stored plainly where those of their name in other places are quantised, and no word says that they
        are to be. `parts`: what each module's tensors are called."""
        quantised = {_anywhere(module) for module, own in parts.items() if len(own) > 1} if self._schemes else set()
        plain = [module for module, own in parts.items() if set(own) == {"weight"} and _anywhere(module) in quantised]
        meant = {*plain} & self._scheme_of.keys()
        return frozenset(each for each in meant if not self._ignored.keys() & set(_paths(f"{each}.weight")))

    def refuse_half(self, module: str) -> None:
        raise CheckpointError(
            f"{self._source}: {module} is stored plainly, others of that name are quantised, and ignore does not name it: half "
            "of the checkpoint is another one; fetch it again, or name it there"
        )

    def bits(self, module: str) -> int | None:
        """The bits of a number of that matrix, where it is said."""
        scheme = self._scheme(module)
        return scheme.kind[1] if scheme is not None and scheme.kind is not None else None

    def is_symmetric(self, module: str) -> bool:
        """Say whether its numbers need no zero points."""
        scheme = self._scheme(module)
        return scheme is None or scheme.is_symmetric

    def block(self, module: str, shape: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns of that matrix that share a scale, where it is said."""
        scheme = self._scheme(module)
        if scheme is None or scheme.block is None:
            return None
        return scheme.block[0] or shape[0], scheme.block[1] or shape[1]

    def _scheme(self, module: str) -> Scheme | None:
        if self._schemes and module not in self._scheme_of:
            raise CheckpointError(
                f"{self._source}: no group of quantization_config is for {module}, which is quantised"
            )
        return self._scheme_of.get(module)

    def _matching(self, pattern: str, names: list[str]) -> list[str]:
        if pattern.startswith("re:"):
            return self._by_expression(pattern, names)
        if "*" in pattern:
            return [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        return [name for name in names if name == pattern or name.endswith(f".{pattern}")]

    def _by_expression(self, pattern: str, names: list[str]) -> list[str]:
        try:
            matching = TypeAdapter(Annotated[str, StringConstraints(pattern=f"^(?:{pattern[3:]})")])
        except SchemaError as error:
            raise CheckpointError(
                f"{self._source}: {pattern!r} is no expression without looking around: {error}"
            ) from None
        return [name for name in names if _is_valid(matching, name)]


def quantisation_of(folder: Path, config: Mapping[str, Any]) -> Quantisation:
    """The settings in a checkpoint's config.json, or beside it. Raises CheckpointError for what is not implemented."""
    tree, source = config.get("quantization_config"), f"{folder}/config.json: quantization_config"
    if tree is None and (folder / MODELOPT).is_file():
        tree, source = read_json(folder / MODELOPT).get("quantization"), f"{folder}/{MODELOPT}: quantization"
        tree = {"quant_method": "modelopt", **tree} if isinstance(tree, Mapping) else tree
    if tree is None:
        return Quantisation(source)
    if not isinstance(tree, Mapping) or tree.get("quant_method") not in METHODS:
        method = tree.get("quant_method") if isinstance(tree, Mapping) else tree
        raise CheckpointError(f"{source} has quant_method {method!r}; read are {', '.join(METHODS)}: {REMEDY}")
    read = {"compressed-tensors": _compressed, "fp8": _fp8, "modelopt": _modelopt}[tree["quant_method"]]
    return Quantisation(source, read(tree, source), _ignored(tree, source))


def _compressed(tree: Mapping[str, Any], source: str) -> list[Scheme]:
    groups = tree.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise CheckpointError(f"{source}.config_groups is {type(groups).__name__}, not a mapping of groups")
    if not groups:
        raise CheckpointError(f"{source}.config_groups is empty: it says of nothing how it is stored")
    for key in ("sparsity_config", "transform_config"):
        found = tree.get(key)
        if found and not (isinstance(found, Mapping) and found.get("format") == "dense"):
            raise CheckpointError(f"{source}.{key} is not implemented; {REMEDY}")
    for each in (tree, *groups.values()):
        if (name := each.get("format")) not in (None, *FORMATS):
            raise CheckpointError(f"{source} has format {name!r}; read are {', '.join(FORMATS)}: {REMEDY}")
    return [_scheme(group, f"{source}.config_groups.{name}") for name, group in groups.items()]


def _scheme(group: Mapping[str, Any], source: str) -> Scheme:
    weights, targets = group.get("weights"), group.get("targets")
    if not isinstance(weights, Mapping) or not _are_words(targets):
        raise CheckpointError(f"{source} lacks its weights or targets")
    kind = weights.get("type", "int"), weights.get("num_bits", 8)
    if kind not in (("float", 8), ("int", 8), ("int", 4), ("float", 4)):
        raise CheckpointError(f"{source}.weights has {kind[1]} bits of type {kind[0]!r}; {REMEDY}")
    return Scheme(tuple(targets), kind, _block(weights, f"{source}.weights"), weights.get("symmetric", True) is True)


def _block(weights: Mapping[str, Any], source: str) -> tuple[int, int]:
    """Rows and columns that share a scale, from the strategy and its numbers."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "group" if size not in (None, -1) else "channel" if size == -1 else "tensor"
    if strategy in WHOLE:
        return WHOLE[strategy]
    said = weights.get("block_structure") if strategy == "block" else [1, size]
    block = _pair(said) if strategy in ("block", "group", "tensor_group") else None
    if block is None:
        raise CheckpointError(f"{source} has strategy {strategy!r} with {said!r}; {REMEDY}")
    return block


def _fp8(tree: Mapping[str, Any], source: str) -> list[Scheme]:
    """DeepSeek's: blocks where it says so, else what the headers show."""
    said = tree.get("weight_block_size")
    block = None if said is None else _pair(said)
    if tree.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise CheckpointError(f"{source}.fmt is {tree['fmt']!r}; read is 'e4m3': {REMEDY}")
    if said is not None and block is None:
        raise CheckpointError(f"{source}.weight_block_size is {said!r}, not rows and columns, such as [128, 128]")
    return [Scheme(("Linear",), ("float", 8), block)]


def _modelopt(tree: Mapping[str, Any], source: str) -> list[Scheme]:
    algorithm = tree.get("quant_algo")
    if algorithm not in ALGORITHMS:
        raise CheckpointError(f"{source}.quant_algo is {algorithm!r}; read are {', '.join(ALGORITHMS)}: {REMEDY}")
    kind, block = ALGORITHMS[algorithm]
    if algorithm == "NVFP4" and tree.get("group_size", 16) != 16:
        raise CheckpointError(f"{source}.group_size is {tree['group_size']!r}; NVFP4 has groups of 16")
    return [Scheme(("Linear",), kind, block)]


def _ignored(tree: Mapping[str, Any], source: str) -> list[str]:
    patterns: list[str] = []
    for key in ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers"):
        found = tree.get(key) or []
        if not _are_words(found):
            raise CheckpointError(f"{source}.{key} is {found!r}, not a list of names")
        patterns += found
    return list(dict.fromkeys(patterns))


def _is_valid(kind: TypeAdapter[str], name: str) -> bool:
    try:
        return bool(kind.validate_python(name))
    except ValidationError:
        return False


def _are_words(found: Any) -> TypeGuard[list[str]]:
    return isinstance(found, list) and all(isinstance(word, str) and word for word in found)


def _pair(found: Any) -> tuple[int, int] | None:
    """Two sizes, if it is that."""
    is_pair = isinstance(found, list) and len(found) == 2 and all(type(size) is int and size > 0 for size in found)
    return (found[0], found[1]) if is_pair else None


def _anywhere(module: str) -> str:
    """The module's name without its place among layers and experts."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", module)


def _paths(key: str) -> Iterable[str]:
    """The module of a key, and those that it is in."""
    path = key.rpartition(".")[0]
    return (path[: found.start()] for found in re.finditer(r"\.|$", path) if path)
