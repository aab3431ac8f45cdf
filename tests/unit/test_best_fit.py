"""Best fit: everything is there once, what fits is whole, and the room is full."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_trainer import config_for, texts, trainer_for  # noqa: F401  a fixture
from trinity.config import Config
from trinity.data.best_fit import PackedDocuments, best_fit
from trinity.errors import ConfigError, DataError
from trinity.models.common.losses import IGNORE


def store_of(lengths):
    """Documents of these lengths whose tokens are all different."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(100, 100 + starts[-1], dtype=np.uint32)
    return SimpleNamespace(tokens=tokens, starts_N=starts, trained=None, content="")


@settings(max_examples=200, deadline=None)
@given(places=st.lists(st.integers(0, 30), max_size=60))
def test_each_is_placed_once_and_where_the_least_room_is_left(places):
    found = best_fit(np.array(places, np.int64), 30)
    assert [n for n, at in enumerate(found) if at < 0] == [n for n, size in enumerate(places) if not size]
    rooms = Counter(dict.fromkeys(range(found.max(initial=-1) + 1), 30))
    for n in sorted(range(len(places)), key=lambda n: -places[n]):
        if places[n]:
            least = min((room for room in rooms.values() if places[n] <= room < 30), default=30)
            assert rooms[found[n]] == least
            rooms[found[n]] -= places[n]


@pytest.mark.parametrize("seed", range(3))
def test_a_log_normal_mix_of_lengths_fills_the_room(seed):
    places_N = np.random.default_rng(seed).lognormal(6.0, 1.0, 20_000).astype(np.int64).clip(1, 4096)
    found = best_fit(places_N, 4096)
    assert np.bincount(found, places_N).max() <= 4096
    assert (found >= 0).all(), "nothing is dropped"
    assert places_N.sum() / (4096 * (found.max() + 1)) >= 0.98


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(2, 12), st.integers(0, 9))
def test_documents_that_fit_are_whole_and_of_others_nothing_is_lost(lengths, seq_len, seed):
    store = store_of(lengths)
    dataset = PackedDocuments(store, seq_len, seed)
    assert dataset.num_sequences >= -(-sum(max(n - 1, 0) for n in lengths) // seq_len)
    if not dataset.num_sequences:
        with pytest.raises(DataError, match="no document has two tokens"):
            dataset.require_text()
        return
    epoch = dataset.indices(np.arange(dataset.num_sequences))
    pieces = []
    for at in epoch:
        ids, targets, docs = (each[0] for each in dataset.take(np.array([at])))
        assert len(ids) == dataset.num_tokens(np.array([at])) <= seq_len
        assert torch.equal(targets, ids + 1)
        pieces += [ids[docs == doc].tolist() for doc in docs.unique()]
    assert all(piece == list(range(piece[0], piece[0] + len(piece))) for piece in pieces)
    read = sorted(token for piece in pieces for token in piece)
    wanted = [store.tokens[a : b - 1] for a, b in zip(store.starts_N, store.starts_N[1:], strict=False) if b > a]
    assert read == np.concatenate(wanted).tolist(), "each token but the last of a document is read once"
    whole = {(int(a) + 100, int(b - a - 1)) for a, b in zip(store.starts_N, store.starts_N[1:], strict=False)}
    found = {(piece[0], len(piece)) for piece in pieces}
    assert {(first, num) for first, num in whole if 0 < num <= seq_len} <= found


def test_a_batch_is_its_sequences_end_to_end():
    dataset = PackedDocuments(store_of([5, 9, 3, 4, 7, 2, 2]), 8, 0)
    at = dataset.indices(np.arange(dataset.num_sequences))
    whole, alone = dataset.take(at), [dataset.take(at[n : n + 1]) for n in range(len(at))]
    assert torch.equal(whole.ids_BS, torch.cat([each.ids_BS for each in alone], 1))
    assert torch.equal(whole.targets_BS, torch.cat([each.targets_BS for each in alone], 1))
    nums = [int(each.docs_BS.max()) + 1 for each in alone]
    assert torch.equal(whole.docs_BS.unique(), torch.arange(sum(nums)))


def test_text_so_packed_trains_the_same_whatever_the_micro_batches_and_resumes_bitwise(texts, tmp_path):  # noqa: F811
    def config(out, **train):
        return config_for(texts, tmp_path / out, **train).replace(data={"packing": "best_fit"})

    found = []
    for micro in (1, 2, 4):
        metrics = trainer_for(config(str(micro), micro_batch_size=micro)).step()
        found.append([metrics.loss, metrics.balance_loss, metrics.grad_norm])
    assert np.allclose(found, found[0], rtol=1e-5)
    whole = trainer_for(config("whole"))
    want = [whole.step().loss for _ in range(4)]
    first = trainer_for(config("cut"))
    losses = [first.step().loss for _ in range(2)]
    first.save()
    second = trainer_for(config("cut"))
    assert losses + [second.step().loss for _ in range(2)] == want
    with pytest.raises(ConfigError, match="packing is 'best_fit', not None"):
        trainer_for(config_for(texts, tmp_path / "cut"))


def test_it_needs_the_mask():
    with pytest.raises(ConfigError, match="intra_document_mask false goes with text alone, in packing stream or rsdb"):
        Config.from_tree({"model": "tiny", "data": {"packing": "best_fit", "intra_document_mask": False}})


def test_ignore_is_the_losses_own():
    from trinity.data.dataset import IGNORE as OURS

    assert OURS == IGNORE
