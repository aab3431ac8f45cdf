"""Passages: documents cut by tokens where a paragraph ends, or else a line, a sentence, a word, a token.

Decisions: nothing is lost: the passages of a document, end to end, are the document. A piece is measured alone, and a passage
is as long as its pieces together; what lies around a piece may change its tokens by one or two.
"""

import re
from collections.abc import Iterator
from itertools import pairwise

from trinity.text.tokenizer import Tokenizer

ENDS = tuple(
    re.compile(end)
    for end in (r"(?<=\n)[^\S\n]*\n+(?=.)", r"(?<=\n)(?=.)", r"(?<=[.!?])\s+(?=.)|(?<=[。！？])(?=.)", r"(?<=\s)(?=\S)")
)


def passages(text: str, tokenizer: Tokenizer, most: int) -> Iterator[str]:
    """Pieces of a text, end to end, of at most so many tokens each."""
    held, num_held = list[str](), 0
    for piece, num in _pieces(text, tokenizer, most, 0):
        if held and num_held + num > most:
            yield "".join(held)
            held, num_held = [], 0
        held.append(piece)
        num_held += num
    if held:
        yield "".join(held)


def _pieces(text: str, tokenizer: Tokenizer, most: int, level: int) -> Iterator[tuple[str, int]]:
    """(piece, tokens): paragraphs where they are short enough, or else what they consist of."""
    if level == len(ENDS):
        yield from _by_tokens(text, tokenizer, most)
        return
    parts = _cut(text, ENDS[level])
    for part, ids in zip(parts, tokenizer.encode_batch(parts), strict=True):
        if len(ids) <= most:
            yield part, len(ids)
        else:
            yield from _pieces(part, tokenizer, most, level + 1)


def _cut(text: str, end: re.Pattern[str]) -> list[str]:
    """The text in pieces, each with the blank that ends it."""
    places = [0, *(found.end() for found in end.finditer(text)), len(text)]
    return [text[start:stop] for start, stop in pairwise(places) if start < stop]


def _by_tokens(text: str, tokenizer: Tokenizer, most: int) -> Iterator[tuple[str, int]]:
    """Runs of characters of at most so many tokens: halves of halves, because a token may end within a character."""
    num = len(tokenizer.encode(text))
    if num <= most or len(text) == 1:
        yield text, num
        return
    middle = len(text) // 2
    for half in (text[:middle], text[middle:]):
        yield from _by_tokens(half, tokenizer, most)
