"""Documents as tokens on disk, tokenised once.

Legend: N documents, P pieces.

Decisions.
- Documents are bos, text, eos, laid end to end in one uint32 array, in the order of seeded hashes of their content: shuffled,
  and the same however files are called, listed and cut. `content` tells two stores apart; a run goes on with its own alone.
- What is prepared lies in a folder named by a fingerprint of everything it was made from, is renamed into place when
  complete, and is made once: other processes wait for a file lock, and where locks do not work the first rename wins.
"""

import fcntl
import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trinity.config import DataConfig
from trinity.data.documents import documents, stamps
from trinity.errors import DataError
from trinity.text.tokenizer import Tokenizer, cut

FORMAT = 2  # of the stores on disk; part of every fingerprint
BATCH_CHARS = 4 << 20  # tokenised at a time; longer documents in pieces, so that memory stays bounded


logger = logging.getLogger(__name__)


class TokenStore:
    """Tokenised documents in `folder`: `tokens` uint32 (memory-mapped), document n at starts_N[n] : starts_N[n + 1]; `trained`
    bool says of each whether it is a target, None: all are."""

    def __init__(self, folder: Path):
        try:
            self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
            self.starts_N = np.load(folder / "starts.npy")
            self.content = (folder / "content").read_text() if (folder / "content").is_file() else ""
            has_some = (folder / "trained.npy").is_file()
            self.trained = np.load(folder / "trained.npy", mmap_mode="r") if has_some else None
        except (OSError, ValueError) as error:
            raise DataError(f"prepared data in {folder} is damaged ({error}); delete that folder") from None


def token_stores(
    patterns: Sequence[str], data: DataConfig, tokenizer: Tokenizer, val_fraction: float, seed: int, folder: Path
) -> tuple[TokenStore, TokenStore]:
    """-> (train, held out), tokenised into `folder` unless they are there already. Raises DataError."""
    facts = [stamps(patterns), data.text_field, data.max_documents, tokenizer.to_json(), val_fraction, seed]
    facts += ["without bos"] if tokenizer.bos_id is None else []
    texts = documents(patterns, data.text_field, data.max_documents)
    before = folder / f"tokens-{fingerprint(*facts, form=1)}"  # of a run that began when documents had another order
    name = before.name if before.is_dir() else f"tokens-{fingerprint(*facts)}"
    done = made_once(folder / name, lambda to: _build(to, texts, tokenizer, val_fraction, seed))
    return TokenStore(done / "train"), TokenStore(done / "val")


def _build(folder: Path, texts: Iterator[str], tokenizer: Tokenizer, val_fraction: float, seed: int) -> None:
    """Tokenise in the order of reading, then write the shuffled documents of each part."""
    raw = folder / "raw.bin"
    starts_N, keys_N = _tokenise(texts, tokenizer, seed, raw)
    tokens = np.memmap(raw, np.uint32, "r")
    order_N = np.argsort(keys_N, kind="stable")
    held_N = split(keys_N, val_fraction)[order_N]
    for name, chosen in (("train", order_N[~held_N]), ("val", order_N[held_N])):
        documents = (tokens[starts_N[n] : starts_N[n + 1]] for n in chosen)
        write_documents(folder / name, documents, np.diff(starts_N)[chosen])
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
    begin, end = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
    with raw.open("wb") as out:
        for batch in _batches(_pieces(texts, seed)):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                bos, eos = begin * piece.is_first, end * (piece.key is not None)
                np.array(bos + ids + eos, np.uint32).tofile(out)
                if piece.key is not None:
                    ends.append(out.tell() // 4)
                    keys.append(piece.key)
    if not keys:
        raise DataError("the data holds no text: every document is empty; check data.train and data.val")
    return np.array(ends, np.int64), np.array(keys, np.uint64)


def write_documents(
    folder: Path, documents: Iterable[np.ndarray], lengths_N: np.ndarray, trained: Iterable[np.ndarray] | None = None
) -> None:
    """Write what a TokenStore reads: uint32 tokens of documents of these lengths, and for each whether it is trained."""
    folder.mkdir(parents=True, exist_ok=True)
    starts_N = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
    np.save(folder / "starts.npy", starts_N)
    content = hashlib.blake2b(starts_N.tobytes(), digest_size=16)
    _write(folder / "tokens.npy", "<u4", documents, int(starts_N[-1]), content.update)
    if trained is not None:
        _write(folder / "trained.npy", "|b1", trained, int(starts_N[-1]), content.update)
    (folder / "content").write_text(content.hexdigest())


def _write(file: Path, kind: str, pieces: Iterable[np.ndarray], num: int, told: Callable[[memoryview], object]) -> None:
    """One array of all pieces, which are never held together; `told` hears of their bytes."""
    with file.open("wb") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": False, "shape": (num,)})
        for piece in pieces:
            told(np.ascontiguousarray(piece).data)
            piece.tofile(out)


def fingerprint(*facts: Any, form: int = FORMAT) -> str:
    return hashlib.sha256(json.dumps([form, *facts]).encode()).hexdigest()[:16]


def made_once(folder: Path, build: Callable[[Path], None]) -> Path:
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
