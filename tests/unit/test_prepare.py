"""Data made ready: documents come as they are, once, by content; what cannot be is named."""

import errno
import hashlib
import itertools
import json
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trinity.config import DataConfig, Sequences, TrainConfig, preset
from trinity.data import kept, token_store
from trinity.data.documents import found_by
from trinity.data.formats import say_once
from trinity.data.prepare import prepare
from trinity.data.shards import Gathered, Order
from trinity.data.token_store import write_documents
from trinity.errors import ConfigError, DataError
from trinity.text import tokenizer
from trinity.text.tokenizer import Tokenizer

MODEL = preset("tiny")
TEXTS = [f"document {n} " + "héllo 🦜 wörld\n" * (n % 7 + 1) for n in range(60)]
TOKENIZER = Tokenizer.train(iter(TEXTS), 400)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    TOKENIZER.save(tmp_path / "tokenizer")
    return folder


def prepared(corpus, out_dir, seed=0, seq_len=16, **settings):
    settings = {"train": (str(corpus),), "tokenizer": str(corpus.parent / "tokenizer"), "val_fraction": 0.1, **settings}
    return prepare(DataConfig(**settings), TrainConfig(seed=seed, seq_len=seq_len), MODEL, out_dir)


def stored(dataset):
    """The texts of a store's documents, which must each be bos ... eos."""
    store = dataset.store
    found = [store.tokens[a:b].tolist() for a, b in itertools.pairwise(store.starts_N)]
    assert all((ids[0], ids[-1]) == (0, 3) for ids in found)
    return [TOKENIZER.decode(ids[1:-1]) for ids in found]


def test_prepared_documents_are_the_corpus(corpus, tmp_path):
    made = prepared(corpus, tmp_path / "out")
    train, val = stored(made.train), stored(made.val)
    assert Counter(train + val) == Counter(TEXTS)
    assert 1 <= len(val) <= 15
    assert train != [text for text in TEXTS if text in train], "shuffled"
    batch = made.train.batch(Sequences.nth(0, 4), 0, 1, 0, 4)
    assert [tensor.dtype for tensor in batch] == [torch.int64] * 3
    assert [tuple(tensor.shape) for tensor in batch] == [(4, 16)] * 3


def test_a_second_run_reuses_and_a_changed_one_does_not(corpus, tmp_path, monkeypatch):
    def folders():
        return {folder.name for folder in (tmp_path / "out" / "data").glob("tokens-*")}

    first = prepared(corpus, tmp_path / "out")
    assert len(folders()) == 1
    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("tokenised again"))
        again = prepared(corpus, tmp_path / "out", seq_len=8)
    assert np.array_equal(first.train.store.tokens, again.train.store.tokens)
    prepared(corpus, tmp_path / "out", seed=1)
    prepared(corpus, tmp_path / "out", val_fraction=0.2)
    prepared(corpus, tmp_path / "out", max_documents=50)
    assert len(folders()) == 4
    (corpus / "more.txt").write_text("one more " * 50)
    more = prepared(corpus, tmp_path / "out")
    assert len(folders()) == 5
    assert Counter(stored(more.train) + stored(more.val)) == Counter([*TEXTS, "one more " * 50])
    Tokenizer.train(iter(TEXTS), 300).save(corpus.parent / "tokenizer")
    prepared(corpus, tmp_path / "out")
    assert len(folders()) == 6


def test_what_a_killed_builder_left_is_removed_and_nothing_else(tmp_path):
    left = {name: tmp_path / f".shard-{name}" for name in ("old", "in-work", "new", "written-now")}
    for folder in left.values():
        folder.mkdir()
        (folder / "tokens.bin").touch()
    (tmp_path / ".shard.lock").touch()
    (tmp_path / ".tokens-old").mkdir()
    for path in [
        left["old"],
        left["in-work"],
        left["written-now"],
        *tmp_path.rglob("*/tokens.bin"),
        tmp_path / ".tokens-old",
    ]:
        if path.parent not in (left["new"], left["written-now"]):
            os.utime(path, (1, 1))
    with kept._held(left["in-work"]) as is_held:
        assert is_held
        kept.made_once(tmp_path / "shard-x", lambda to: (to / "x").touch())
    assert not left.pop("old").exists()
    assert all(folder.is_dir() for folder in (*left.values(), tmp_path / ".tokens-old", tmp_path / "shard-x"))


