"""Duplicates: equal documents by a hash, nearly equal ones by MinHash.

Legend: P permutations, B bands, R rows of a band (P = B R).

Decisions: MinHash (Broder 1997) over runs of GRAM units, P functions by multiply and shift. Documents that share a band of R
values are candidates; one is a duplicate where the share of equal values among all P, an estimate of the Jaccard similarity
with a standard error of sqrt(s (1 - s) / P) <= 0.045, reaches the threshold. R follows from the threshold, so that a document
at the threshold shares a band with a probability of 0.95 or more. The index holds 1 KB a document in memory, in this process.
"""

import functools
import hashlib
from collections import defaultdict

import numpy as np

from trinity.config import DedupConfig
from trinity.synthesis.words import grams_G, mixed, units

P, GRAM = 128, 5
FOUND = 0.95  # of documents at the threshold become candidates


class Duplicates:
    """The documents that were kept so far. `reason_of` tells of a further one, `add` takes it in; the first one stays."""

    def __init__(self, settings: DedupConfig):
        self._exact, self._near = settings.exact, settings.near
        self._seen = set[bytes]()
        self._signatures: list[np.ndarray] = []
        self._bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        self._rows = rows_for(settings.near) if settings.near else 0

    def reason_of(self, text: str) -> str | None:
        """ "duplicate", "near duplicate", or None for a document that is new."""
        if self._exact and _hash(text) in self._seen:
            return "duplicate"
        return "near duplicate" if self._near and self._is_near(signature_P(text), self._near) else None

    def add(self, text: str) -> None:
        self._seen.add(_hash(text))
        if self._near:
            values_P = signature_P(text)
            for band in self._bands_of(values_P):
                self._bands[band].append(len(self._signatures))
            self._signatures.append(values_P)

    def _is_near(self, values_P: np.ndarray, threshold: float) -> bool:
        candidates = {number for band in self._bands_of(values_P) for number in self._bands.get(band, ())}
        return any((self._signatures[number] == values_P).mean() >= threshold for number in candidates)

    def _bands_of(self, values_P: np.ndarray) -> list[tuple[int, bytes]]:
        size = self._rows
        return [(start, _short(values_P[start : start + size])) for start in range(0, P - size + 1, size)]


def rows_for(threshold: float) -> int:
    """The longest band with which FOUND of all documents of that similarity share one."""
    return max(rows for rows in (1, 2, 4, 8, 16, 32) if rows == 1 or 1 - (1 - threshold**rows) ** (P // rows) >= FOUND)


@functools.lru_cache(maxsize=1)  # asked about, then taken in
def signature_P(text: str) -> np.ndarray:
    """The least value of each function over the runs of words: uint32. A short text is one run."""
    words = units(text)
    found_G = np.unique(grams_G(words, min(GRAM, max(1, len(words)))))
    if not len(found_G):
        found_G = np.frombuffer(_hash(text), np.uint64)[:1]
    values_GP = (found_G[:, None] * _FACTORS_P + _TERMS_P) >> np.uint64(32)
    least_P: np.ndarray = values_GP.min(axis=0).astype(np.uint32)
    return least_P


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def _short(values: np.ndarray) -> bytes:
    return hashlib.blake2b(values.tobytes(), digest_size=8).digest()


_FACTORS_P = mixed(np.arange(1, P + 1, dtype=np.uint64)) | np.uint64(1)
_TERMS_P = mixed(np.arange(P + 1, 2 * P + 1, dtype=np.uint64))
