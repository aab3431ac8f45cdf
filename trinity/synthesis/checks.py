"""Checks of an answer: each names why it is left out, or nothing.

Decisions: cheap ones come first, and the first that fails is the reason. They look at words, scripts and lengths alone: no
model judges. The thresholds of repetition and of the overlap with benchmarks (13 words in a row) are those that Gopher
(arXiv 2112.11446, table A1) and GPT-3 (arXiv 2005.14165, appendix C) made common.
"""

import functools
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from trinity.config import ChecksConfig, Template
from trinity.data.documents import documents, files
from trinity.data.formats import ROWS, kind_of, rows
from trinity.synthesis.words import grams_G, units

LEAST_SHARE = 0.1  # a script with fewer of a passage's letters is not the passage's
REPEATED, COPIED = 4, 8  # units of the runs that are compared
LEAST_WORDS = 8  # a shorter question of a benchmark is in many texts
BEGINNING = 200  # characters in which a refusal shows
TOGETHER = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "HANGUL": "CJK", "IDEOGRAPHIC": "CJK"}  # scripts of one language


def left_out(
    answer: str, finish: str | None, passage: str, template: Template, checks: ChecksConfig, known: "Benchmarks"
) -> str | None:
    """The first reason to leave an answer out; None to keep it."""
    if not answer.strip():
        return "empty"
    if checks.whole and finish not in ("stop", None):
        return "cut off" if finish == "length" else f"ended by {finish}"
    least, most = template.length_ratio
    if not least * len(passage.strip()) <= len(answer.strip()) <= most * len(passage.strip()):
        return "length"
    return _of_words(answer, passage, checks, known)


def _of_words(answer: str, passage: str, checks: ChecksConfig, known: "Benchmarks") -> str | None:
    words = units(answer)
    if is_refusal(answer, checks.refusals):
        return "refusal"
    if checks.same_script is not None and shared_script(answer, passage) < checks.same_script:
        return "script"
    if checks.max_repetition is not None and repetition(words) > checks.max_repetition:
        return "repetition"
    if checks.max_copied is not None and copied(words, units(passage)) > checks.max_copied:
        return "copied"
    return "benchmark" if known.has_some_of(words) else None


def is_refusal(answer: str, phrases: Iterable[str]) -> bool:
    """Say whether the answer's beginning has one of the phrases."""
    begun = answer.strip()[:BEGINNING].lower().replace("\u2019", "'")
    return any(phrase.lower() in begun for phrase in phrases)


def shared_script(answer: str, passage: str) -> float:
    """Share of the answer's letters whose script is one of the passage's; 1 where either has no letters."""
    theirs, ours = scripts(passage), scripts(answer)
    kept = {script for script, num in theirs.items() if num >= LEAST_SHARE * theirs.total()}
    return sum(ours[script] for script in kept) / ours.total() if ours and kept else 1.0


def scripts(text: str) -> Counter[str]:
    """Numbers of letters by script."""
    found = Counter[str]()
    for char, num in Counter(text).items():
        if char.isalpha():
            found[_script(char)] += num
    return found


@functools.lru_cache(1 << 16)
def _script(char: str) -> str:
    name = unicodedata.name(char, "?").partition(" ")[0]
    return TOGETHER.get(name, name)


def repetition(words: list[str]) -> float:
    """Share of the runs of REPEATED units that were there before; 0 for a text that is too short to have two."""
    found_G = grams_G(words, REPEATED)
    return 1 - len(np.unique(found_G)) / len(found_G) if len(found_G) > 1 else 0.0


def copied(words: list[str], theirs: list[str]) -> float:
    """Share of the runs of COPIED units that are the passage's, too; of a shorter text 1 where the passage has it whole."""
    n = min(COPIED, len(words))
    found_G = grams_G(words, n)
    return float(np.isin(found_G, grams_G(theirs, n)).mean()) if n else 0.0


class Benchmarks:
    """Runs of words that are questions of benchmarks: sorted numbers, by how many words they have."""

    def __init__(self, texts: Iterable[str], n: int):
        found: dict[int, list[np.ndarray]] = {}
        for text in texts:
            words = units(text)
            if len(words) >= min(LEAST_WORDS, n):
                size = min(n, len(words))
                found.setdefault(size, []).append(grams_G(words, size))
        self._known = {size: np.unique(np.concatenate(each)) for size, each in found.items()}

    @classmethod
    def of(cls, patterns: Sequence[str], n: int) -> "Benchmarks":
        """Read files, folders and globs: every text in every field of a row, or a text whole. Raises DataError."""
        return cls((text for pattern in patterns for file in files(pattern) for text in _texts(file)), n)

    def has_some_of(self, words: list[str]) -> bool:
        return any(_any_in(grams_G(words, size), known_G) for size, known_G in self._known.items())


def _any_in(found_G: np.ndarray, known_G: np.ndarray) -> bool:
    """Say whether one of the numbers is among sorted ones."""
    places_G = np.minimum(np.searchsorted(known_G, found_G), len(known_G) - 1)
    return bool((known_G[places_G] == found_G).any())


def _texts(file: Any) -> Iterator[str]:
    if kind_of(file)[0] not in ROWS:
        yield from documents([str(file)])
        return
    for _, row in rows(file):
        yield from _inside(row)


def _inside(value: Any) -> Iterator[str]:
    """All texts in a value, at any depth."""
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _inside(each)
