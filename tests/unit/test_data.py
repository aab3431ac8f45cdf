"""Data in their order: packing loses and repeats nothing, order depends on (seed, step) alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trinity.config import Sequences
from trinity.data.dataset import PackedDataset
from trinity.data.token_store import split
from trinity.errors import DataError

# --- split ----------------------------------------------------------------------------------------------------------

KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=1).map(lambda keys: np.array(keys, np.uint64))
FRACTIONS = st.floats(0, 0.49)


@given(KEYS, FRACTIONS)
def test_split_leaves_text_on_both_sides(keys_N, fraction):
    held_N = split(keys_N, fraction)
    assert not held_N.all()
    assert held_N.any() == (fraction > 0 and len(keys_N) > 1)


@given(KEYS, FRACTIONS, st.randoms())
def test_split_depends_on_content_alone(keys_N, fraction, random):
    order = random.sample(range(len(keys_N)), len(keys_N))
    assert sorted(keys_N[order][split(keys_N[order], fraction)]) == sorted(keys_N[split(keys_N, fraction)])


def test_split_holds_out_about_the_fraction():
    keys_N = np.random.default_rng(0).integers(0, 2**64, 20_000, np.uint64)
    assert split(keys_N, 0.1).mean() == pytest.approx(0.1, rel=0.1)


# --- packing --------------------------------------------------------------------------------------------------------


def store_of(lengths):
    """Documents of these lengths whose tokens are all different."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return SimpleNamespace(tokens=np.arange(100, 100 + starts[-1], dtype=np.uint32), starts_N=starts)


@st.composite
def packings(draw):
    """A dataset of at least one sequence, and a batch size."""
    seq_len = draw(st.integers(2, 9))
    lengths = draw(st.lists(st.integers(2, 12), min_size=seq_len, max_size=30))
    return PackedDataset(store_of(lengths), seq_len, draw(st.integers(-3, 2**40))), draw(st.integers(1, 12))


@given(packings())
def test_an_epoch_holds_every_token_once(packing):
    dataset, batch = packing
    size, tokens = dataset.num_sequences, dataset.store.tokens
    assert len(tokens) - 1 - size * dataset.seq_len in range(dataset.seq_len)
    order = np.concatenate([dataset.sequences(Sequences.nth(step, batch)) for step in range(2 * size)])
    for epoch in range(2):
        taken = dataset.take(order[epoch * size : (epoch + 1) * size])
        assert sorted(taken.ids_BS.flatten().tolist()) == tokens[: size * dataset.seq_len].tolist()
        assert torch.equal(taken.targets_BS, taken.ids_BS + 1), "tokens are numbered, so the next one is one more"


@given(packings())
def test_documents_are_numbered_within_each_sequence(packing):
    dataset, _ = packing
    owner = np.repeat(np.arange(len(dataset.store.starts_N) - 1), np.diff(dataset.store.starts_N))
    batch = dataset.take(np.arange(dataset.num_sequences))
    expected = owner[batch.ids_BS.numpy() - 100]
    assert batch.docs_BS.tolist() == (expected - expected[:, :1]).tolist()


@given(packings(), st.integers(0, 50), st.sampled_from([(1, 1), (2, 3), (4, 1), (3, 2)]))
def test_order_is_the_same_for_any_number_of_workers(packing, step, workers_and_micros):
    dataset, micro_batch = packing
    world, num_micro = workers_and_micros
    total = world * num_micro * micro_batch
    for micro in range(num_micro):
        alone = dataset.batch(Sequences.nth(step, total), 0, 1, micro, world * micro_batch)
        parts = [dataset.batch(Sequences.nth(step, total), rank, world, micro, micro_batch) for rank in range(world)]
        assert all(
            torch.equal(torch.cat(found), want) for found, want in zip(zip(*parts, strict=True), alone, strict=True)
        )


@given(packings(), st.integers(0, 40))
def test_a_resumed_run_continues_the_order(packing, resume):
    dataset, batch = packing
    whole = [dataset.sequences(Sequences.nth(step, batch)).tolist() for step in range(resume + 3)]
    again = PackedDataset(dataset.store, dataset.seq_len, dataset.seed)
    assert [again.sequences(Sequences.nth(step, batch)).tolist() for step in range(resume, resume + 3)] == whole[
        resume:
    ]


def test_epochs_and_seeds_have_orders_of_their_own():
    store = store_of([500])
    orders = [
        PackedDataset(store, 5, seed).sequences(Sequences.nth(epoch, 99)).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(99)) for order in orders)


def test_too_little_text_names_the_numbers():
    dataset = PackedDataset(store_of([4, 4]), 8, 0)
    assert dataset.num_sequences == 0
    with pytest.raises(DataError, match=r"8 tokens of text are less than one sequence of train.seq_len \+ 1 = 9"):
        dataset.batch(Sequences.nth(0, 1), 0, 1, 0, 1)
