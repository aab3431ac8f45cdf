"""Reading a checkpoint folder, ours or anybody's: every file and every value in it is checked before it is used.

Decisions: JSON is read strictly (no key twice, bounded size), and so are the headers of safetensors files, where two readers
could otherwise see two models; code that a config names (`auto_map`) is never looked at.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trinity.checkpoint.hub import folder_of
from trinity.checkpoint.layout import (
    DELETED,
    FORMAT,
    INDEX,
    MANIFEST,
    PARTIAL,
    SINGLE,
    STATE,
    STORED,
    expert_key,
    own_hash,
)
from trinity.config import ModelConfig
from trinity.errors import CheckpointError
from trinity.models.common.keys import PROJECTIONS
from trinity.models.registry import family_of, read_config
from trinity.rpc.messages import Experts

if TYPE_CHECKING:
    from trinity.models.common.decoder import CausalLM
    from trinity.text.tokenizer import Tokenizer

MAX_JSON_BYTES = 256 << 20
MAX_HEADER_BYTES = 32 << 20
HASH_AHEAD_BYTES = 4 << 30
MAX_NAME_BYTES = 255
LFS_POINTER = b"version "  # the first of its words, where a header's length would be
SMALL_BYTES = 256 << 20


class Checkpoint:
    """A folder, or a model on the Hub, opened for reading. Tensors are read on demand, and files of the Hub's fetched; every
    problem is a CheckpointError that names the file. `name` is by what another process opens it."""

    def __init__(self, source: str | Path):
        self.folder = folder_of(source)
        self.path, self.name = self.folder.path, self.folder.name
        self._good: set[str] = set()
        self.manifest = self._manifest()
        for file in self._files:
            if not file.endswith(".safetensors"):  # those are checked when they are first read
                self._verified(file)
        self.config: ModelConfig = read_config({**_read_json(self._verified("config.json")), **self._ends()}, self.path)
        self._open: dict[str, Any] = {}
        self._index = self._read_index()
        self._check_size()
        if (self.path / SINGLE).is_file():
            _ = self.weight_map  # what is wrong with it is said now

    def _ends(self) -> dict[str, Any]:
        """The ids that end a text by generation_config.json, which counts where there is one, as it does elsewhere."""
        path = self.path / "generation_config.json"
        found = _read_json(self._verified(path.name)) if path.is_file() else {}
        return {key: value for key, value in found.items() if key == "eos_token_id" and value is not None}

    @property
    def version(self) -> int:
        """The optimizer step that made these weights; 0 for a checkpoint from elsewhere."""
        return int(self.manifest.get("step", 0))

    @property
    def has_training_state(self) -> bool:
        return (self.path / STATE).is_file()

    @cached_property
    def state(self) -> dict[str, Any]:
        """The trainer's own notes (training/state.json)."""
        return _read_json(self._verified(STATE))

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        from trinity.text.tokenizer import Tokenizer

        return Tokenizer.load(self.path)

    @property
    def _files(self) -> dict[str, Any]:
        return self.manifest.get("files", {})

    def verify(self) -> None:
        """Check every file against the manifest, if there is one, before anything is started.

        Sizes always; contents only of what takes seconds. A larger checkpoint is hashed by those who read it, side by side.
        """
        is_small = sum(entry["bytes"] for entry in self._files.values()) <= HASH_AHEAD_BYTES
        check = self._verified if is_small else self._sized
        for file in self._files:
            check(file)

    @property
    def generation(self) -> dict[str, Any] | None:
        """generation_config.json, if there is one."""
        path = self.path / "generation_config.json"
        return _read_json(path) if path.is_file() else None

    def fetch(self, experts: Experts | None = None) -> None:
        """See that the weights are on this node's disk, all or those of these experts: at once, where reading a model of the
        Hub would fetch file after file. Raises CheckpointError as the Hub does."""
        if experts is None or self._index is None:
            return self.folder.fetch(self._weight_files)
        pairs = ((layer, expert) for layer, held in experts.items() for expert in held)
        keys = [key for pair in pairs for key in self._expert_keys(*pair)]
        self.folder.fetch({self._index[key] for key in keys if key in self._index})

    def _expert_keys(self, layer: int, expert: int) -> list[str]:
        """Return the keys that hold an expert's matrices: the layer's stacks, where it has them, else one for each."""
        stacked = family_of(self.config).keys.stacked
        stacks = [stacked.gate_up.format(layer=layer), stacked.down.format(layer=layer)]
        return (
            stacks if stacks[0] in self.weight_map else [expert_key(self.config, layer, expert, p) for p in PROJECTIONS]
        )

    def tensor(self, key: str, shape: Iterable[int] | None = None, at: int | None = None) -> Tensor:
        """A tensor of the model, checked to be of a type that holds weights as they are, and of `shape`; `at`: its part of that
        number, read alone."""
        if key not in self.weight_map:
            raise CheckpointError(
                f"{self.path}: tensor {key!r} is missing; is this a complete {self.config.model_type} checkpoint?"
            )
        return self._read(self.weight_map[key], key, shape, at)

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return gate_FD, up_FD, down_DF of one expert, from a tensor for each or from the layer's stacks."""
        d, f = self.config.hidden_size, self.config.moe_intermediate_size
        keys = self._expert_keys(layer, expert)
        if len(keys) == 2:
            num = self.config.num_experts
            gate, up = self.tensor(keys[0], (num, 2 * f, d), expert).chunk(2)
            return gate, up, self.tensor(keys[1], (num, d, f), expert)
        gate, up, down = (self.tensor(*each) for each in zip(keys, ((f, d), (f, d), (d, f)), strict=True))
        return gate, up, down

    @torch.no_grad()
    def load_backbone(self, model: "CausalLM") -> int:
        """Copy every tensor of the backbone from the files; -> version."""
        for key, mine in model.tensors().items():
            mine.copy_(self.tensor(key, mine.shape))
        return self.version

    def training_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Optimizer state by name, from the files under training/."""
        where = self._training_map
        missing = [name for name in names if name not in where]
        if missing:
            raise CheckpointError(
                f"{self.path}: optimizer state {missing[0]!r} is missing; fine-tune with train.init_from instead"
            )
        return {name: self._read(where[name], name, None) for name in names}

    @cached_property
    def _training_map(self) -> dict[str, str]:
        return {
            t: file for file, entry in self._files.items() if file.startswith("training/") for t in entry["tensors"]
        }

    def _read(self, file: str, key: str, shape: Iterable[int] | None, at: int | None = None) -> Tensor:
        if file not in self._open:
            self._open[file] = _opened(self._verified(file))
        with _reading(self.path / file, f"{key!r} in "):
            found = self._open[file].get_slice(key).get_shape()
            if shape is not None and tuple(found) != tuple(shape):
                raise CheckpointError(f"{self.path / file}: {key} has shape {found}, config.json wants {list(shape)}")
            tensor = self._open[file].get_tensor(key) if at is None else self._open[file].get_slice(key)[at]
        if tensor.dtype not in STORED:
            raise CheckpointError(
                f"{self.path / file}: {key} has type {tensor.dtype}; weights are floating point, one of {[*STORED.values()]}"
            )
        return tensor

    def _verified(self, file: str) -> Path:
        """The path of a file of ours, once its size and hash agree with the manifest (if there is one)."""
        path, entry = self._sized(file), self._files.get(file)
        if entry is not None and file not in self._good and _sha256(path) != entry["sha256"]:
            raise CheckpointError(
                f"{path} does not match its SHA-256 in the manifest: it is corrupt; use an earlier checkpoint "
                "(to resume: train.resume_from)"
            )
        self._good.add(file)
        return path

    def _sized(self, file: str) -> Path:
        """The path of a file of ours, once it is there and as long as the manifest says."""
        self.folder.fetch([file])
        path, entry = self.path / file, self._files.get(file)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; use another checkpoint")
        if self.manifest and entry is None:
            raise CheckpointError(
                f"{path} is not in the manifest, so nothing is known about it; use another checkpoint"
            )
        with _reading(path):
            size = path.stat().st_size
        if entry is not None and size != entry["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, the manifest says {entry['bytes']}: truncated?")
        return path

    def _manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        if self.path.name.endswith((PARTIAL, DELETED)):
            raise CheckpointError(f"{self.path} is a save or a deletion that did not finish; use another checkpoint")
        if not path.exists():
            return {}
        manifest = _read_json(path)
        if manifest.get("sha256") != own_hash(manifest):
            raise CheckpointError(f"{path} does not match its own SHA-256: it is corrupt, or of an earlier Trinity")
        files, step = manifest.get("files"), manifest.get("step")
        if manifest.get("format") != FORMAT or type(step) is not int or step < 0 or not isinstance(files, dict):
            raise CheckpointError(f"{path} is not of format {FORMAT}: a step, and files with their bytes and sha256")
        for file, entry in files.items():
            _check_inside(file, path)
            if not _is_entry(entry):
                raise CheckpointError(f"{path} does not list {file!r} with its bytes, sha256 and tensors")
        return manifest

    def _check_had_none(self, index: Path, tree: dict[str, Any]) -> None:
        """Refuse one that lost its manifest: without it nothing could be checked; that is for files that never had one."""
        metadata = tree.get("metadata")
        if not self.manifest and isinstance(metadata, dict) and "manifest" in metadata:
            raise CheckpointError(
                f"{self.path / MANIFEST} is missing, though the checkpoint was written with one; use another checkpoint, "
                f'or take "manifest" out of the metadata in {index.name} to load files that nobody has checked'
            )

    def _check_size(self) -> None:
        """Refuse numbers that the files cannot hold, before anything large is made by them."""
        config = self.config
        experts = len(config.moe_layers) * config.num_experts * config.expert_params
        least = (config.vocab_size * config.hidden_size + experts) * min(dtype.itemsize for dtype in STORED)
        with _reading(self.path):
            found = sum(map(self.folder.size, self._weight_files))  # one that is not there is named when it is read
        if least > found + SMALL_BYTES:  # what lacks a tensor is told which
            raise CheckpointError(
                f"{self.path}/config.json tells of {least:,} bytes of embeddings and experts at least; the files that "
                f"the tensors are in have {found:,}: is this a complete checkpoint?"
            )

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """The file of each tensor. Of a model of the Hub in one file: fetches it."""
        if self._index is not None:
            return self._index
        return dict.fromkeys(_opened(self._verified(SINGLE)).keys(), SINGLE)

    @property
    def _weight_files(self) -> set[str]:
        return {SINGLE} if self._index is None else set(self._index.values())

    def _read_index(self) -> dict[str, str] | None:
        """The weight map of the index. None where all weights are in one file, which counts as it does in transformers: an
        index beside it is of an earlier save."""
        if self.folder.has(SINGLE):
            return None
        if not self.folder.has(INDEX):
            raise CheckpointError(
                f"{self.path} holds .bin/.pt files, which can run code when loaded; convert it to safetensors"
                if self.folder.has_pickles()
                else f"{self.path} has neither {INDEX} nor {SINGLE}"
            )
        index = self._verified(INDEX)
        tree = _read_json(index)
        self._check_had_none(index, tree)
        where = tree.get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
            raise CheckpointError(f"{index}: weight_map is not a mapping of tensor names to files")
        for file in set(where.values()):
            _check_inside(file, index)
            if not file.endswith(".safetensors"):
                raise CheckpointError(f"{index} names {file!r}; Trinity reads weights from .safetensors files only")
        return where


def open_checkpoint(source: str | Path) -> Checkpoint:
    return Checkpoint(source)


@contextmanager
def _reading(path: Path, what: str = "") -> Iterator[None]:
    """Turn whatever a file does to its reader into an error that names it."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {what}{path}: {error}") from None


