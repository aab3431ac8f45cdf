"""Permutations: each place once whatever the size, the old order of few, and none that needs a table of many."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.data import shuffle
from trinity.data.shuffle import TABLE, Feistel, permutation


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 9))
def test_each_place_is_there_once(num, seed, epoch):
    assert np.array_equal(np.sort(Feistel(num, [seed, epoch])[np.arange(num)]), np.arange(num))


@pytest.mark.parametrize("num", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_each_of_many_places_is_there_once_and_far_from_where_it_was(num):
    found = Feistel(num, [0, 0])[np.arange(num)]
    assert np.bincount(found, minlength=num).max() == 1
    assert abs(np.corrcoef(np.arange(num), found)[0, 1]) < 0.01
    steps = np.abs(np.diff(found)) / num
    assert steps.mean() == pytest.approx(1 / 3, abs=0.01), "neighbours are as far apart as strangers"
    other = Feistel(num, [0, 1])[np.arange(num)]
    assert np.count_nonzero(found == other) < 20


def test_few_have_the_order_that_they_always_had(monkeypatch):
    assert permutation(99, [7, 1])[np.arange(99)].tolist() == np.random.default_rng([7, 1]).permutation(99).tolist()
    monkeypatch.setattr(shuffle, "TABLE", 98)
    assert isinstance(permutation(99, [7, 1]), Feistel)


def peak_of(num):
    """Bytes to look up the places of a step of 12,288 sequences."""
    tracemalloc.start()
    found = permutation(num, [0, 0])[np.arange(12_288) + num // 2]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 <= found.min() <= found.max() < num
    return peak


def test_an_order_of_2e9_needs_no_memory():
    """Its table would be 16 GB."""
    assert peak_of(2_000_000_000) < 2 << 20
    assert peak_of(TABLE) >= 8 * TABLE, "of few a table is held"
