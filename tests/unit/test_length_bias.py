"""Length bias: long documents have the share that is asked for, from lengths alone, whatever the packing."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from trinity.config import Config, LengthBias
from trinity.data.best_fit import PackedDocuments
from trinity.data.dataset import IGNORE, PackedDataset
from trinity.data.length_bias import beta_of, drawn, share
from trinity.data.rsdb import BufferedDocuments
from trinity.errors import ConfigError, DataError

LENGTHS = np.random.default_rng(0).lognormal(4, 1, 20_000).astype(np.int64).clip(2, 2000)


def store_of(lengths):
    """Documents of these lengths whose tokens are all different."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return SimpleNamespace(tokens=np.arange(starts[-1], dtype=np.uint32), starts_N=starts, trained=None, content="")


@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_long_documents_have_the_share_that_is_asked_for(target):
    bias = LengthBias(tokens=600, share=target)
    found = drawn(LENGTHS, bias, 7)
    copies = np.bincount(found.documents_M, minlength=len(LENGTHS))
    assert share(LENGTHS, 1, 600) < 0.15
    assert share(LENGTHS, copies, 600) == pytest.approx(target, abs=0.01)
    assert (LENGTHS * copies).sum() == pytest.approx(LENGTHS.sum(), rel=0.01), "a pass is as long as it was"
    weights = LENGTHS ** beta_of(LENGTHS, bias)
    expected = weights * (LENGTHS.sum() / (weights * LENGTHS).sum())
    assert (np.abs(copies - expected) < 1 + 1e-6).all(), "each as often as its length says, but for rounding"
    assert np.array_equal(drawn(LENGTHS, bias, 7).documents_M, found.documents_M)
    assert not np.array_equal(drawn(LENGTHS, bias, 8).documents_M[:99], found.documents_M[:99])


@settings(max_examples=40, deadline=None)
@given(st.floats(0.15, 0.6), st.floats(0.001, 0.3))
def test_more_is_asked_by_a_higher_power(target, more):
    low, high = (beta_of(LENGTHS, LengthBias(tokens=600, share=each)) for each in (target, target + more))
    assert 0 < low < high


def test_a_share_that_is_there_already_changes_nothing():
    found = drawn(LENGTHS, LengthBias(tokens=3, share=0.5), 0)
    assert np.array_equal(np.sort(found.documents_M), np.arange(len(LENGTHS)))


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        (
            [10, 20, 30],
            r"make 90.0% of the tokens those of documents of 100 or more: at most 0.0%, the longest document has 30",
        ),
        ([100] + [99] * 99, r"at most 1.1%, the longest document has 100 tokens; lower its share or tokens"),
    ],
)
def test_a_share_that_cannot_be_is_named_with_the_best_that_can(lengths, says):
    with pytest.raises(DataError, match=says):
        drawn(np.array(lengths), LengthBias(tokens=100, share=0.9), 0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=12, max_size=40), st.integers(2, 9), st.integers(0, 9))
def test_every_packing_reads_the_documents_that_were_drawn(lengths, seq_len, seed):
    store, lengths = store_of(lengths), np.array(lengths)
    bias = LengthBias(tokens=int(lengths.max()), share=0.3)
    try:
        found = drawn(lengths, bias, seed)
    except DataError:  # many are about as long as the longest
        reject()
    copies = np.bincount(found.documents_M, minlength=len(lengths))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    stream = PackedDataset(store, seq_len, seed, found)
    whole = stream.take(np.arange(stream.num_sequences))
    for ids, targets, docs in zip(*whole, strict=True):
        starts = owner[ids.numpy()]
        same = docs[1:] == docs[:-1]
        assert (starts[1:][same.numpy()] == starts[:-1][same.numpy()]).all()
        assert torch.equal(ids[1:], targets[:-1])
        assert torch.equal(ids[1:][same], ids[:-1][same] + 1), "within a document the next token follows"
    read = Counter(owner[whole.ids_BS.numpy().ravel()].tolist())
    assert read.total() >= (copies * lengths).sum() - 1 - seq_len
    assert all(num <= copies[n] * lengths[n] for n, num in read.items())
    pieces = PackedDocuments(store, seq_len, seed, found)
    read = Counter(owner[pieces.take(np.arange(pieces.num_sequences)).ids_BS[0].numpy()].tolist())
    assert read == Counter(
        {n: int(c * (size - 1)) for n, (c, size) in enumerate(zip(copies, lengths, strict=True)) if c}
    )
    buffered = BufferedDocuments(store, seq_len, seed, 1, 1, found)
    begun = buffered.documents_of(0)
    assert sorted(next(begun) for _ in found.documents_M) == sorted(found.documents_M.tolist())
    batch = buffered.take(np.arange(6))
    assert (
        (batch.targets_BS == batch.ids_BS + 1) | (batch.targets_BS == IGNORE)
    ).sum() >= batch.ids_BS.numel() - 6 * seq_len // 2


def test_the_order_of_a_biased_source_is_another_one():
    store, found = store_of(LENGTHS), drawn(LENGTHS, LengthBias(tokens=600, share=0.5), 0)
    assert PackedDataset(store, 64, 0, found).facts["length_bias"] == "0.5 from 600"
    assert "length_bias" not in PackedDataset(store, 64, 0).facts


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            {"length_bias": {"tokens": 1, "share": 0.5}},
            "data.length_bias.tokens: Input should be greater than or equal to 2",
        ),
        ({"length_bias": {"tokens": 9, "share": 1.0}}, "data.length_bias.share: Input should be less than 1"),
        ({"length_bias": {"tokens": 9, "share": 0.5}, "format": "chats"}, "length_bias is of text"),
    ],
)
def test_a_bias_that_cannot_be_is_refused(data, says):
    with pytest.raises(ConfigError, match=says):
        Config.from_tree({"model": "tiny", "data": data})