@pytest.mark.parametrize("form", [1, 2])
def test_what_an_older_release_has_prepared_is_gone_on_with(corpus, tmp_path, form):
    """It lies there end to end; what is made now has the same content, in the same order."""
    made = prepared(corpus, tmp_path / "out")
    new = next((tmp_path / "out" / "data").glob("tokens-*"))
    found = found_by(str(corpus))
    facts = [[each.stamp for each in found], "text", None, Tokenizer.load(tmp_path / "tokenizer").to_json(), 0.1, 0]
    old = new.with_name(f"tokens-{kept.fingerprint(*facts, form=form)}")
    for side, dataset in (("train", made.train), ("val", made.val)):
        starts_N = dataset.store.starts_N
        pieces = [dataset.store.tokens[a:b] for a, b in itertools.pairwise(starts_N)]
        write_documents(old / side, pieces, np.diff(starts_N))
    again = prepared(corpus, tmp_path / "out")
    assert again.train.store.tokens.filename == old / "train" / "tokens.npy"
    assert (again.train.store.content, again.val.store.content) == (made.train.store.content, made.val.store.content)
    (old / "train" / "content").unlink()  # as in the first of them
    assert prepared(corpus, tmp_path / "out").train.store.content == ""


def test_documents_are_in_the_order_of_their_hashes(corpus, tmp_path):
    """As they were when one file held them all; another seed has another order of its own."""

    def hashed(text):
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, salt=bytes(8)).digest(), "little")

    made = prepared(corpus, tmp_path / "out")
    assert stored(made.val) + stored(made.train) == sorted(TEXTS, key=hashed)
    orders = [stored(prepared(corpus, tmp_path / "out", seed=seed).train) for seed in (1, -1, 2**70)]
    assert len({tuple(order) for order in (*orders, stored(made.train))}) == 4


def test_a_file_that_is_added_is_tokenised_alone(corpus, tmp_path, monkeypatch):
    prepared(corpus, tmp_path / "out")
    (corpus / "more.txt").write_text("one more " * 50)
    tokenised, encode = [], Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: tokenised.extend(texts) or encode(self, texts))
    more = prepared(corpus, tmp_path / "out")
    assert tokenised == ["one more " * 50]
    assert Counter(stored(more.train) + stored(more.val)) == Counter([*TEXTS, "one more " * 50])
    prepared(corpus, tmp_path / "out", seed=5, val_fraction=0.0)
    assert len(tokenised) == 1, "another order and another split are made of the same tokens"


def test_runs_may_share_what_is_tokenised(corpus, tmp_path, monkeypatch):
    first = prepared(corpus, tmp_path / "out", cache=str(tmp_path / "cache"))
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("tokenised again"))
    again = prepared(corpus, tmp_path / "other", cache=str(tmp_path / "cache"))
    assert stored(first.train) == stored(again.train)
    assert not (tmp_path / "other" / "data" / "shards").exists()


def test_a_run_may_be_moved(corpus, tmp_path):
    first = prepared(corpus, tmp_path / "out")
    documents = stored(first.train)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert stored(prepared(corpus, tmp_path / "moved").train) == documents


def test_a_file_that_changes_while_it_is_read_is_named(corpus, tmp_path, monkeypatch):
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *args: (corpus / "all.jsonl").write_text("") or encode(*args))
    with pytest.raises(DataError, match=r"all.jsonl has changed since it was listed; start again"):
        prepared(corpus, tmp_path / "out")
    assert not list((tmp_path / "out" / "data").rglob("*-*")), "nothing is made of a part of it"


