"""A random sequential document buffer: everything once, in an order that lengths and the seed give, mixed as it should be."""

import itertools
import json
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_trainer import config_for, texts, trainer_for  # noqa: F401  a fixture
from trinity.config import Sequences
from trinity.data import slot_states
from trinity.data.dataset import IGNORE, PackedDataset
from trinity.data.rsdb import BufferedDocuments, Draws, Slot
from trinity.data.slot_states import SlotStates
from trinity.errors import ConfigError, DataError
from trinity.pool.ledger import Decision
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer
from trinity.train.validation import Recent


def store_of(lengths):
    """Documents of these lengths whose tokens are all different; the one before last of each is not its end."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return SimpleNamespace(tokens=np.arange(100, 100 + starts[-1], dtype=np.uint32), starts_N=starts)


@st.composite
def buffers(draw):
    seq_len, num_slots = draw(st.integers(2, 9)), draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 25), min_size=num_slots + seq_len, max_size=40))
    return BufferedDocuments(store_of(lengths), seq_len, draw(st.integers(0, 99)), num_slots, draw(st.integers(1, 8)))


def spans(dataset, slot, num):
    return [dataset._slots.setdefault(slot, Slot(dataset, slot)).sequence(n) for n in range(num)]


@settings(deadline=None, max_examples=60)
@given(buffers())
def test_each_document_is_read_whole_and_in_order(dataset):
    """As often as it was begun, but for what is in the buffer still: so tokens out are tokens in."""
    for slot in range(dataset.num_slots):
        found = list(itertools.chain(*spans(dataset, slot, 40)))
        begun = [document for document, head, _ in found if head == 0]
        assert sum(num for *_, num in found) == 40 * dataset.seq_len
        read = Counter()
        for document, head, num in found:
            read.update((document, place) for place in range(head, head + num))
        for document in set(begun):
            times = [read[document, place] for place in range(dataset.lengths_N[document])]
            assert times == sorted(times, reverse=True), "from its beginning on"
        unread = sum(read[document, 0] - read[document, dataset.lengths_N[document] - 1] for document in set(begun))
        assert unread <= 2 * dataset.num_buffered
        handed_out = itertools.islice(dataset.documents_of(slot), len(begun) + 2 * dataset.num_buffered)
        assert not Counter(begun) - Counter(handed_out)
    each = len(dataset.lengths_N) // dataset.num_slots
    owned = [set(itertools.islice(dataset.documents_of(slot), each)) for slot in range(dataset.num_slots)]
    assert all(not one & other for one, other in itertools.combinations(owned, 2)), (
        "slots share no document of an epoch"
    )


@settings(deadline=None, max_examples=60)
@given(buffers(), st.integers(0, 12))
def test_an_order_is_replayed_from_lengths_and_the_seed(dataset, later):
    """As a worker that takes over does, which has read nothing of what came before."""
    numbers = np.arange(8 * dataset.num_slots)
    first = dataset.take(numbers)
    again = BufferedDocuments(dataset.store, dataset.seq_len, dataset.seed, dataset.num_slots, dataset.num_buffered)
    at = later * dataset.num_slots % len(numbers)
    assert torch.equal(again.take(numbers[at : at + 1]).ids_BS, first.ids_BS[at : at + 1])
    assert torch.equal(again.take(numbers[:1]).ids_BS, first.ids_BS[:1]), "and back"


@settings(deadline=None, max_examples=60)
@given(buffers(), st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]))
def test_targets_are_what_follows_and_workers_share_the_step(dataset, shape):
    world, size = shape
    total = 4 * dataset.num_slots
    alone = dataset.batch(Sequences.nth(3, total), 0, 1, 0, total)
    for ids_S, targets_S, docs_S in zip(*alone, strict=True):
        for document in docs_S.unique():
            ids, targets = ids_S[docs_S == document].tolist(), targets_S[docs_S == document].tolist()
            assert ids == list(range(ids[0], ids[0] + len(ids)))
            ends = ids[-1] - 99 in dataset.store.starts_N
            assert targets == [*ids[1:], IGNORE if ends else ids[-1] + 1]
    if total % (world * size) == 0:
        parts = {
            (micro, rank): dataset.batch(Sequences.nth(3, total), rank, world, micro, size)
            for micro in range(total // (world * size))
            for rank in range(world)
        }
        assert torch.equal(torch.cat([parts[key].ids_BS for key in sorted(parts)]), alone.ids_BS)


@settings(deadline=None, max_examples=40)
@given(buffers(), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_state_that_is_kept_saves_the_way_to_it(dataset, numbers):
    """From wherever a slot stands, forwards and back, with states of before and those that it writes itself."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_states, "EVERY", 5)
        shape = dataset.seq_len, dataset.seed, dataset.num_slots, dataset.num_buffered
        want = [dataset.take(np.array([n * dataset.num_slots])) for n in range(61)]
        for _ in range(2):
            kept = BufferedDocuments(dataset.store, *shape, None, SlotStates(Path(folder)))
            for n in numbers:
                assert all(map(torch.equal, kept.take(np.array([n * dataset.num_slots])), want[n]))
        filled = []
        patch.setattr(Slot, "_filled", lambda slot, fill=Slot._filled: filled.append(1) or fill(slot))
        last = max(numbers)
        again = BufferedDocuments(dataset.store, *shape, None, SlotStates(Path(folder)))
        assert all(map(torch.equal, again.take(np.array([last * dataset.num_slots])), want[last]))
        assert len(filled) <= 5


