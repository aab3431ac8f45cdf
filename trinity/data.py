"""Text for training: find documents, tokenise them once, and cut them into sequences by (seed, step) alone.

Legend: B sequences of a batch, S tokens of a sequence, N documents, P pieces.

Decisions.
- Documents are bos, text, eos, laid end to end in one uint32 array on disk, in an order shuffled by the seed. Sequence
  i is tokens [i S, i S + S] (its last token is only a target), so an epoch sees each token once but for a last part
  shorter than a sequence. Documents are not padded; `docs_BS` tells which tokens may see each other.
- Which sequences a step takes depends on (seed, step, global batch) and on nothing else: no iterator, no state to
  save, the same text for any number of workers.
- What is prepared lies in a folder named by a fingerprint of everything it was made from, is renamed into place when
  complete, and is made once: other processes wait for a file lock, and where locks do not work the first rename wins.
"""

import fcntl
import functools
import glob
import hashlib
import itertools
import json
import logging
import os
import shutil
import sysconfig
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.config import DataConfig, ModelConfig, TrainConfig
from trinity.errors import ConfigError, DataError
from trinity.tokenizer import Tokenizer, cut

FORMAT = 1  # of the stores on disk; part of every fingerprint
BATCH_CHARS = 4 << 20  # tokenised at a time; longer documents in pieces, so that memory stays bounded
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}  # the last two are tables

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """int64. targets_BS[b, s] follows ids_BS[b, s]; docs_BS numbers the documents of each sequence from 0."""

    ids_BS: Tensor
    targets_BS: Tensor
    docs_BS: Tensor


class Prepared(NamedTuple):
    """`val` may hold no sequence (`val.num_sequences == 0`) when the held-out documents are shorter than one."""

    tokenizer: Tokenizer
    train: "PackedDataset"
    val: "PackedDataset"


def prepare(data: DataConfig, train: TrainConfig, model: ModelConfig, out_dir: str | Path) -> Prepared:
    """Tokenizer and packed data, made under `out_dir`/data or reused from there. Safe to call from several processes.

    The tokenizer is `data.tokenizer`, else that of `train.init_from`, else trained on `data.train`. Raises ConfigError
    when it does not fit the model, DataError when text is missing, unreadable or shorter than one sequence.
    """
    folder = Path(out_dir) / "data"
    tokenizer = _tokenizer(data, data.tokenizer or train.init_from, model, folder)
    make = functools.partial(token_stores, data=data, tokenizer=tokenizer, seed=train.seed, folder=folder)
    train_store, val_store = make(data.train, val_fraction=0.0 if data.val else data.val_fraction)
    if data.val:
        val_store, _ = make(data.val, val_fraction=0.0)
    packed = [PackedDataset(store, train.seq_len, train.seed) for store in (train_store, val_store)]
    for dataset in packed if data.val else packed[:1]:
        dataset.require_text()
    if not packed[1].num_sequences:
        logger.warning("%d held-out tokens are no sequence of %d: no validation", len(val_store.tokens), train.seq_len)
    return Prepared(tokenizer, *packed)


def _tokenizer(data: DataConfig, source: str | None, model: ModelConfig, folder: Path) -> Tokenizer:
    if source is None:
        name = f"tokenizer-{_fingerprint(_sources(data.train), data.text_field, data.max_documents, model.vocab_size)}"
        texts = documents(data.train, data.text_field, data.max_documents)
        source = str(_once(folder / name, lambda to: Tokenizer.train(texts, model.vocab_size).save(to)))
    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(f"tokenizer {source} has {tokenizer.vocab_size} ids; model.vocab_size is {model.vocab_size}")
    _require_same("bos", tokenizer.bos_id, model.bos_token_id)
    _require_same("eos", tokenizer.eos_id, model.eos_token_id)
    return tokenizer


def _require_same(kind: str, found: int, wanted: int | None) -> None:
    if wanted is not None and found != wanted:
        raise ConfigError(f"the tokenizer's {kind} id is {found}; model.{kind}_token_id is {wanted}: set it to {found}")


# --- documents ------------------------------------------------------------------------------------------------------


def documents(patterns: Sequence[str], text_field: str = "text", max_documents: int | None = None) -> Iterator[str]:
    """Non-empty texts of files, folders (without hidden and binary files) and globs, in sorted order: `text_field` of
    each line of a .jsonl and row of a .parquet file, the whole of any other file as UTF-8 with errors replaced; the
    word `stdlib` is the modules of Python's standard library, about 10 MB without its tests and tables. Streams.
    Raises DataError."""
    found = (text for pattern in patterns for file in _files(pattern) for text in _read(file, text_field))
    yield from itertools.islice(filter(None, found), max_documents)


