"""Tokens that a request forbids until later, for ever, or but for a few: min_tokens, bad_words, allowed_token_ids; and the one
that must come when its thinking_token_budget is spent.

Host code, without torch: the sampler masks what is said here.
Decisions: the rules are a function of the generated tokens alone, so batching and preemption do not change an answer. A bad
word is tokenised with and without a space before it; its last token is forbidden where the others stand at the end of what was
generated. Rules never forbid everything: bad words give way first, then min_tokens, because a row without any token is what
damaged weights look like. The token that a spent budget asks for goes before all of them: it is all that is left.
"""

from array import array
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from trinity.engine.request import SamplingParams
from trinity.text.grammar.progress import reasoning_end
from trinity.text.reasoning import MARKERS

if TYPE_CHECKING:
    from trinity.text.tokenizer import Tokenizer

NONE = frozenset[int]()


class Encoder(Protocol):
    """The part of a tokenizer that bad words need."""

    def encode_batch(self, texts: Sequence[str], add_special: bool = False) -> list[list[int]]: ...


class BadWords:
    """Words by their tokens. A prefix is kept as the bytes of its ids, which compares as fast as memory is read."""

    def __init__(self, words_ids: Collection[Sequence[int]]):
        self._always = frozenset(ids[0] for ids in words_ids if len(ids) == 1)
        self._by_last: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
        for *prefix, last in words_ids:
            if prefix:
                self._by_last[prefix[-1]].append((_packed(prefix), last))
        self._longest = max(map(len, words_ids), default=0)

    def banned(self, generated_ids: Sequence[int]) -> frozenset[int]:
        """Tokens that would complete a word now."""
        found = self._by_last.get(generated_ids[-1]) if generated_ids else None
        if not found:
            return self._always
        tail = _packed(generated_ids[-self._longest :])
        return self._always | {last for prefix, last in found if tail.endswith(prefix)}


def _packed(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


def read_words(words: Sequence[str], encoder: Encoder) -> BadWords:
    """The words as tokens. Takes up to half a second for a million characters: on a thread, beside a running engine."""
    if not words:
        return BadWords(())
    bare = [word.lstrip() or word for word in words]
    ids = encoder.encode_batch([*bare, *(f" {word}" for word in bare)])
    return BadWords({tuple(each) for each in ids if each})


class ThinkingBudget:
    """Tokens of reasoning that an answer may have, over all its blocks. `is_open`: the prompt ends inside one.

    `generated_ids` only grows from call to call, so each token is counted once."""

    def __init__(self, budget: int, begins: int | None, ends: int, is_open: bool):
        self._left, self._begins, self._ends, self._is_open, self._num_seen = budget, begins, ends, is_open, 0

    def forced(self, generated_ids: Sequence[int]) -> int | None:
        """The token that ends the reasoning, where that has to come next."""
        for token_id in generated_ids[self._num_seen :]:
            if token_id in (self._begins, self._ends):
                self._is_open = token_id == self._begins
            elif self._is_open:
                self._left -= 1
        self._num_seen = len(generated_ids)
        return self._ends if self._is_open and self._left <= 0 else None


class TokenRules:
    """Tokens that one request may draw next. `ends` are the tokens that would end its text."""

    def __init__(
        self,
        params: SamplingParams,
        ends: Collection[int],
        words: BadWords,
        vocab_size: int,
        thinking: ThinkingBudget | None = None,
    ):
        self.allowed = None if params.allowed_token_ids is None else frozenset(params.allowed_token_ids)
        self._ends, self._min_tokens, self._words = frozenset(ends), params.min_tokens, words
        self._vocab_size, self._thinking = vocab_size, thinking

    def forced(self, generated_ids: Sequence[int]) -> int | None:
        """The one token that may come next, whatever else is said here."""
        return None if self._thinking is None else self._thinking.forced(generated_ids)

    def banned(self, generated_ids: Sequence[int]) -> frozenset[int]:
        """Tokens that may not come next, of the allowed ones; never all of them."""
        ends = self._ends if len(generated_ids) < self._min_tokens else NONE
        words = self._words.banned(generated_ids)
        return next(banned for banned in (ends | words, ends, NONE) if self._leaves_any(banned))

    def _leaves_any(self, banned: frozenset[int]) -> bool:
        return len(banned) < self._vocab_size if self.allowed is None else not self.allowed <= banned


def rules_of(
    params: SamplingParams,
    eos_ids: Collection[int],
    words: BadWords,
    vocab_size: int,
    thinking: ThinkingBudget | None = None,
) -> TokenRules | None:
    """The rules of a request, if it has any."""
    if not (params.min_tokens or params.bad_words or params.allowed_token_ids or thinking):
        return None
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
    return TokenRules(params, [i for i in ends if i < vocab_size], words, vocab_size, thinking)


def thinking_budget(
    params: SamplingParams, prompt_ids: Sequence[int], tokenizer: "Tokenizer", eos_ids: Sequence[int]
) -> "ThinkingBudget | None":
    """The budget of a request, where it has one and its tokenizer the marker that ends reasoning."""
    if params.thinking_token_budget is None:
        return None
    begins, ends = map(tokenizer.id_of, MARKERS)
    if ends is None:
        return None
    is_open = reasoning_end(prompt_ids, begins, ends, eos_ids) is not None
    return ThinkingBudget(params.thinking_token_budget, begins, ends, is_open)
