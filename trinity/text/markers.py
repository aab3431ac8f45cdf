"""Places of markers (<think>, <tool_call>, ...) stand in an answer, and the text between them.

Decisions: a marker that the tokenizer has as a token is that token and nothing else; one that it has not is found in the text,
across tokens. What is shown is the engine's text alone, which knows of stop strings and of tokens that are left out: ids only
say whose characters these are. So text may come later than its tokens, and of cut tokens only a part.
"""

import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from trinity.text.detokenizer import Decoder, possible_end


class Piece(NamedTuple):
    """Text of (a part of) one token. `marker` is its name where the token is one; its text is then empty if it is hidden."""

    text: str
    marker: str = ""
    ends_token: bool = True


class TokenPieces:
    """The engine's text, cut at its tokens. `marker_by_id` names the tokens that are markers."""

    def __init__(self, decoder: Decoder, marker_by_id: Mapping[int, str]):
        self._decoder, self._marker_by_id = decoder, marker_by_id
        self._waiting = deque[tuple[str, int]]()  # of each token: its marker, and how many characters are to come
        self._text = ""

    def push(self, token_ids: Sequence[int], text: str) -> Iterator[Piece]:
        """Pieces that these tokens and this text make certain. Text that no token accounts for is for `finish`."""
        for token_id in token_ids:
            self._waiting.append((self._marker_by_id.get(token_id, ""), len(self._decoder.push(token_id))))
        self._text += text
        while self._waiting and (len(self._text) >= self._waiting[0][1] or (self._text and not self._waiting[0][0])):
            yield from self._next(*self._waiting.popleft())

    def finish(self) -> str:
        """The rest of the text."""
        rest, self._text = self._text, ""
        return rest

    def _next(self, marker: str, size: int) -> Iterator[Piece]:
        shown, self._text = self._text[:size], self._text[size:]
        if missing := size - len(shown):
            self._waiting.appendleft((marker, missing))
        before = shown.removesuffix(marker) if marker else ""  # a character that was left unfinished
        if before:
            yield Piece(before, ends_token=False)
        yield Piece(shown[len(before) :], marker, not missing)


class TextMarkers:
    """Markers in the text itself. What may become one is held back."""

    def __init__(self, markers: Collection[str]):
        self._markers = tuple(markers)
        self._pattern = re.compile("|".join(map(re.escape, self._markers))) if self._markers else None
        self._held = ""

    def split(self, text: str) -> Iterator[Piece]:
        text = self._held + text
        start = 0
        for found in self._pattern.finditer(text) if self._pattern else ():
            yield Piece(text[start : found.start()])
            yield Piece(found.group(), found.group())
            start = found.end()
        keep = possible_end(text[start:], self._markers)
        self._held = text[len(text) - keep :]
        yield Piece(text[start : len(text) - keep])

    def flush(self) -> Piece:
        held, self._held = self._held, ""
        return Piece(held)
