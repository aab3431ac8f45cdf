"""Prompts that answers are drawn to, each with its row: whatever else a reward function is to know.

Decisions: `messages`, or a `prompt` that is a list of them, are rendered as a server would render them; a `prompt` that is a
text is taken as it is, as /v1/completions takes it. Prompts lie on disk as documents do (token_store.py), rows beside them as
JSON. Which prompts a step takes depends on (seed, step) alone.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trinity.config import DataConfig
from trinity.data.chats import Conversation
from trinity.data.dataset import Packed
from trinity.data.documents import files, stamps
from trinity.data.formats import rows, say_once
from trinity.data.kept import fingerprint, made_once
from trinity.data.token_store import TokenStore, split, write_documents
from trinity.errors import DataError, InvalidRequest
from trinity.text.conversation import Chat, render
from trinity.text.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """Tokens to answer to, and the row that they come from."""

    ids: list[int]
    row: dict[str, Any]


class PromptStore(TokenStore):
    """Tokens of prompts, and the row of each."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._rows = np.load(folder / "rows.npy", mmap_mode="r")
        self._row_starts_N = np.load(folder / "row_starts.npy")

    def prompt(self, n: int) -> Prompt:
        ids = self.tokens[self.starts_N[n] : self.starts_N[n + 1]].tolist()
        return Prompt(ids, json.loads(self._rows[self._row_starts_N[n] : self._row_starts_N[n + 1]].tobytes()))


def prompt_stores(
    patterns: Sequence[str], data: DataConfig, tokenizer: Tokenizer, val_fraction: float, seed: int, folder: Path
) -> tuple[TokenStore, TokenStore]:
    """-> (train, held out): prompts of the rows in these files, unless they are there already. Raises DataError."""
    facts = ["prompts", stamps(patterns), data.max_documents, tokenizer.to_json(), tokenizer.chat_template]
    found = prompts_of(patterns, partial(prompt_ids, tokenizer), data.max_documents)
    name = f"prompts-{fingerprint(*facts, val_fraction, seed)}"
    done = made_once(folder / name, lambda to: _build(to, list(found), val_fraction, seed))
    return PromptStore(done / "train"), PromptStore(done / "val")


IdsOf = Callable[[dict[str, Any], str], list[int]]  # of a row and its place, the tokens to answer to


def prompts_of(patterns: Sequence[str], ids_of: IdsOf, most: int | None = None) -> Iterator[Prompt]:
    """The prompts of these files, in their order, of each file `most`. Raises DataError that names the place of a row that has
    none."""
    for file in (file for pattern in patterns for file in files(pattern)):
        for where, row in islice(rows(file), most):
            if not isinstance(row, dict):
                raise DataError(f"{where} is a {type(row).__name__}; it is an object with messages or a prompt")
            yield Prompt(ids_of(row, where), row)


def prompt_ids(tokenizer: Tokenizer, row: dict[str, Any], where: str) -> list[int]:
    """Tokens that an answer to a row's prompt follows, as a server of the model would have them. Raises DataError."""
    if (chat := chat_of(row, where)) is None:
        return tokenizer.encode(row["prompt"], add_special=True)
    try:
        return tokenizer.encode(render(chat, tokenizer))
    except InvalidRequest as error:
        raise DataError(f"{where}: {error.message}") from None


def chat_of(row: dict[str, Any], where: str) -> Chat | None:
    """The conversation that a row's answer is to; None where its prompt is a text. Raises DataError."""
    prompt = row.get("messages", row.get("prompt"))
    if prompt is None:
        raise DataError(f"{where} has {', '.join(sorted(row)) or 'nothing'}; it is to have messages, or a prompt")
    if isinstance(prompt, str) and "messages" not in row:
        return None
    told = {"messages": prompt, "tools": row.get("tools"), "chat_template_kwargs": row.get("chat_template_kwargs")}
    chat = Conversation.of(told, where).chat
    if chat.messages[-1]["role"] == "assistant":
        raise DataError(
            f"{where} ends with an answer; leave that out of the messages: it is what the model is to write"
        )
    return replace(chat, add_generation_prompt=True)


def _build(folder: Path, prompts: list[Prompt], val_fraction: float, seed: int) -> None:
    if not prompts:
        raise DataError("the data holds no prompt; check data.train and data.val")
    texts = [json.dumps(prompt.row).encode() for prompt in prompts]
    keys_N = np.array([_key(text, seed) for text in texts], np.uint64)
    order_N, held_N = np.argsort(keys_N, kind="stable"), split(keys_N, val_fraction)
    for name, chosen in (("train", order_N[~held_N[order_N]]), ("val", order_N[held_N[order_N]])):
        _write(folder / name, [prompts[n].ids for n in chosen], [texts[n] for n in chosen])


def _key(text: bytes, seed: int) -> int:
    digest = hashlib.blake2b(text, digest_size=8, salt=(seed % 2**64).to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def _write(folder: Path, ids: list[list[int]], texts: list[bytes]) -> None:
    lengths_N = np.array([len(each) for each in ids], np.int64)
    write_documents(folder, (np.array(each, np.uint32) for each in ids), lengths_N)
    np.save(folder / "row_starts.npy", np.cumsum([0, *(len(text) for text in texts)]).astype(np.int64))
    np.save(folder / "rows.npy", np.frombuffer(b"".join(texts), np.uint8))
    content = (folder / "content").read_bytes() + b"".join(texts)  # another answer to check against is other data
    (folder / "content").write_text(hashlib.blake2b(content, digest_size=16).hexdigest())


class PackedPrompts(Packed):
    """Prompts that leave room for an answer within `seq_len`."""

    store: PromptStore

    def __init__(self, store: TokenStore, seq_len: int, seed: int):
        super().__init__(store, seq_len, seed)
        lengths_N = np.diff(store.starts_N)
        self.rows = np.flatnonzero((lengths_N > 0) & (lengths_N < seq_len))
        self.num_sequences = len(self.rows)
        if num := len(lengths_N) - len(self.rows):
            say_once(
                f"{num:,} of {len(lengths_N):,} prompts are left out, they leave no room within train.seq_len {seq_len}"
            )

    def _too_little(self) -> str:
        return (
            f"no prompt leaves room for an answer within train.seq_len {self.seq_len}; raise it, or give shorter ones"
        )

    def take(self, sequences_B: np.ndarray) -> list[Prompt]:
        return [self.store.prompt(int(self.rows[at])) for at in sequences_B]
