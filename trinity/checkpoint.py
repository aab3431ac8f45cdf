"""Checkpoints are Hugging Face directories, written in parts by many processes and made real by one rename.

    step-000300/            config.json, generation_config.json, tokenizer files, model.safetensors.index.json
      model-backbone-00.safetensors, model-experts-<shard>-00.safetensors …     what transformers and vLLM load
      training/             optimizer state beside them, state.json                 what `--resume` needs
      manifest.json         every file with size and SHA-256, written last; then the folder loses its `.partial` suffix

Decisions: safetensors only; a file is hashed before the first tensor is read from it; a folder without a manifest is a
plain Hugging Face checkpoint (version 0); file names inside an index or a manifest may not leave the folder.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trinity.config import ModelConfig
from trinity.errors import CheckpointError
from trinity.hf_config import from_hf, to_hf
from trinity.messages import Experts, Part

if TYPE_CHECKING:
    from trinity.tokenizer import Tokenizer

log = logging.getLogger(__name__)
INDEX, SINGLE, MANIFEST = "model.safetensors.index.json", "model.safetensors", "manifest.json"
MAX_JSON_BYTES = 256 << 20
MAX_FILE_BYTES = 4 << 30
HASH_AHEAD_BYTES = 4 << 30
os.umask(UMASK := os.umask(0o022))
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def expert_key(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"


class Checkpoint:
    """A folder opened for reading. Tensors are read on demand; every problem is a CheckpointError that names the file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"checkpoint folder {self.path} does not exist")
        self.manifest = self._manifest()
        for file in self._files:
            if not file.endswith(".safetensors"):  # those are checked when they are first read
                self._verified(file)
        self.config: ModelConfig = from_hf(_read_json(self.path / "config.json"), self.path)
        self.weight_map = self._weight_map()
        self._open: dict[str, Any] = {}

    @property
    def version(self) -> int:
        """The optimizer step that made these weights; 0 for a checkpoint from elsewhere."""
        return int(self.manifest.get("step", 0))

    @property
    def has_training_state(self) -> bool:
        return (self.path / "training" / "state.json").is_file()

    @cached_property
    def state(self) -> dict[str, Any]:
        """The trainer's own notes (training/state.json)."""
        return _read_json(self._verified("training/state.json"))

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        from trinity.tokenizer import Tokenizer

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

    def tensor(self, key: str, shape: Iterable[int] | None = None) -> Tensor:
        """A tensor of the model, checked to be floating point, finite in type and of `shape`."""
        if key not in self.weight_map:
            raise CheckpointError(f"{self.path}: tensor {key!r} is missing; is this a complete AFMoE checkpoint?")
        return self._read(self.weight_map[key], key, shape)

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> gate_FD, up_FD, down_DF of one expert."""
        d, f = self.config.hidden_size, self.config.moe_intermediate_size
        shapes = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
        gate, up, down = (self.tensor(expert_key(layer, expert, p), shapes[p]) for p in PROJECTIONS)
        return gate, up, down

    @torch.no_grad()
    def load_backbone(self, model: torch.nn.Module) -> int:
        """Copy every tensor of the model's state_dict from the files; -> version."""
        for name, mine in model.state_dict().items():
            mine.copy_(self.tensor(name, mine.shape))
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
            t: file
            for file, entry in self._files.items()
            if file.startswith("training/")
            for t in entry.get("tensors", ())
        }

    def _read(self, file: str, key: str, shape: Iterable[int] | None) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(self._verified(file)), framework="pt")
            tensor = self._open[file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / file}: cannot read {key!r}: {error}") from None
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"{self.path / file}: {key} has shape {list(tensor.shape)}, config.json wants {list(shape)}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.path / file}: {key} has type {tensor.dtype}; weights are floating point")
        return tensor

    def _verified(self, file: str) -> Path:
        """The path of a file of ours, once its size and hash agree with the manifest (if there is one)."""
        path, entry = self._sized(file), self._files.get(file)
        if entry is not None and _sha256(path) != entry["sha256"]:
            raise CheckpointError(
                f"{path} does not match its SHA-256 in the manifest: it is corrupt; use an earlier checkpoint"
            )
        return path

    def _sized(self, file: str) -> Path:
        """The path of a file of ours, once it is there and as long as the manifest says."""
        path, entry = self.path / file, self._files.get(file)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though the checkpoint lists it")
        if entry is None:
            return path
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}: truncated?"
            )
        return path

    def _manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        if self.path.name.endswith(".partial"):
            raise CheckpointError(f"{self.path} is a save that did not finish; use an earlier checkpoint")
        manifest = _read_json(path) if path.is_file() else {}
        files = manifest.get("files", {})
        if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
            raise CheckpointError(f"{path} does not list files with their bytes and sha256")
        for file in files:
            _check_inside(file, path)
        return manifest

    def _weight_map(self) -> dict[str, str]:
        index, single = self.path / INDEX, self.path / SINGLE
        if index.is_file():
            tree = _read_json(index).get("weight_map")
            if not isinstance(tree, dict) or not all(isinstance(v, str) for v in tree.values()):
                raise CheckpointError(f"{index}: weight_map is not a mapping of tensor names to files")
            for file in set(tree.values()):
                _check_inside(file, index)
            return tree
        if single.is_file():
            return dict.fromkeys(_keys(single), SINGLE)
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt")):
            raise CheckpointError(
                f"{self.path} holds .bin/.pt files, which can run code when loaded; convert it to safetensors"
            )
        raise CheckpointError(f"{self.path} has neither {INDEX} nor {SINGLE}")


