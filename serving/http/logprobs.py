"""Log-probabilities as answers show them: OpenAI's lists for completions, and vLLM's `prompt_logprobs`.

Decisions: a dict of alternatives always has the token itself, so that a client sees whether it is the most likely one. Tokens
of the same text (parts of characters) are one key there, with the larger value. Offsets count the characters of prompt and
answer as the client gets them: a token that ends a character begins where the character does; one that the text does not show
(the first, of a prompt that came as text) has no width. Long prompts go out in parts of PART positions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from trinity.engine.prompt_logprobs import PromptLogprobs
from trinity.engine.request import TokenLogprobs
from trinity.text.detokenizer import IncrementalDecoder, token_text
from trinity.text.tokenizer import Tokenizer

PART = 64
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
Name = Callable[[int], str]
Position = TokenLogprobs | None  # None for a prompt's first token


@dataclass(frozen=True)
class Echo:
    """A prompt that its answer repeats. `start`: where its first token begins in `text`, below 0 where that is not shown."""

    text: str
    start: int = 0

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str, token_ids: Sequence[int]) -> Self:
        """The text as it came, after the special tokens that were put before it; unless the tokens are of another one."""
        shown, before = tokenizer.decode(token_ids), 0
        for token_id in token_ids:
            if shown.startswith(text, before):
                return cls(text, -before)
            if token_id not in tokenizer.special_ids:
                break
            before += len(token_text(tokenizer, token_id))
        return cls(shown)


class Offsets:
    """Places where tokens begin in a text, one after the other; within [0, `end`]."""

    def __init__(self, tokenizer: Tokenizer, start: int, end: int | None = None, skip_special: bool = False):
        self._decoder = IncrementalDecoder(tokenizer, skip_special)
        self._at, self._end = start, end

    def next(self, token_id: int) -> int:
        at = max(0, self._at if self._end is None else min(self._at, self._end))
        self._at += len(self._decoder.push(token_id))
        return at


def namer(tokenizer: Tokenizer, as_ids: bool) -> Name:
    """Names of tokens in log-probabilities: its text, which others may have too, or `token_id:123`."""
    return "token_id:{}".format if as_ids else partial(token_text, tokenizer)


def openai_lists(
    name: Name, token_ids: Sequence[int], positions: Sequence[Position], num_top: int, offsets: Offsets
) -> dict[str, list[Any]]:
    """OpenAI's lists of these tokens; null where nothing is known."""
    values = [position and position.logprob for position in positions]
    top = [position and alternatives(name, position, num_top) for position in positions]
    names = [name(token_id) for token_id in token_ids]
    return dict(zip(LISTS, (names, values, top, [offsets.next(i) for i in token_ids]), strict=True))


def joined_lists(parts: Sequence[dict[str, list[Any]] | None]) -> dict[str, list[Any]]:
    known = [part for part in parts if part is not None]
    return {name: [item for part in known for item in part[name]] for name in LISTS}


def alternatives(name: Name, position: TokenLogprobs, num_top: int) -> dict[str, float]:
    """Name -> log-probability: of the most likely tokens, best first, and of the token itself."""
    found: dict[str, float] = {}
    for token_id, value in (*position.top[:num_top], (position.token_id, position.logprob)):
        text = name(token_id)
        found[text] = max(value, found.get(text, value))
    return found


def in_parts(scores: PromptLogprobs) -> Iterator[tuple[list[int], list[Position]]]:
    """Token ids and what is known of them, some at a time."""
    for start in range(0, len(scores), PART):
        yield scores.token_ids_T[start : start + PART].tolist(), scores.positions(start, start + PART)


def prompt_entries(tokenizer: Tokenizer, positions: Sequence[Position], num_top: int) -> list[dict[str, Any] | None]:
    """Entries of vLLM's list `prompt_logprobs`."""
    return [position and _entry(tokenizer, position, num_top) for position in positions]


def _entry(tokenizer: Tokenizer, position: TokenLogprobs, num_top: int) -> dict[str, Any]:
    """Token id as text -> its log-probability, rank and text: the token itself, then the most likely ones."""
    ranked = {position.token_id: (position.logprob, position.rank)}
    for rank, (token_id, value) in enumerate(position.top[:num_top], 1):
        ranked.setdefault(token_id, (value, rank))
    return {
        str(token_id): {"logprob": value, "rank": rank, "decoded_token": token_text(tokenizer, token_id)}
        for token_id, (value, rank) in ranked.items()
    }
