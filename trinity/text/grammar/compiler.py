"""Grammars of the library from constraints, and their matchers, with bounds on what they may cost.

Decisions: the limits are the library's own and count work, so that the same text is refused on any machine. `oneOf` is read as
`anyOf`: whether an answer matches one branch only cannot be seen before it is complete. Where a text is certain, the library
would have it in tokens of its choice; the model may take any.
"""

import json
import re
from collections.abc import Callable

import numpy as np
from llguidance import LLMatcher, LLParserLimits

from trinity.text.grammar.constraint import Constraint, Kind
from trinity.text.grammar.lark import embedded, quoted
from trinity.text.grammar.schemas import OBJECT, bounded
from trinity.text.grammar.tools import tools_grammar
from trinity.text.grammar.vocabulary import Vocabulary

FREE_TOKENS = '\n%llguidance {"no_forcing": true}'
MAX_LEXER_STATES = 20_000  # one or two kilobytes each
NO_TEXT = "no text can follow it, or none of this model's tokens"
NUM_PATHS, NUM_STEPS = 2, 48  # of answers that are tried before one is admitted


def grammar(constraint: Constraint, vocabulary: Vocabulary) -> str:
    """The constraint in Lark's notation. Raises ValueError for a schema over our bounds."""
    return BODIES[constraint.kind](constraint, vocabulary.names) + FREE_TOKENS


def _json(constraint: Constraint, _: frozenset[str]) -> str:
    schema = bounded(json.loads(constraint.text), constraint.is_closed)
    return f"start: {embedded(schema, constraint.whitespace)}"


def _choice(constraint: Constraint, _: frozenset[str]) -> str:
    return "start: " + "\n  | ".join(map(quoted, json.loads(constraint.text)))


def _regex(constraint: Constraint, _: frozenset[str]) -> str:
    return str(json.loads(LLMatcher.grammar_from_regex(constraint.text))["grammars"][0]["lark_grammar"])


BODIES: dict[Kind, Callable[[Constraint, frozenset[str]], str]] = {
    "json": _json,
    "json_object": lambda constraint, _: f"start: {embedded(OBJECT, constraint.whitespace)}",
    "regex": _regex,
    "choice": _choice,
    "grammar": lambda constraint, _: constraint.text,
    "tools": lambda constraint, names: tools_grammar(json.loads(constraint.text), names),
}


def matcher(grammar: str, vocabulary: Vocabulary) -> LLMatcher:
    """At the beginning of an answer; may run for seconds, without Python's lock. Raises ValueError for what it refuses."""
    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    found = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=limits)
    if found.is_error():
        raise ValueError(reason(found))
    return found


def reason(failed: LLMatcher) -> str:
    """The library's reason, without its listing of the grammar."""
    said = re.split(r"\n *\d+ \| ", failed.get_error().removesuffix("<non-verbose/>"))[0]
    return NO_TEXT if "NoExtension" in said else f"{' '.join(said.split())[:300]}; simplify it"


def mask_V(matcher: LLMatcher, size: int) -> np.ndarray:
    """Which of `size` tokens may come next: bool [V]. Runs without Python's lock; leaves the matcher where it is."""
    words = np.zeros((size + 31) // 32, np.int32)
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    return np.unpackbits(words.view(np.uint8), count=size, bitorder="little").view(np.bool_)


def try_out(start: LLMatcher, size: int) -> None:
    """Walk some way into answers, as some errors only show there. Raises ValueError."""
    for path in range(NUM_PATHS):
        at, rng = start.deep_copy(), np.random.default_rng(path)
        for _ in range(NUM_STEPS):
            allowed = np.flatnonzero(mask_V(at, size))
            if at.is_error():
                raise ValueError(reason(at))
            if not len(allowed):
                raise ValueError(NO_TEXT)
            at.consume_token(int(rng.choice(allowed)))
            if at.is_stopped():
                break