def _files(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if pattern == "stdlib":
        files = list(_standard_library())
    elif path.is_file():
        return [path]
    elif path.is_dir():
        files = [file for file in path.rglob("*") if _is_text(file, path)]
    else:
        files = [Path(name) for name in glob.glob(str(path), recursive=True) if _is_text(Path(name), path.parent)]
    if not files:
        raise DataError(f"no text file matches {pattern!r}; give files, folders, globs or the word stdlib")
    return sorted(files)


def _standard_library() -> Iterator[Path]:
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = set(folders) - NOT_STDLIB  # os.walk then does not enter these
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _is_text(file: Path, root: Path) -> bool:
    """Whether a file that was found, not named, holds text: not hidden below `root`, no NUL in its first 8 KiB."""
    hidden = file.is_relative_to(root) and any(part.startswith(".") for part in file.relative_to(root).parts)
    if hidden or not file.is_file():
        return False
    with _opened(file) as stream:
        return file.suffix == ".parquet" or b"\0" not in stream.read(8192)


def _opened(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"{file} cannot be opened: {error.strerror}") from None


def _read(file: Path, field: str) -> Iterator[str]:
    with _opened(file) as stream:
        if file.suffix == ".jsonl":
            yield from (_json_text(line, field, f"{file}:{i}") for i, line in enumerate(stream, 1) if line.strip())
        elif file.suffix == ".parquet":
            yield from _parquet(stream, field, file)
        else:
            yield stream.read().decode("utf-8", "replace")


def _json_text(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}); repair or remove the line") from None
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has no text in {field!r}, only {found or 'nothing'}; set data.text_field")
    return text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair, which is no character


def _parquet(stream: Any, field: str, file: Path) -> Iterator[str]:
    """Row group by row group; rows without a value are no documents."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(stream)
        names = table.schema_arrow.names
        if field not in names:
            raise DataError(f"{file} has no column {field!r}, only {', '.join(names)}; set data.text_field")
        for group in range(table.num_row_groups):
            column = table.read_row_group(group, columns=[field]).column(field)
            yield from (text for text in column.cast(pyarrow.string()).to_pylist() if text)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file with text in {field!r}: {error}") from None


# --- tokens on disk -------------------------------------------------------------------------------------------------


class TokenStore:
    """Tokenised documents in `folder`: `tokens` uint32 (memory-mapped), document n at starts_N[n] : starts_N[n + 1]."""

    def __init__(self, folder: Path):
        try:
            self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
            self.starts_N = np.load(folder / "starts.npy")
        except (OSError, ValueError) as error:
            raise DataError(f"prepared data in {folder} is damaged ({error}); delete that folder") from None


def token_stores(
    patterns: Sequence[str], data: DataConfig, tokenizer: Tokenizer, val_fraction: float, seed: int, folder: Path
) -> tuple[TokenStore, TokenStore]:
    """-> (train, held out), tokenised into `folder` unless they are there already. Raises DataError."""
    facts = [_sources(patterns), data.text_field, data.max_documents, tokenizer.to_json(), val_fraction, seed]
    texts = documents(patterns, data.text_field, data.max_documents)
    done = _once(folder / f"tokens-{_fingerprint(*facts)}", lambda to: _build(to, texts, tokenizer, val_fraction, seed))
    return TokenStore(done / "train"), TokenStore(done / "val")


def _build(folder: Path, texts: Iterator[str], tokenizer: Tokenizer, val_fraction: float, seed: int) -> None:
    """Tokenise in the order of reading, then write the shuffled documents of each part."""
    raw = folder / "raw.bin"
    starts_N, keys_N = _tokenise(texts, tokenizer, seed, raw)
    tokens = np.memmap(raw, np.uint32, "r")
    order_N = np.random.default_rng(seed % 2**64).permutation(len(keys_N))
    held_N = split(keys_N, val_fraction)[order_N]
    for name, chosen in (("train", order_N[~held_N]), ("val", order_N[held_N])):
        _write_part(folder / name, tokens, starts_N, chosen)
    raw.unlink()
    facts = {"documents": len(keys_N), "held_out_documents": int(held_N.sum()), "tokens": len(tokens)}
    (folder / "store.json").write_text(json.dumps(facts))


def split(keys_N: np.ndarray, val_fraction: float) -> np.ndarray:
    """-> bool: which documents are held out, given seeded 64-bit hashes of their content: those in the lowest
    `val_fraction` of the hashes' range, so equal documents share a side and new ones move no other. But where there
    are two documents or more, each side gets one (`val_fraction` 0: all train)."""
    wanted = np.count_nonzero(keys_N < val_fraction * 2.0**64)
    num_val = min(max(wanted, 1), len(keys_N) - 1) if val_fraction else 0
    held_N = np.zeros(len(keys_N), bool)
    held_N[np.argsort(keys_N, kind="stable")[:num_val]] = True
    return held_N


class _Piece(NamedTuple):
    text: str
    is_first: bool
    key: int | None  # the document's hash, with its last piece


def _pieces(texts: Iterator[str], seed: int) -> Iterator[_Piece]:
    for text in texts:
        *rest, last = (_Piece(piece, i == 0, None) for i, piece in enumerate(cut(text)))
        yield from (*rest, last._replace(key=_key(text, seed)))


def _key(text: str, seed: int) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=(seed % 2**64).to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenise(texts: Iterator[str], tokenizer: Tokenizer, seed: int, raw: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write all tokens to `raw`; -> starts_N (N + 1 of them) and keys_N."""
    ends, keys = [0], []
    with raw.open("wb") as out:
        for batch in _batches(_pieces(texts, seed)):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                bos, eos = [tokenizer.bos_id] * piece.is_first, [tokenizer.eos_id] * (piece.key is not None)
                np.array(bos + ids + eos, np.uint32).tofile(out)
                if piece.key is not None:
                    ends.append(out.tell() // 4)
                    keys.append(piece.key)
    if not keys:
        raise DataError("the data holds no text: every document is empty; check data.train and data.val")
    return np.array(ends, np.int64), np.array(keys, np.uint64)


def _write_part(folder: Path, tokens: np.ndarray, starts_N: np.ndarray, chosen: np.ndarray) -> None:
    folder.mkdir()
    new_starts_N = np.concatenate([[0], np.cumsum(np.diff(starts_N)[chosen])]).astype(np.int64)
    np.save(folder / "starts.npy", new_starts_N)
    header = {"descr": "<u4", "fortran_order": False, "shape": (int(new_starts_N[-1]),)}
    with (folder / "tokens.npy").open("wb") as out:
        np.lib.format.write_array_header_1_0(out, header)
        for n in chosen:
            tokens[starts_N[n] : starts_N[n + 1]].tofile(out)


def _fingerprint(*facts: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *facts]).encode()).hexdigest()[:16]