def test_states_that_are_damaged_or_cannot_be_written_cost_a_replay(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(slot_states, "EVERY", 5)
    store = store_of([7] * 40)
    want = BufferedDocuments(store, 6, 0, 2, 3).take(np.array([44])).ids_BS
    for _ in range(2):
        kept = BufferedDocuments(store, 6, 0, 2, 3, None, SlotStates(tmp_path / "kept"))
        assert torch.equal(kept.take(np.array([44])).ids_BS, want)
        files = sorted((tmp_path / "kept").iterdir())
        assert [file.name for file in files] == ["0-10.npy", "0-15.npy", "0-20.npy", "0-5.npy"]
        for damage, file in enumerate(files):
            data = bytearray(file.read_bytes())
            data[-9 - damage] ^= 1
            file.write_bytes(data if damage else data[:-3])
    kept.take(np.array([60]))
    assert len(list((tmp_path / "kept").iterdir())) == slot_states.KEPT, "the oldest goes"
    (tmp_path / "full").touch()
    full = BufferedDocuments(store, 6, 0, 2, 3, None, SlotStates(tmp_path / "full"))
    assert torch.equal(full.take(np.array([44])).ids_BS, want)
    assert caplog.text.count("states of the buffer are not kept") == 1


def test_a_sequence_is_of_many_documents():
    lengths = np.random.default_rng(0).integers(500, 5000, 400)
    stream, buffered = PackedDataset(store_of(lengths), 256, 0), BufferedDocuments(store_of(lengths), 256, 0, 8, 32)
    shares = []
    for dataset in (stream, buffered):
        batches = [dataset.batch(Sequences.nth(step, 8), 0, 1, 0, 8) for step in range(200)]
        shares.append(len({(ids // 1000).item() for batch in batches for ids in batch.ids_BS[:, 0]}))
    per_step = [len(set(buffered.batch(Sequences.nth(step, 8), 0, 1, 0, 8).ids_BS[:, 0].tolist())) for step in range(4)]
    assert min(per_step) == 8
    assert shares[1] > 100


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 2**32 - 1), max_size=40), st.integers(0, 99), st.integers(0, 2000))
def test_numbers_are_those_that_numpy_draws_one_by_one(bounds, seed, before):
    """The buffer of each run that there is depends on it; and so many may have been drawn before."""
    rng, draws = np.random.default_rng([seed, 1]), Draws([seed, 1])
    for bound in [*[7] * before, *bounds]:
        assert draws.below(bound) == rng.integers(bound)
    later = Draws([seed, 1], draws.num)
    assert [later.below(n) for n in (9, 10**9, 3)] == [draws.below(n) for n in (9, 10**9, 3)]


def test_too_little_text_names_the_numbers():
    with pytest.raises(DataError, match=r"8 tokens of text are less than one sequence of train.seq_len 9"):
        BufferedDocuments(store_of([4, 4]), 9, 0, 1, 1).sequences(Sequences.nth(0, 1))


def test_a_run_with_it_resumes_bitwise_and_logs_how_unlike_its_batches_are(texts, tmp_path):  # noqa: F811
    def config(out, **train):
        return config_for(texts, tmp_path / out, **train).replace(data={"packing": "rsdb", "rsdb_documents": 4})

    whole = trainer_for(config("whole"))
    metrics = [whole.step() for _ in range(4)]
    assert all(each.batch_het >= 0 for each in metrics)
    assert metrics[0].row()["batch_het"] == metrics[0].batch_het
    first = trainer_for(config("cut"))
    found = [first.step().loss for _ in range(2)]
    first.save()
    second = trainer_for(config("cut"))
    assert found + [second.step().loss for _ in range(2)] == [each.loss for each in metrics]
    with pytest.raises(ConfigError, match="other data or batches"):
        trainer_for(config_for(texts, tmp_path / "cut"))


def test_how_unlike_batches_are(texts, tmp_path):  # noqa: F811
    """The highest mean loss of a micro-batch over the mean of all, as the report has it."""
    trainer = trainer_for(config_for(texts, tmp_path, micro_batch_size=1))
    batches = [trainer.micro_batches.batch(trainer.data.train, 0, micro) for micro in range(4)]
    trainer.dispatcher.use(0)
    with torch.no_grad():
        losses = [trainer.objective([batch], 32)[0].ce.item() for batch in batches]
    metrics = trainer.step()
    assert metrics.batch_het == pytest.approx(max(losses) - sum(losses) / 4, abs=1e-4)


def test_the_tail_of_gradient_norms():
    norms = Recent(200)
    for norm in np.random.default_rng(0).normal(1, 0.1, 200):
        norms.add(1.0, norm)
    assert norms.kurtosis == pytest.approx(3, abs=0.6)
    norms.add(1.0, 9.0)
    assert norms.kurtosis > 50
    assert Recent().kurtosis is None


def test_a_run_that_goes_on_knows_what_is_usual(texts, tmp_path):  # noqa: F811
    """Two steps were skipped before it was cut, a third is after it, and then a level that stays is none."""
    config = config_for(texts, tmp_path, steps=99, resume=True).replace(optim={"skip_above_sigma": 6.0})
    first = trainer_for(config)
    for n in range(20):
        first.recent.add(2.0 + 0.01 * (n % 3), 1.0)
    first.usual_loss.mean = 2.0
    for _ in range(2):
        first.step()
    first.save()
    second, decisions = trainer_for(config), []
    assert second.counts == first.counts
    second.pool.ledger.decide = lambda step, attempt, notes: decisions.append(
        Decision(step, json.loads(json.dumps(notes)))
    )
    found = [second.step().skipped for _ in range(3)]
    assert (found, second.version) == ([3, 3, 3], 2)

    second.pool.ledger.decided = lambda: decisions[-1]
    third = Trainer(config, second.pool, second.data, Alone(), store=second.backbone.store)  # from what was decided
    third.start()
    assert third.counts == second.counts
    assert len(third.recent.steps) == 22


def test_a_step_that_sticks_out_is_skipped_and_a_level_that_stays_is_not(texts, tmp_path, caplog):  # noqa: F811
    config = config_for(texts, tmp_path, steps=99)
    for rule in (None, 6.0):
        trainer = trainer_for(config.replace(optim={"skip_above_sigma": rule}))
        for n in range(20):
            trainer.recent.add(2.0 + 0.01 * (n % 3), 1.0)
        before = trainer.version
        for _ in range(5):  # its loss is above 5
            trainer.step()
        assert trainer.version - before == (5 if rule is None else 2)
        assert trainer.num_skipped == (0 if rule is None else 3)
    assert "the loss is 5." in caplog.text
    assert "usual is 2.01 +- 0.0" in caplog.text
