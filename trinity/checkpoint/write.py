"""Saving: parts written side by side into a folder of another name, then an index, a manifest and one rename.

Decisions: a file is hashed while it is written and synced before it counts; tensors go to the disk one by one, so that a
save needs memory for one of them and not for a file; every save has a folder of its own, which makes a second one of the
same step, and a process that still writes for a dead trainer, harmless; what dead savers left is removed when a save
begins. A save that fails says why and leaves nothing behind.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

import torch
from torch import Tensor

from trinity.adapters import peft
from trinity.checkpoint.layout import (
    DELETED,
    FORMAT,
    INDEX,
    MANIFEST,
    PARTIAL,
    REPLACED,
    STATE,
    WRITTEN,
    all_experts,
    expert_key,
    own_hash,
    replaced,
)
from trinity.checkpoint.tensor_file import Part as Stored
from trinity.checkpoint.tensor_file import TensorFile
from trinity.config import ModelConfig
from trinity.errors import CheckpointError
from trinity.models.common.keys import PROJECTIONS
from trinity.models.registry import write_config
from trinity.rpc.messages import Part

if TYPE_CHECKING:
    from trinity.text.tokenizer import Tokenizer

MAX_FILE_BYTES = 4 << 30


class CheckpointWriter:
    """One save: parts go into `folder`, from any process and in any order; `finish` makes it a checkpoint, `abandon` drops it.

    Several saves may be under way in one process; of two of the same step, the one that finishes last stays. In a `with`
    block, an exception abandons the save. `finish` and `abandon` may be called from any thread.
    """

    def __init__(self, target: str | Path, step: int):
        self.target, self.step = Path(target), step
        self.folder = self.target.with_name(f"{self.target.name}.{secrets.token_hex(4)}{PARTIAL}")
        with writing(self.folder), _renaming:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            _clean_up(self.target, {writer.folder for writer in _alive})
            (self.folder / "training").mkdir(parents=True)
            _alive.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.abandon()

    def abandon(self) -> None:
        """Remove what was written, as far as the disk allows; the next save removes the rest. Harmless when repeated."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(
        self,
        parts: Iterable[Part],
        config: ModelConfig,
        tokenizer: "Tokenizer | None",
        state: dict[str, Any] | None,
        generation: dict[str, Any] | None = None,
        quantisation: Mapping[str, Any] | None = None,
    ) -> Path:
        """-> the finished checkpoint. `state` None: weights only, nothing to resume from. `generation`: the sampling
        defaults to keep in generation_config.json. `quantisation`: what config.json says of how matrices
        are stored. Raises CheckpointError, with nothing left behind, when the disk says no or the parts are not the whole
        model."""
        with self, writing(self.folder):
            parts = list(parts)
            _check_whole(parts, _keys_of_experts(config), self.folder)
            trees = {
                "config.json": write_config(config) | ({"quantization_config": quantisation} if quantisation else {}),
                "generation_config.json": _generation_config(config, generation or {}),
            }
            if state is None:
                (self.folder / "training").rmdir()
            else:
                trees[STATE] = state
            self._seal(parts + self._described(parts, tokenizer, trees))
            self.publish()
        return self.target

    def finish_adapter(
        self,
        parts: Iterable[Part],
        adapter: peft.AdapterConfig,
        modules: Collection[str],
        config: ModelConfig,
        tokenizer: "Tokenizer | None",
        state: dict[str, Any],
    ) -> Path:
        """The same for an adapter of these modules: the parts' tensors come into one file, as PEFT has them. `config`: of base
        and adapter together, which may have another context than the base alone."""
        with self, writing(self.folder):
            parts = list(parts)
            keys = sorted(peft.key_of(module, part) for module in modules for part in peft.PARTS)
            _check_whole(parts, keys, self.folder)
            own = [part for part in parts if not part.file.startswith("training/")]
            found = [part for part in parts if part not in own] + [self._joined(own, keys)]
            trees = {peft.CONFIG: peft.tree_of(adapter, modules), "config.json": write_config(config), STATE: state}
            self._seal(found + self._described(found, tokenizer, trees))
            self.publish()
        return self.target

    def _joined(self, parts: Iterable[Part], keys: Sequence[str]) -> Part:
        """One file in the place of several; adapters are small."""
        tensors: dict[str, Tensor] = {}
        for part in parts:
            file = TensorFile(self.folder / part.file)
            for key in part.tensors:
                tensors[key] = torch.empty(file.entry(key).shape)
                file.read(Stored(key, tensors[key]))
            (self.folder / part.file).unlink()
        written = _write(self.folder / peft.WEIGHTS, _safetensors({key: tensors[key] for key in keys}))
        return Part(peft.WEIGHTS, *written, tuple(keys))

    def _described(
        self, parts: list[Part], tokenizer: "Tokenizer | None", trees: Mapping[str, Mapping[str, Any]]
    ) -> list[Part]:
        """The files beside the tensors: tokenizer, whatever was put there already, `trees` as JSON; the index is made here."""
        if tokenizer is not None:
            tokenizer.save(self.folder)
        names = sorted(path.name for path in self.folder.iterdir() if path.is_file())
        known = {part.file for part in parts}
        made = [_synced(self.folder, name) for name in names if name not in known]
        if peft.CONFIG not in trees:  # an adapter has one file
            trees = {**trees, INDEX: _index(parts)}
        return made + [_write_json(self.folder, file, tree) for file, tree in trees.items()]

    def _seal(self, parts: list[Part]) -> None:
        files = {p.file: {"bytes": p.num_bytes, "sha256": p.sha256, "tensors": p.tensors} for p in parts}
        manifest = {"format": FORMAT, "step": self.step, "files": files}
        _write_json(self.folder, MANIFEST, {**manifest, "sha256": own_hash(manifest)})

    def publish(self) -> None:
        """Give the folder, whose files are complete and on the disk, the name of the target. At no moment is there neither
        the checkpoint that had it nor this one."""
        for path in (self.folder / "training", self.folder):
            if path.is_dir():
                sync(path)
        old = replaced(self.target)
        with _renaming:
            if self.target.exists():
                discard(old)
                os.replace(self.target, old)
            os.replace(self.folder, self.target)
            sync(self.target.parent)
            discard(old)