def test_what_is_left_out_is_counted_and_noted(corpus, tmp_path, caplog):
    """In one line for each source, in every run, and beside the store."""
    (corpus / "more.jsonl").write_text('{"text": null}\n{"id": 1}\n{"text": "more text"}\n')
    (corpus / "empty.txt").touch()
    for out in ("out", "out"):
        say_once.cache_clear()
        caplog.clear()
        prepared(corpus, tmp_path / out)
        line = f"{corpus}: left out are 1 files without text, 2 rows without text in 'text'"
        assert [each for each in caplog.messages if "left out" in each] == [line]
    [note] = json.loads(next((tmp_path / "out" / "data").glob("tokens-*/skipped.json")).read_text())
    assert (note["source"], note["files"], note["documents"]) == (str(corpus), 3, len(TEXTS) + 1)
    assert note["left_out"] == {"files without text": 1, "rows without text in 'text'": 2}


@given(st.data())
def test_gathered_documents_read_as_if_end_to_end(data):
    lengths_H = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=4))
    lengths_N = np.array([length for lengths in lengths_H for length in lengths], np.int64)
    flat = np.arange(lengths_N.sum(), dtype=np.uint32)
    parts = np.split(flat, np.cumsum([sum(lengths) for lengths in lengths_H])[:-1])
    chosen = np.array(data.draw(st.permutations(range(len(lengths_N)))), np.int64)
    order = Order.of(lengths_N, chosen)
    pieces = np.split(flat, np.cumsum(lengths_N)[:-1]) if len(lengths_N) else []
    whole = np.concatenate([flat[:0], *(pieces[n] for n in chosen)])
    gathered = Gathered(parts, *order)
    assert np.array_equal(gathered, whole)
    ends = st.integers(0, len(whole) + 2)
    begin, end = data.draw(ends), data.draw(ends)
    assert np.array_equal(gathered[begin:end], whole[begin:end])
    if len(whole):
        at = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1)))
        at = at[:, None] + np.arange(data.draw(st.integers(1, len(whole) - at.max())))
        assert np.array_equal(gathered[at], whole[at])
        assert gathered[at[0, 0]] == whole[at[0, 0]]


