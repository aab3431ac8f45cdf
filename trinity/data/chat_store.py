"""Conversations as examples on disk, made once: as documents are (token_store.py), with what is trained beside the tokens."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from trinity.config import DataConfig
from trinity.data.chat_tokens import Example, control_in, examples
from trinity.data.chats import Conversation
from trinity.data.documents import files, stamps
from trinity.data.formats import rows, say_once
from trinity.data.token_store import TokenStore, fingerprint, made_once, split, write_documents
from trinity.errors import DataError
from trinity.text.tokenizer import Tokenizer


def chat_stores(
    patterns: Sequence[str], data: DataConfig, tokenizer: Tokenizer, val_fraction: float, seed: int, folder: Path
) -> tuple[TokenStore, TokenStore]:
    """-> (train, held out): examples of the conversations in these files, unless they are there already. Raises DataError."""
    facts = ["chats", stamps(patterns), data.max_documents, data.train_on, tokenizer.to_json(), tokenizer.chat_template]
    found = _all_examples(patterns, data, tokenizer)
    name = f"chats-{fingerprint(*facts, val_fraction, seed)}"
    done = made_once(folder / name, lambda to: _build(to, found, val_fraction, seed))
    return TokenStore(done / "train"), TokenStore(done / "val")


def _all_examples(patterns: Sequence[str], data: DataConfig, tokenizer: Tokenizer) -> Iterator[list[Example]]:
    """Those of each conversation; says what is left out."""
    last_only, most = data.train_on == "last", data.max_documents
    for file in (file for pattern in patterns for file in files(pattern)):
        left_out = Counter[str]()
        for where, row in islice(rows(file), most):
            conversation = Conversation.of(row, where)
            if control := control_in(conversation, tokenizer):
                left_out[f"hold the control token {control} as text"] += 1
            elif found := examples(conversation, tokenizer, where, last_only):
                yield found
            else:
                left_out["have no answer to train on"] += 1
        for why, num in left_out.items():
            say_once(f"{file}: {num:,} conversations are left out, they {why}")


def _build(folder: Path, conversations: Iterator[list[Example]], val_fraction: float, seed: int) -> None:
    """Write all examples as they come, then those of each part, in the order that documents have."""
    ids, trained = folder / "ids.bin", folder / "trained.bin"
    lengths_N, keys_N = _written(conversations, seed, ids, trained)
    if not len(keys_N):
        raise DataError("the data holds no conversation with an answer to train on; check data.train and data.val")
    ends_N = np.cumsum(lengths_N)
    held_N, order_N = split(keys_N, val_fraction), np.argsort(keys_N, kind="stable")
    for name, chosen in (("train", order_N[~held_N[order_N]]), ("val", order_N[held_N[order_N]])):
        pieces = [slice(ends_N[n] - lengths_N[n], ends_N[n]) for n in chosen]
        sides = (
            map(np.memmap(file, kind, "r").__getitem__, pieces) for file, kind in ((ids, np.uint32), (trained, bool))
        )
        tokens, masks = sides
        write_documents(folder / name, tokens, lengths_N[chosen], masks)
    ids.unlink()
    trained.unlink()


def _written(
    conversations: Iterator[list[Example]], seed: int, ids: Path, trained: Path
) -> tuple[np.ndarray, np.ndarray]:
    """(lengths_N, keys_N) of the examples that are in these files now; those of one conversation share a key."""
    lengths, keys = list[int](), list[int]()
    with ids.open("wb") as ids_out, trained.open("wb") as trained_out:
        for found in conversations:
            keys += [_key(found, seed)] * len(found)
            for example in found:
                np.array(example.ids, np.uint32).tofile(ids_out)
                np.array(example.is_trained, bool).tofile(trained_out)
                lengths.append(len(example.ids))
    return np.array(lengths, np.int64), np.array(keys, np.uint64)


def _key(found: Sequence[Example], seed: int) -> int:
    digest = hashlib.blake2b(digest_size=8, salt=(seed % 2**64).to_bytes(8, "little"))
    for example in found:
        digest.update(np.array(example.ids, np.uint32).data)
    return int.from_bytes(digest.digest(), "little")
