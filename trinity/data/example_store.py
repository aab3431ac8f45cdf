"""Rows of examples on disk, made once: those of a row stay together, in their order, with what is trained beside the tokens."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from trinity.data.chat_tokens import Example
from trinity.data.token_store import TokenStore, made_once, split, write_documents
from trinity.errors import DataError


def example_stores(
    folder: Path, found: Iterator[Sequence[Example]], val_fraction: float, seed: int
) -> tuple[TokenStore, TokenStore]:
    """-> (train, held out) of rows of examples, in the order of seeded hashes of their content, unless `folder` is there
    already. Raises DataError where there is no row."""
    done = made_once(folder, lambda to: _build(to, found, val_fraction, seed))
    return TokenStore(done / "train"), TokenStore(done / "val")


def _build(folder: Path, found: Iterator[Sequence[Example]], val_fraction: float, seed: int) -> None:
    """Write all examples as they come, then those of each part."""
    ids, trained = folder / "ids.bin", folder / "trained.bin"
    lengths_N, keys_N = _written(found, seed, ids, trained)
    if not len(keys_N):
        raise DataError("the data holds no row with an answer to train on; check data.train and data.val")
    ends_N = np.cumsum(lengths_N)
    held_N, order_N = split(keys_N, val_fraction), np.argsort(keys_N, kind="stable")
    for name, chosen in (("train", order_N[~held_N[order_N]]), ("val", order_N[held_N[order_N]])):
        pieces = [slice(ends_N[n] - lengths_N[n], ends_N[n]) for n in chosen]
        kinds = ((ids, np.uint32), (trained, bool))
        tokens, masks = (map(np.memmap(file, kind, "r").__getitem__, pieces) for file, kind in kinds)
        write_documents(folder / name, tokens, lengths_N[chosen], masks)
    ids.unlink()
    trained.unlink()


def _written(found: Iterator[Sequence[Example]], seed: int, ids: Path, trained: Path) -> tuple[np.ndarray, np.ndarray]:
    """(lengths_N, keys_N) of the examples that are in these files now; those of one row share a key."""
    lengths, keys = list[int](), list[int]()
    with ids.open("wb") as ids_out, trained.open("wb") as trained_out:
        for row in found:
            keys += [_key(row, seed)] * len(row)
            for example in row:
                np.array(example.ids, np.uint32).tofile(ids_out)
                np.array(example.is_trained, bool).tofile(trained_out)
                lengths.append(len(example.ids))
    return np.array(lengths, np.int64), np.array(keys, np.uint64)


def _key(row: Sequence[Example], seed: int) -> int:
    digest = hashlib.blake2b(digest_size=8, salt=(seed % 2**64).to_bytes(8, "little"))
    for example in row:
        digest.update(np.array(example.ids, np.uint32).data)
    return int.from_bytes(digest.digest(), "little")