def test_the_order_of_documents_is_of_their_content_alone(corpus, tmp_path):
    """Files listed in another order, renamed, cut and joined: the same run."""
    first = prepared(corpus, tmp_path / "out")
    for name, texts in (("z", TEXTS[:20]), ("a", TEXTS[40:]), ("m", TEXTS[20:40])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = tuple(str(tmp_path / f"{name}.jsonl") for name in "mza")
    again = prepared(corpus, tmp_path / "other", train=files)
    assert np.array_equal(first.train.store.tokens, again.train.store.tokens)
    assert first.train.store.content == again.train.store.content
    other = prepared(corpus, tmp_path / "other", seed=1)
    assert len({first.train.store.content, first.val.store.content, other.train.store.content}) == 3


def test_growing_data_moves_no_document_between_training_and_validation(corpus, tmp_path):
    before = prepared(corpus, tmp_path / "out")
    (corpus / "more.txt").write_text("one more " * 50)
    after = prepared(corpus, tmp_path / "out")
    assert set(stored(before.val)) - set(stored(after.val)) == set()
    assert set(stored(before.train)) - set(stored(after.train)) == set()


def test_long_documents_are_tokenised_in_pieces(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "PIECE_CHARS", 10)
    monkeypatch.setattr(token_store, "BATCH_CHARS", 25)
    made = prepared(corpus, tmp_path / "out")
    assert Counter(stored(made.train) + stored(made.val)) == Counter(TEXTS)


def test_a_tokenizer_is_trained_when_none_is_given(corpus, tmp_path):
    made = prepared(corpus, tmp_path / "out", tokenizer=None)
    assert 269 < made.tokenizer.vocab_size < MODEL.vocab_size
    again = prepared(corpus, tmp_path / "other", tokenizer=None)
    assert again.tokenizer.to_json() == made.tokenizer.to_json()
    made.tokenizer.save(tmp_path / "checkpoint")
    tuned = prepare(
        DataConfig(train=(str(corpus),)),
        TrainConfig(seq_len=8, init_from=str(tmp_path / "checkpoint")),
        MODEL,
        tmp_path,
    )
    assert tuned.tokenizer.to_json() == made.tokenizer.to_json()
    assert not list((tmp_path / "data").glob("tokenizer-*")), "fine-tuning keeps the checkpoint's tokenizer"


def test_validation_files_of_its_own(corpus, tmp_path):
    (tmp_path / "val.txt").write_text("for validation " * 40)
    made = prepared(corpus, tmp_path / "out", val=(str(tmp_path / "val.txt"),))
    assert stored(made.val) == ["for validation " * 40]
    assert Counter(stored(made.train)) == Counter(TEXTS)
    (tmp_path / "val.txt").write_text("short")
    with pytest.raises(DataError, match="less than one sequence"):
        prepared(corpus, tmp_path / "out", val=(str(tmp_path / "val.txt"),))


def test_one_document_trains_without_validation(corpus, tmp_path):
    (tmp_path / "one.txt").write_text("only one " * 50)
    made = prepared(corpus, tmp_path / "out", train=(str(tmp_path / "one.txt"),))
    assert made.val.num_sequences == 0
    assert made.train.num_sequences > 5


def test_what_cannot_be_prepared_is_named(corpus, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="holds no text"):
        prepared(corpus, tmp_path / "out", train=(str(tmp_path / "empty.txt"),))
    with pytest.raises(DataError, match="less than one sequence"):
        prepared(corpus, tmp_path / "out", seq_len=10_000)
    with pytest.raises(DataError, match="cannot write prepared data"):
        prepared(corpus, tmp_path / "empty.txt")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"vocab_size": 300}, f"has {TOKENIZER.vocab_size} ids; model.vocab_size is 300"),
        ({"bos_token_id": 7}, "bos id is 0; model.bos_token_id is 7"),
        ({"eos_token_id": 1}, "eos id is 3; model.eos_token_id is 1"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(corpus, tmp_path, changed, says):
    settings = DataConfig(train=(str(corpus),), tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ConfigError, match=says):
        prepare(settings, TrainConfig(), MODEL.model_copy(update=changed), tmp_path / "out")


@pytest.mark.parametrize("part", ["shards/*/tokens.bin", "tokens-*/val/starts.npy", "tokens-*/train/places.npy"])
def test_damaged_stores_are_named(corpus, tmp_path, part):
    prepared(corpus, tmp_path / "out")
    file = next((tmp_path / "out" / "data").glob(part))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"is damaged .* delete that folder"):
        prepared(corpus, tmp_path / "out")


@pytest.mark.parametrize("where", ["_tokenise", "_write_side"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_preparation_leaves_no_half(corpus, tmp_path, monkeypatch, failure, where):
    def fail(*_):
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(token_store, where, fail)
        with pytest.raises((DataError, KeyboardInterrupt)):
            prepared(corpus, tmp_path / "out")
    assert len(list((tmp_path / "out" / "data").rglob("*-*"))) == (where == "_write_side"), (
        "a shard is whole or not there"
    )
    assert prepared(corpus, tmp_path / "out").train.num_sequences


@pytest.mark.parametrize("locks_work", [True, False])
def test_many_may_prepare_at_once(corpus, tmp_path, monkeypatch, locks_work):
    built, together, build = [], threading.Barrier(4), token_store.write_order

    def counted(folder, *rest):
        build(folder, *rest)
        built.append(folder)
        if not locks_work:
            together.wait(timeout=30)  # all four have built when the first renames

    monkeypatch.setattr(token_store, "write_order", counted)
    if not locks_work:
        monkeypatch.setattr(kept.fcntl, "flock", lambda *_: None)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: prepared(corpus, tmp_path / "out"), range(4)))
    assert len(built) == (1 if locks_work else 4)
    assert all(np.array_equal(one.train.store.tokens, made[0].train.store.tokens) for one in made)
    assert len(list((tmp_path / "out" / "data").rglob("*-*"))) == 2, "a store and a shard"
