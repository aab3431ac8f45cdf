"""A permutation of 0 .. n - 1 from a seed: a table of a few, arithmetic for many.

Decisions. Up to TABLE the order is numpy's own, which runs have had from the beginning. Of more no table is held: an index is
found by itself, by a Feistel network over the next power of two that is applied again until it falls below n (cycle walking:
Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002), which takes less than two rounds of it on average. That is a
bijection whatever the round function; ours mixes as splitmix64 does, and keeps no secrets.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

TABLE = 1 << 22  # 32 MiB
ROUNDS = 6  # an even number: the halves have changed places and are as wide as before
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Order(Protocol):
    """A permutation: what is at some places of it."""

    def __getitem__(self, places: np.ndarray) -> np.ndarray: ...


def permutation(num: int, seed: Sequence[int]) -> Order:
    """The permutation of `num` that a seed gives."""
    return np.random.default_rng(seed).permutation(num) if num <= TABLE else Feistel(num, seed)


class Feistel:
    """A permutation without a table; `num` up to 2^62."""

    def __init__(self, num: int, seed: Sequence[int]):
        bits = max(2, (num - 1).bit_length())
        self.num, self._left, self._right = num, bits // 2, bits - bits // 2
        self._keys = np.random.default_rng(seed).integers(0, 2**64, ROUNDS, np.uint64)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """int64, of places below `num`."""
        found = self._mixed(np.asarray(places).astype(np.uint64))
        while (outside := np.flatnonzero(found >= self.num)).size:
            found[outside] = self._mixed(found[outside])
        return found.astype(np.int64)

    def _mixed(self, values: np.ndarray) -> np.ndarray:
        wide, narrow = self._right, self._left
        left, right = values >> np.uint64(wide), values & _mask(wide)
        for key in self._keys:
            left, right = right, (left ^ _hashed(right + key)) & _mask(narrow)
            wide, narrow = narrow, wide
        return (left << np.uint64(wide)) | right


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _hashed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64; products wrap."""
    values = (values ^ (values >> np.uint64(30))) * FIRST
    values = (values ^ (values >> np.uint64(27))) * SECOND
    values ^= values >> np.uint64(31)
    return values