def _sources(patterns: Sequence[str]) -> list[Any]:
    """What tells whether the files changed. Python's own are told by size: their dates differ between machines."""
    own = sysconfig.get_path("stdlib")
    return [
        [str(file.relative_to(own)), file.stat().st_size]
        if pattern == "stdlib"
        else [str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns]
        for pattern in patterns
        for file in _files(pattern)
    ]


def _once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, complete: built beside it and renamed, unless it exists. Raises DataError when it cannot be written."""
    scratch = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                scratch.mkdir()
                build(scratch)
                scratch.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process, without locks, was faster
            raise DataError(
                f"cannot write prepared data to {folder} ({error}); free space or set train.out_dir"
            ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


# --- sequences ------------------------------------------------------------------------------------------------------


class PackedDataset:
    """Sequences of `seq_len` tokens from a store, in an order shuffled anew in each epoch."""

    def __init__(self, store: TokenStore, seq_len: int, seed: int):
        self.store, self.seq_len, self.seed = store, seq_len, seed % 2**64
        self.num_sequences = max(len(store.tokens) - 1, 0) // seq_len
        self._permutation = functools.lru_cache(maxsize=2)(self._new_permutation)

    def require_text(self) -> None:
        """Raise DataError unless there is one whole sequence."""
        if not self.num_sequences:
            raise DataError(
                f"{len(self.store.tokens)} tokens of text are less than one sequence of train.seq_len + 1 = "
                f"{self.seq_len + 1}; give more text or a smaller train.seq_len"
            )

    def sequences(self, step: int, global_batch: int) -> np.ndarray:
        """Indices of the sequences of `step` (0, 1, …), int64 [global_batch]. Every run of num_sequences of them,
        over all steps, holds each index once."""
        self.require_text()
        nth = np.arange(step * global_batch, (step + 1) * global_batch)
        epochs, places = np.divmod(nth, self.num_sequences)
        return np.array([self._permutation(int(e))[p] for e, p in zip(epochs, places, strict=True)], np.int64)

    def batch(
        self, step: int, global_batch_size: int, rank: int, world: int, micro: int, micro_batch_size: int
    ) -> Batch:
        """Micro-batch `micro` of worker `rank`: B = micro_batch_size. The step's sequences go to the workers micro by
        micro, so (world 2, B 4) and (world 1, B 8) put the same sequences in micro-batch m."""
        first = (micro * world + rank) * micro_batch_size
        assert first + micro_batch_size <= global_batch_size, "this micro-batch lies outside the global batch"
        return self.take(self.sequences(step, global_batch_size)[first : first + micro_batch_size])

    def take(self, sequences_B: np.ndarray) -> Batch:
        """The sequences with these indices."""
        at_BS = sequences_B[:, None] * self.seq_len + np.arange(self.seq_len)
        docs_BS = np.searchsorted(self.store.starts_N, at_BS, side="right")
        arrays = self.store.tokens[at_BS], self.store.tokens[at_BS + 1], docs_BS - docs_BS[:, :1]
        return Batch(*(torch.from_numpy(array.astype(np.int64)) for array in arrays))

    def _new_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_sequences)
