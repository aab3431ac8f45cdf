"""Vocabularies as the grammar library reads them: which bytes each token stands for, and which have a name instead.

Legend: V vocabulary, the model's: ids beyond the tokenizer's have no bytes and are in no grammar.
"""

import hashlib
import json
from array import array
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper


@dataclass(frozen=True)
class Vocabulary:
    """Bytes of each token, V of them; those of `special_ids` are their names, and stand for nothing that a text can hold."""

    tokens: tuple[bytes, ...]
    special_ids: frozenset[int]
    eos_ids: tuple[int, ...]

    @classmethod
    def of(
        cls, tokens: Collection[bytes], special_ids: Collection[int], eos_ids: Collection[int], size: int
    ) -> "Vocabulary":
        """Make that of a tokenizer, for a model of `size` tokens."""
        table = (*tokens, *[b""] * (size - len(tokens)))[:size]
        ends = tuple(i for i in eos_ids if i < size)
        return cls(table, frozenset(i for i in {*special_ids, *ends} if i < size), ends)

    @property
    def names(self) -> frozenset[str]:
        """Tokens that a grammar may name, such as <tool_call>."""
        return frozenset(self.tokens[i].decode("utf-8", "replace") for i in self.special_ids)

    @cached_property
    def packed(self) -> bytes:
        """All of it, for another process."""
        head = {"special": sorted(self.special_ids), "eos": self.eos_ids, "size": len(self.tokens)}
        lengths = array("I", map(len, self.tokens)).tobytes()
        return json.dumps(head).encode() + b"\n" + lengths + b"".join(self.tokens)

    @classmethod
    def unpacked(cls, packed: bytes) -> "Vocabulary":
        line, _, rest = packed.partition(b"\n")
        head = json.loads(line)
        lengths = array("I")
        at = head["size"] * lengths.itemsize
        lengths.frombytes(rest[:at])
        tokens = []
        for length in lengths:
            tokens.append(rest[at : at + length])
            at += length
        return cls(tuple(tokens), frozenset(head["special"]), tuple(head["eos"]))

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.packed).hexdigest()

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """The library's own table; it takes a second of a large vocabulary."""
        return LLTokenizer(TokenizerWrapper(_Table(self)), n_vocab=len(self.tokens), eos_token=list(self.eos_ids))


class _Table:
    """The part of a tokenizer that the library asks for. Where the next bytes are certain it looks for tokens of theirs: any
    will do."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary):
        self.eos_token_id = vocabulary.eos_ids[0]
        self.tokens, self.special_token_ids = vocabulary.tokens, sorted(vocabulary.special_ids)
        self._of_byte = {token[0]: i for i, token in enumerate(self.tokens) if len(token) == 1}

    def __call__(self, text: Any) -> list[int]:
        return [self._of_byte[byte] for byte in text if byte in self._of_byte]
