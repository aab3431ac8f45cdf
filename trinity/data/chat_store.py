"""Conversations as examples on disk: shards as of documents (shards.py), with what is trained beside the tokens."""

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trinity.config import DataConfig
from trinity.data.chat_tokens import Example, control_in, examples
from trinity.data.chats import Conversation
from trinity.data.documents import Found
from trinity.data.formats import rows
from trinity.data.kept import fingerprint
from trinity.data.listing import listed
from trinity.data.shards import TOKENS, TRAINED, Recipe
from trinity.data.token_store import SourceShards, TokenStore, made_stores, shards_cache, write_order
from trinity.text.tokenizer import Tokenizer

Files = Mapping[str, Sequence[Found]]  # by pattern


class ExampleRecipe(Recipe):
    """Rows of examples; those of one row share a digest, so that they stay together and in their order."""

    @abstractmethod
    def rows(self, found: Found, left_out: Counter[str]) -> Iterator[Sequence[Example]]:
        """Examples of each row of a file that has some; counts what is left out, by why."""

    def write(self, found: Found, to: Path) -> tuple[Sequence[int], Sequence[int], Counter[str]]:
        lengths, digests, left_out = list[int](), list[int](), Counter[str]()
        with (to / TOKENS[0]).open("wb") as ids_out, (to / TRAINED[0]).open("wb") as trained_out:
            for row in self.rows(found, left_out):
                digests += [_digest(row)] * len(row)
                for example in row:
                    np.array(example.ids, np.uint32).tofile(ids_out)
                    np.array(example.is_trained, bool).tofile(trained_out)
                    lengths.append(len(example.ids))
        return lengths, digests, left_out


class ChatRecipe(ExampleRecipe):
    """Examples of conversations."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer):
        self.last_only, self.most, self.tokenizer = data.train_on == "last", data.max_documents, tokenizer

    @cached_property
    def facts(self) -> list[Any]:
        template = self.tokenizer.chat_template
        made_by = fingerprint(self.tokenizer.to_json(), template, *other_ends(self.tokenizer))
        return ["chats", self.last_only, self.most, made_by]

    def rows(self, found: Found, left_out: Counter[str]) -> Iterator[Sequence[Example]]:
        for where, row in islice(rows(found.file), self.most):
            conversation = Conversation.of(row, where)
            if control := control_in(conversation, self.tokenizer):
                left_out[f"conversations with the control token {control} as text"] += 1
            elif each := examples(conversation, self.tokenizer, where, self.last_only):
                yield each
            else:
                left_out["conversations without an answer to train on"] += 1


def chat_stores(
    patterns: Sequence[str], data: DataConfig, tokenizer: Tokenizer, val_fraction: float, seed: int, folder: Path
) -> tuple[TokenStore, TokenStore]:
    """-> (train, held out): examples of the conversations in these files, unless they are there already. Raises DataError."""
    found = listed(patterns, folder)
    stamps = [each.stamp for pattern in patterns for each in found[pattern]]
    facts: list[Any] = [
        "chats",
        stamps,
        data.max_documents,
        data.train_on,
        tokenizer.to_json(),
        tokenizer.chat_template,
        *other_ends(tokenizer),
    ]
    facts += [val_fraction, seed]
    before, recipe = folder / f"chats-{fingerprint(*facts, form=2)}", ChatRecipe(data, tokenizer)
    if before.is_dir():  # of a run that began with an older release
        return TokenStore(before / "train"), TokenStore(before / "val")

    store = f"chats-{fingerprint(*facts)}"
    return example_stores(
        store, folder, recipe, found, data, val_fraction, seed, "conversation with an answer to train on"
    )


def example_stores(
    store: str,
    folder: Path,
    recipe: ExampleRecipe,
    found: Files,
    data: DataConfig,
    val_fraction: float,
    seed: int,
    what: str,
) -> tuple[TokenStore, TokenStore]:
    """-> (train, held out) in `store` of `folder`, made unless they are there. `what` a row is, in words. Raises DataError."""

    def build(to: Path) -> None:
        cache = shards_cache(data, folder)
        sources = (SourceShards(pattern, list(recipe.all_made(files, cache))) for pattern, files in found.items())
        write_order(to, sources, val_fraction, seed, what=what)

    return made_stores(store, build, data, folder)


def other_ends(tokenizer: Tokenizer) -> list[list[int]]:
    """Tokens other than eos that end an answer: a fact of examples where there are some, and else none, as before."""
    others = sorted(tokenizer.end_ids - {tokenizer.eos_id})
    return [others] if others else []


def _digest(found: Sequence[Example]) -> int:
    """A hash of its tokens, 64 bits; by an older release's salt, 0, so that its orders stay."""
    digest = hashlib.blake2b(digest_size=8, salt=bytes(8))
    for example in found:
        digest.update(np.array(example.ids, np.uint32).data)
    return int.from_bytes(digest.digest(), "little")
