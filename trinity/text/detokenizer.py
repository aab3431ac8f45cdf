"""Text that may be shown from token ids: incremental decoding, and stop strings across token boundaries."""

import codecs
from collections.abc import Collection
from typing import Protocol

from trinity.text.tokenizer import Tokenizer


class Decoder(Protocol):
    """One request's incremental detokenizer (IncrementalDecoder)."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """The text of one request. Whatever may still become a stop string is held back; a stop string never comes out,
    unless it is to be shown; then it is the end of the text.

    `stopped_by` is the stop string once one has appeared; nothing is emitted after it.
    """

    def __init__(self, decoder: Decoder, stop: tuple[str, ...] = (), shows_stop: bool = False):
        self._decoder, self._stop, self._shows_stop = decoder, stop, shows_stop
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        """-> the text that this token makes certain; may be empty."""
        return self._emit(self._decoder.push(token_id), final=False)

    def finish(self) -> str:
        """-> all that was held back. Call once, at the end."""
        return self._emit(self._decoder.flush(), final=True)

    def _emit(self, piece: str, *, final: bool) -> str:
        if self.stopped_by is not None:
            return ""
        text = self._held + piece
        found = [(text.index(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, self.stopped_by = min(found)
            self._held = ""
            return text[: end + len(self.stopped_by) * self._shows_stop]
        keep = 0 if final else possible_end(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class IncrementalDecoder:
    """Turns a stream of ids into text: `push` returns what is finished and holds back at most 3 bytes of a character.

    The pushes and the flush joined are `tokenizer.decode` of all ids. Constant time per token. One stream each.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        known = 0 <= token_id < len(self._bytes) and token_id not in self._skipped
        return self._utf8.decode(self._bytes[token_id]) if known else ""

    def flush(self) -> str:
        """The end: an unfinished character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def possible_end(text: str, wanted: Collection[str]) -> int:
    """Length of the longest end of `text` that begins one of the wanted texts, and is not all of it."""
    longest = max(map(len, wanted), default=0)
    for size in range(min(len(text), longest - 1), 0, -1):
        if any(each.startswith(text[-size:]) for each in wanted):
            return size
    return 0


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Bytes of one token; none for ids that pad the vocabulary."""
    table = tokenizer.token_bytes
    return table[token_id] if token_id < len(table) else b""


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    return token_bytes(tokenizer, token_id).decode("utf-8", "replace")
