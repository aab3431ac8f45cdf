"""Reading a checkpoint folder, ours or anybody's: every file and every value in it is checked before it is used.

Decisions: JSON is read strictly (no key twice, bounded size), and so are the headers of safetensors files, where two readers
could otherwise see two models; code that a config names (`auto_map`) is never looked at.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trinity.adapters import peft
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
from trinity.checkpoint.quantisation import quantisation_of
from trinity.checkpoint.quantised import QUANTISED, QuantisedMatrices, QuantisedMatrix, QuantisedPart
from trinity.checkpoint.rounded import RoundedPart
from trinity.checkpoint.strict import check_inside, read_json, reading, sha256
from trinity.checkpoint.tensor_file import TYPES, Entry, Part, Reading, StoredPart, TensorFile, read_all
from trinity.config import ModelConfig
from trinity.errors import CheckpointError
from trinity.models.common.keys import PROJECTIONS
from trinity.models.registry import build, family_of, read_config
from trinity.ops.extension import Matrices
from trinity.rpc.messages import Experts
from trinity.utils.hugepages import empty, regather
from trinity.utils.terminal import progress

if TYPE_CHECKING:
    from trinity.checkpoint.adapter import Adapter
    from trinity.models.common.decoder import CausalLM
    from trinity.models.common.experts import ExpertLayer
from trinity.text.tokenizer import Tokenizer

HASH_AHEAD_BYTES = 4 << 30
SMALL_BYTES = 256 << 20
SAMPLE_BYTES = 1 << 20
LEAST_BYTES = min(dtype.itemsize for dtype in STORED)  # of a number that is not quantised


class Checkpoint:
    """A folder, or a model on the Hub, opened for reading. Tensors are read on demand, and files of the Hub's fetched; every
    problem is a CheckpointError that names the file. `name` is by what another process opens it."""

    def __init__(self, source: str | Path):
        self.folder = folder_of(source)
        self.path, self.name = self.folder.path, self.folder.name
        self._good: set[str] = set()
        self._open: dict[str, TensorFile] = {}
        self.manifest = self._manifest()
        for file in self._files:
            if not file.endswith(".safetensors"):  # those are checked when they are first read
                self._verified(file)
        self._open_weights()

    def _open_weights(self) -> None:
        """Find out which model this is, and where its tensors are."""
        tree = read_json(self._verified("config.json"))
        self.config: ModelConfig = read_config({**tree, **self._ends()}, self.path)
        self.quantisation = quantisation_of(self.path, tree)
        self._index = self._read_index()
        self._check_size()
        if self._index is not None or (self.path / SINGLE).is_file():
            _ = self._matrices  # what is wrong with names is said now

    @property
    def base(self) -> "Checkpoint":
        """The checkpoint of its weights without an adapter: itself where it has none."""
        return self

    @property
    def adapter(self) -> "Adapter | None":
        """The adapter that is merged into what is read, if there is one."""
        return None

    @cached_property
    def content(self) -> str:
        """A fingerprint of the weights: names and sizes of their files, and what is at the beginning and the end of each. Of a
        model of the Hub: fetches them."""
        self.folder.fetch(self._weight_files)
        digest = hashlib.sha256()
        for file in sorted(self._weight_files):
            with reading(self.path / file), (self.path / file).open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                digest.update(f"{file} {size} ".encode() + opened.read(SAMPLE_BYTES))
                opened.seek(max(0, size - SAMPLE_BYTES))
                digest.update(opened.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def _ends(self) -> dict[str, Any]:
        """The ids that end a text by generation_config.json, which counts where there is one, as it does elsewhere."""
        path = self.path / "generation_config.json"
        found = read_json(self._verified(path.name)) if path.is_file() else {}
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
        return read_json(self._verified(STATE))

    @property
    def has_tokenizer(self) -> bool:
        return (self.path / "tokenizer.json").is_file()

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
        return read_json(path) if path.is_file() else None

    def fetch(self, experts: Experts | None = None) -> None:
        """See that the weights are on this node's disk, all or those of these experts: at once, where reading a model of the
        Hub would fetch file after file. Raises CheckpointError as the Hub does."""
        if experts is None or self._index is None:
            return self.folder.fetch(self._weight_files)
        pairs = ((layer, expert) for layer, held in experts.items() for expert in held)
        keys = [each for pair in pairs for key in self._expert_keys(*pair) for each in self._matrices.keys(key)]
        self.folder.fetch({self._index[key] for key in keys if key in self._index})

    def tensor(self, key: str, shape: Iterable[int] | None = None) -> Tensor:
        """A tensor of the model, checked to be of `shape`: in the type that it is stored in, fp32 where it is quantised."""
        matrix = self._matrix(key, shape)
        if matrix is None:
            return self._tensor(self._place(key), key, shape)
        made = torch.empty(matrix.shape)
        with reading(self.path):
            matrix.read_into(made)
        return made

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return gate_FD, up_FD, down_DF of one expert, from a tensor for each or from the layer's stacks."""
        d, f = self.config.hidden_size, self.config.moe_intermediate_size
        dtype = self.base._type(self._expert_keys(layer, expert)[0])
        gate, up, down = (torch.empty(shape, dtype=dtype) for shape in ((f, d), (f, d), (d, f)))
        self.fill(self.expert_parts(layer, expert, gate, up, down))
        return gate, up, down

    def kept_expert(self, layer: int, expert: int, name: str) -> list[Matrices] | None:
        """gate, up and down as stored, where that is the format of that name (ops/stored.py); None: they are to be made."""
        keys, (d, f) = self._expert_keys(layer, expert), (self.config.hidden_size, self.config.moe_intermediate_size)
        stored = [self._as_stored(key) for key in keys] if len(keys) == len(PROJECTIONS) else []
        found = [kept for each in stored if each is not None and (kept := each.kept_as(name)) is not None]
        if len(found) < len(PROJECTIONS):
            return None
        for key, shape in zip(keys, ((f, d), (f, d), (d, f)), strict=True):
            self.check(key, shape)
        return found

    def expert_parts(self, layer: int, expert: int, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> list[Part]:
        """Parts to `fill` that memory with one expert, from a tensor for each matrix or from the layer's stacks."""
        d, f = self.config.hidden_size, self.config.moe_intermediate_size
        keys = self._expert_keys(layer, expert)
        if len(keys) == len(PROJECTIONS):
            for key, shape in zip(keys, ((f, d), (f, d), (d, f)), strict=True):
                self.check(key, shape)
            return [Part(key, target) for key, target in zip(keys, (gate_FD, up_FD, down_DF), strict=True)]
        gate_up, down, num = *keys, self.config.num_experts
        named = [
            expert_key(self.config, layer, expert, projection).removesuffix(".weight") for projection in PROJECTIONS
        ]
        self._entry(gate_up, (num, 2 * f, d))
        self._entry(down, (num, d, f))
        first = expert * 2 * f * d
        starts = (first, first + f * d, expert * d * f)
        found = zip((gate_up, gate_up, down), (gate_FD, up_FD, down_DF), starts, named, strict=True)
        return [Part(*each) for each in found]

    def _expert_keys(self, layer: int, expert: int) -> tuple[str, ...]:
        """The keys of its three matrices, or of the two stacks that it is in."""
        stacked = family_of(self.config).keys.stacked
        if (gate_up := stacked.gate_up.format(layer=layer)) in self.weight_map:
            return gate_up, stacked.down.format(layer=layer)
        return tuple(expert_key(self.config, layer, expert, projection) for projection in PROJECTIONS)

    def fill(self, parts: Iterable[Part], what: str = "", told: Callable[[int], object] = int) -> None:
        """Read each part into its memory, in the order of the files. `what`: words beside a bar on a terminal; `told`: hears of
        each part's bytes, on any thread."""
        self._read_all([self._reading(part) for part in parts], what, told)

    def _read_all(self, placed: Sequence[Reading], what: str, told: Callable[[int], object] = int) -> None:
        with progress(what, sum(each.part.target.nbytes for each in placed)) as bar, reading(self.path):
            read_all(placed, lambda num: (bar(num), told(num)))

    def leave_memory(self) -> None:
        """Have the kernel forget what it keeps of the files that are open."""
        for file in self.base._open.values():
            file.leave_memory()

    def _reading(self, part: Part) -> Reading:
        matrix = self._matrix(part.key, part.target.shape)
        return StoredPart(self._file(self._place(part.key)), part) if matrix is None else QuantisedPart(matrix, part)

    def load_model(self, experts: "ExpertLayer", device: str, weight_dtype: str = "auto") -> "CausalLM":
        """The backbone over these experts, with its weights, ready to compute. `weight_dtype`: see EngineConfig."""
        model = build(self.config, experts, device="meta")
        model.round_to(weight_dtype, device)
        memory = {name: empty(like.shape, like.dtype, device) for name, like in model.state_dict().items()}
        model.load_state_dict(memory, assign=True)  # not `to_empty`, which imports a compiler: seconds
        self.load_backbone(model)
        regather(memory.values(), self.leave_memory)
        return model.eval()

    def load_backbone(self, model: "CausalLM") -> int:
        """Fill every tensor of the backbone from the files; -> version."""
        tensors, rounded = model.tensors(), model.rounded()
        for key, mine in tensors.items():
            self.check(key, rounded[key].kept.sides if key in rounded else mine.shape)
        readings = [
            RoundedPart(rounded[key], self._reading, self._as_stored(key), part)
            if key in rounded
            else self._reading(part)
            for key, part in ((key, Part(key, mine)) for key, mine in tensors.items())
        ]
        self._read_all(readings, "reading the backbone")
        return self.version

    def training_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Optimizer state by name, from the files under training/."""
        where = self._training_map
        missing = [name for name in names if name not in where]
        if missing:
            raise CheckpointError(
                f"{self.path}: optimizer state {missing[0]!r} is missing; fine-tune with train.init_from instead"
            )
        return {name: self._tensor(where[name], name) for name in names}

    @cached_property
    def _training_map(self) -> dict[str, str]:
        return {
            t: file for file, entry in self._files.items() if file.startswith("training/") for t in entry["tensors"]
        }

    def check(self, key: str, shape: Iterable[int]) -> None:
        """See that a tensor of the model is there, of a type that holds weights and of that shape."""
        if self._matrix(key, shape) is None:
            self._entry(key, shape)

    @cached_property
    def _matrices(self) -> QuantisedMatrices:
        return QuantisedMatrices(self.path, self.quantisation, self.weight_map, self._file)

    def _matrix(self, key: str, shape: Iterable[int] | None = None) -> QuantisedMatrix | None:
        """The matrix of that key where it is quantised, once all that belongs to it is there and fits."""
        with reading(self.path):
            return self.base._matrices.find(key, None if shape is None else tuple(shape))

    def _as_stored(self, key: str) -> QuantisedMatrix | None:
        """The matrix of that key where it is quantised, and nothing is to be added to it."""
        return self._matrix(key)

    def _type(self, key: str) -> torch.dtype:
        """The type of a tensor of the model, as it is read."""
        return torch.float32 if self._matrix(key) is not None else TYPES[self._entry(key).dtype]

    def _place(self, key: str) -> str:
        """The file that a tensor of the model is in."""
        if key not in self.weight_map:
            raise CheckpointError(
                f"{self.path}: tensor {key!r} is missing; is this a complete {self.config.model_type} checkpoint?"
            )
        return self.weight_map[key]

    def _entry(self, key: str, shape: Iterable[int] | None = None) -> Entry:
        """The header's facts about a tensor of the model."""
        return self._checked(self._place(key), key, shape)

    def _checked(self, file: str, key: str, shape: Iterable[int] | None) -> Entry:
        path, opened = self.path / file, self._file(file)
        with reading(path, f"{key!r} in "):
            found = opened.entry(key)
        if shape is not None and found.shape != tuple(shape):
            raise CheckpointError(f"{path}: {key} has shape {[*found.shape]}, config.json wants {[*shape]}")
        if found.dtype not in TYPES:
            alone = " and no scale beside it" if found.dtype in QUANTISED else ""
            raise CheckpointError(
                f"{path}: {key} has type {found.dtype}{alone}; weights are floating point, one of {[*TYPES]}"
            )
        return found

    def _tensor(self, file: str, key: str, shape: Iterable[int] | None = None) -> Tensor:
        found, opened = self._checked(file, key, shape), self._file(file)
        tensor = torch.empty(found.shape, dtype=TYPES[found.dtype])
        with reading(self.path / file, f"{key!r} in "):
            opened.read(Part(key, tensor))
        return tensor

    def _file(self, file: str) -> TensorFile:
        if file not in self._open:
            path = self._verified(file)
            with reading(path):
                self._open[file] = TensorFile(path)
        return self._open[file]

    def _verified(self, file: str) -> Path:
        """The path of a file of ours, once its size and hash agree with the manifest (if there is one)."""
        path, entry = self._sized(file), self._files.get(file)
        if entry is not None and file not in self._good and sha256(path) != entry["sha256"]:
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
        with reading(path):
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
        manifest = read_json(path)
        if manifest.get("sha256") != own_hash(manifest):
            raise CheckpointError(f"{path} does not match its own SHA-256: it is corrupt, or of an earlier Trinity")
        files, step = manifest.get("files"), manifest.get("step")
        if manifest.get("format") != FORMAT or type(step) is not int or step < 0 or not isinstance(files, dict):
            raise CheckpointError(f"{path} is not of format {FORMAT}: a step, and files with their bytes and sha256")
        for file, entry in files.items():
            check_inside(file, path)
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
        least = (config.vocab_size * config.hidden_size + experts) * (0.5 if self.quantisation.is_said else LEAST_BYTES)
        with reading(self.path):
            found = sum(map(self.folder.size, self._weight_files))  # one that is not there is named when it is read
        if least > found + SMALL_BYTES:  # what lacks a tensor is told which
            raise CheckpointError(
                f"{self.path}/config.json tells of {least:,.0f} bytes of embeddings and experts at least; the files that "
                f"the tensors are in have {found:,}: is this a complete checkpoint?"
            )

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """The file of each tensor. Of a model of the Hub in one file: fetches it."""
        return dict.fromkeys(self._file(SINGLE).keys, SINGLE) if self._index is None else self._index

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
        tree = read_json(index)
        self._check_had_none(index, tree)
        where = tree.get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
            raise CheckpointError(f"{index}: weight_map is not a mapping of tensor names to files")
        for file in set(where.values()):
            check_inside(file, index)
            if not file.endswith(".safetensors"):
                raise CheckpointError(f"{index} names {file!r}; Trinity reads weights from .safetensors files only")
        return where


def open_checkpoint(source: str | Path) -> Checkpoint:
    """A checkpoint, or an adapter's folder, which counts as its base with the adapter merged in (adapter.py)."""
    if folder_of(source).has(peft.CONFIG):
        from trinity.checkpoint.adapter import AdaptedCheckpoint

        return AdaptedCheckpoint(source)
    return Checkpoint(source)


def _is_entry(entry: Any) -> bool:
    wanted = {"bytes": int, "sha256": str, "tensors": list}
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in wanted.items())