def _opened(path: Path) -> Any:
    """A safetensors file whose header says one thing only. The library checks that offsets cover the file without overlap."""
    with _reading(path):
        with path.open("rb") as file:
            head = file.read(8)
            if head == LFS_POINTER:
                raise ValueError("it stands for a file that Git LFS keeps elsewhere; `git lfs pull` fetches it")
            size = int.from_bytes(head, "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {size:,} bytes; {MAX_HEADER_BYTES:,} is the most there may be")
            json.loads(file.read(size), object_pairs_hook=_unique)
        return safe_open(str(path), framework="pt")


def _is_entry(entry: Any) -> bool:
    wanted = {"bytes": int, "sha256": str, "tensors": list}
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in wanted.items())


def _check_inside(file: str, source: Path) -> None:
    pure = PurePosixPath(file)
    if pure.is_absolute() or ".." in pure.parts or "\\" in file or not file or len(file.encode()) > MAX_NAME_BYTES:
        raise CheckpointError(f"{source} names a file outside the checkpoint: {file[:MAX_NAME_BYTES]!r}")


def _read_json(path: Path) -> dict[str, Any]:
    with _reading(path):
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes; a JSON file may have {MAX_JSON_BYTES:,}")
        tree = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        twice = next(key for key, num in Counter(key for key, _ in pairs).items() if num > 1)
        raise ValueError(f"key {twice!r} is there twice")
    return tree


def _sha256(path: Path) -> str:
    with _reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