_alive: WeakSet[CheckpointWriter] = WeakSet()  # of this process; what others left is of dead ones
_renaming = threading.Lock()


def write_tensors(
    folder: str | Path, stem: str, tensors: Iterable[tuple[str, Tensor]], max_file_bytes: int = MAX_FILE_BYTES
) -> tuple[Part, ...]:
    """Write `{stem}-00.safetensors`, -01 …, none over `max_file_bytes` unless one tensor is; -> the files.

    Tensors are read while this runs: hand over ones that nobody writes to. Raises CheckpointError.
    """
    parts = []
    for number, group in enumerate(_groups(tensors, max_file_bytes)):
        file = f"{stem}-{number:02d}.safetensors"
        parts.append(Part(file, *_write(Path(folder) / file, _safetensors(group)), tuple(group)))
    return tuple(parts)


def discard(path: Path) -> None:
    """Delete a folder that may not be seen half deleted: another name first. Harmless when it is not there."""
    doomed = path.with_name(f"{path.name}.{secrets.token_hex(4)}{DELETED}")
    if path.exists():
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The disk's errors as ours, with the file they are about."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {error.filename or path}: {error.strerror or error}; earlier checkpoints are as they were"
        ) from None


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clean_up(target: Path, alive: set[Path]) -> None:
    """Remove what dead savers of this run, or of this target, left in its parent, and undo a replacement cut short."""
    name = r"step-\d+" if re.fullmatch(r"step-\d+", target.name) else re.escape(target.name)
    left = re.compile(rf"{name}({re.escape(REPLACED)})?\.[0-9a-f]{{8}}({re.escape(PARTIAL)}|{re.escape(DELETED)})")
    for path in list(target.parent.iterdir()):
        if left.fullmatch(path.name) and path not in alive:
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(name + re.escape(REPLACED), path.name):
            original = path.with_name(path.name.removesuffix(REPLACED))
            discard(path) if original.exists() else os.replace(path, original)


def _groups(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > max_bytes:
            yield group
            group, size = {}, 0
        group[name] = tensor.detach()
        size += tensor.nbytes
    if group:
        yield group


def _safetensors(group: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The file's content, piece by piece: length of the header, header, tensors. The widest type comes first, so that all
    lie at multiples of their size."""
    tensors = dict(sorted(group.items(), key=lambda item: -item[1].element_size()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": WRITTEN[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """-> bytes and SHA-256 of what is now on the disk."""
    digest = hashlib.sha256()
    with writing(path), path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _write_json(folder: Path, file: str, tree: Mapping[str, Any]) -> Part:
    return Part(file, *_write(folder / file, [(json.dumps(tree, indent=2) + "\n").encode()]))


def _synced(folder: Path, file: str) -> Part:
    sync(folder / file)
    with (folder / file).open("rb") as content:
        return Part(file, (folder / file).stat().st_size, hashlib.file_digest(content, "sha256").hexdigest())


def _keys_of_experts(config: ModelConfig) -> set[str]:
    return {expert_key(config, i, e, p) for i, held in all_experts(config).items() for e in held for p in PROJECTIONS}


def _check_whole(parts: list[Part], wanted: Collection[str], folder: Path) -> None:
    """Each of the wanted tensors once, and every file where this process can see it."""
    names = Counter(name for part in parts for name in part.tensors)
    if twice := [name for name, count in names.items() if count > 1]:
        raise CheckpointError(f"cannot save {folder}: tensor {twice[0]!r} was written twice")
    if missing := set(wanted).difference(names):
        raise CheckpointError(f"cannot save {folder}: nobody wrote {min(missing)!r} ({len(missing)} tensors missing)")
    for part in parts:
        path = folder / part.file
        if not path.is_file() or path.stat().st_size != part.num_bytes:
            raise CheckpointError(f"{path} is not as it was written; do all nodes see the same file system there?")


def _index(parts: Iterable[Part]) -> dict[str, Any]:
    """`manifest`: a reader that finds none knows that one is missing."""
    weights = [part for part in parts if not part.file.startswith("training/")]
    metadata = {"total_size": sum(part.num_bytes for part in weights), "manifest": MANIFEST}
    return {"metadata": metadata, "weight_map": {t: p.file for p in weights for t in p.tensors}}


def _generation_config(config: ModelConfig, kept: dict[str, Any]) -> dict[str, Any]:
    """The file that is kept, with the model's own ids: training may have given it others."""
    ids = {f"{kind}_token_id": getattr(config, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return kept | {key: value for key, value in ids.items() if value is not None or key not in kept}