def open_checkpoint(path: str | Path) -> Checkpoint:
    return Checkpoint(path)


def list_checkpoints(out_dir: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [p.parent for p in Path(out_dir).glob(f"step-*/{MANIFEST}") if p.parent.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def latest_checkpoint(out_dir: str | Path) -> Path | None:
    found = list_checkpoints(out_dir)
    return found[-1] if found else None


def step_path(out_dir: str | Path, step: int) -> Path:
    """Where a run keeps its checkpoint after `step` steps."""
    return Path(out_dir) / f"step-{step:06d}"


class CheckpointWriter:
    """One save: parts go into `folder`; `finish` writes index, config and manifest, and gives the folder its name."""

    def __init__(self, target: str | Path, step: int):
        self.target, self.step = Path(target), step
        self.folder = self.target.with_name(self.target.name + ".partial")
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.folder / "training").mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.folder}: {error}") from None

    def finish(
        self,
        parts: Iterable[Part],
        config: ModelConfig,
        tokenizer: "Tokenizer | None",
        state: dict[str, Any] | None,
        generation: dict[str, Any] | None = None,
    ) -> Path:
        """-> the finished checkpoint. `state` None: weights only, nothing to resume from. `generation`: the sampling
        defaults to keep in generation_config.json."""
        parts = list(parts)
        _write_json(self.folder / "config.json", to_hf(config))
        _write_json(self.folder / "generation_config.json", generation or _generation_config(config))
        if state is None:
            (self.folder / "training").rmdir()
        else:
            _write_json(self.folder / "training" / "state.json", state)
        _write_json(self.folder / INDEX, _index(parts))
        if tokenizer is not None:
            tokenizer.save(self.folder)
        known = {part.file for part in parts}
        others = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        parts += [_part(self.folder, file) for file in others if file not in known]
        files = {p.file: {"bytes": p.num_bytes, "sha256": p.sha256, "tensors": p.tensors} for p in parts}
        _write_json(self.folder / MANIFEST, {"format": 1, "step": self.step, "files": files})
        _sync(self.folder)
        old = self.target.with_name(self.target.name + ".old.partial")
        shutil.rmtree(old, ignore_errors=True)
        if self.target.exists():
            os.replace(self.target, old)
        os.replace(self.folder, self.target)
        shutil.rmtree(old, ignore_errors=True)
        _sync(self.target.parent)
        return self.target


def prune(out_dir: str | Path, keep: int) -> None:
    """Delete the oldest checkpoints; the manifest goes first, so that a half-deleted one is not listed."""
    for path in list_checkpoints(out_dir)[:-keep]:
        (path / MANIFEST).unlink()
        shutil.rmtree(path)


def write_tensors(
    folder: str | Path, stem: str, tensors: Iterable[tuple[str, Tensor]], max_file_bytes: int = MAX_FILE_BYTES
) -> tuple[Part, ...]:
    """Write `{stem}-00.safetensors`, -01 …, none over `max_file_bytes` unless one tensor is; holds one file in memory."""
    parts = []
    for number, group in enumerate(_groups(tensors, max_file_bytes)):
        file = f"{stem}-{number:02d}.safetensors"
        path = Path(folder) / file
        try:
            save_file(group, str(path), metadata={"format": "pt"})
            path.chmod(0o666 & ~UMASK)  # safetensors makes it the owner's alone
            _sync(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot write {path}: {error}") from None
        parts.append(_part(Path(folder), file, tuple(group)))
    return tuple(parts)


def _groups(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > max_bytes:
            yield group
            group, size = {}, 0
        group[name] = tensor.detach().to("cpu").contiguous()
        size += tensor.nbytes
    if group:
        yield group


def all_experts(config: ModelConfig) -> Experts:
    return {layer: tuple(range(config.num_experts)) for layer in config.moe_layers}


def _index(parts: Iterable[Part]) -> dict[str, Any]:
    weights = [part for part in parts if not part.file.startswith("training/")]
    total = sum(part.num_bytes for part in weights)
    return {"metadata": {"total_size": total}, "weight_map": {t: p.file for p in weights for t in p.tensors}}


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def _part(folder: Path, file: str, tensors: tuple[str, ...] = ()) -> Part:
    path = folder / file
    return Part(file, path.stat().st_size, _sha256(path), tensors)


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from None


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)


def _check_inside(file: str, source: Path) -> None:
    pure = PurePosixPath(file)
    if pure.is_absolute() or ".." in pure.parts or "\\" in file or not file:
        raise CheckpointError(f"{source} names a file outside the checkpoint: {file!r}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, more than the {MAX_JSON_BYTES} a JSON file may have"
            )
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return tree


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
