"""Tokenised data in an object store: made once for all hosts, whole or not at all, fetched by blocks; what refuses is named or
waited for.

s3:// runs where s3fs is installed, against a store of the test's own (tests/object_store.py); the rest always.
"""

import itertools
import json
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch

from tests.object_store import object_store
from tests.unit.test_trainer import config_for, texts, trainer_for  # noqa: F401  a fixture
from trinity.config import Sequences
from trinity.data import cache as caching
from trinity.data import remote
from trinity.data.prepare import prepare
from trinity.errors import DataError, TrinityError, Unavailable
from trinity.text.tokenizer import Tokenizer
from trinity.train import retry

BLOCK = 512  # bytes


@pytest.fixture(scope="module")
def server():
    with object_store() as store:
        yield store


@pytest.fixture
def store(server, monkeypatch):
    server.clear()
    server.put("/bucket/other", b"something")
    monkeypatch.setattr(remote, "PATIENCE_S", 0.3)
    monkeypatch.setattr(caching, "BLOCK_BYTES", BLOCK)
    client = {"endpoint_url": server.url, "key": "test", "secret": "test"}
    client |= {"config_kwargs": {"retries": {"max_attempts": 0}, "read_timeout": 1}}
    monkeypatch.setitem(fsspec.config.conf, "s3", client)
    return server


@pytest.fixture(params=["s3", "http"])
def address(request, store):
    if request.param == "s3":
        pytest.importorskip("s3fs")
        return "s3://bucket/tokens"
    return f"{store.url}/bucket/tokens"


def host(texts, folder, address, **data):  # noqa: F811
    """Settings of a run on a host of its own, that shares nothing with others but the store."""
    return config_for(texts, folder).replace(data={"cache": address, **data})


def ready(config):
    return prepare(config.data, config.train, config.model, config.train.out_dir)


def same(one, other):
    everything = Sequences(0, one.num_sequences)
    batches = [each.take(each.sequences(everything)) for each in (one, other)]
    return one.store.content == other.store.content and all(map(torch.equal, *batches))


def test_what_one_host_has_tokenised_others_read_by_blocks(texts, tmp_path, address, store, monkeypatch):  # noqa: F811
    alone = ready(host(texts, tmp_path / "alone", None))
    first = ready(host(texts, tmp_path / "first", address))
    assert same(first.train, alone.train)
    names = {path.split("/")[3] for path in store.objects if path.startswith("/bucket/tokens/")}
    assert sum(name.startswith("shard-") for name in names) == 12
    written = dict(store.objects)
    for verb in ("encode_batch", "train"):
        monkeypatch.setattr(Tokenizer, verb, lambda *_: pytest.fail("done again"))
    store.log.clear()
    second = ready(host(texts, tmp_path / "second", address))
    read = [path for _, path, _ in store.log if path.endswith(".bin")]
    assert read == [], "what is to be trained on is read when it is trained on"
    second.train.take(second.train.sequences(Sequences(0, 1)))
    ranges = [asked for method, path, asked in store.log if method == "GET" and path.endswith(".bin")]
    assert 0 < len(ranges) < 8
    assert all(
        int(last) - int(begin) < BLOCK for begin, last in (each.removeprefix("bytes=").split("-") for each in ranges)
    )
    assert same(second.train, alone.train)
    assert same(second.val, alone.val)
    assert store.objects == written, "nothing is written twice"

    store.denied.add("/bucket")  # all of it is here now
    third = ready(host(texts, tmp_path / "second", address))
    assert same(third.train, alone.train)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_any_file_system_of_fsspec_will_do(texts, tmp_path, store, kind, monkeypatch):  # noqa: F811
    address = f"memory://{tmp_path.name}" if kind == "memory" else f"file://{tmp_path}/there"
    first = ready(host(texts, tmp_path / "first", address))
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("done again"))
    assert same(first.train, ready(host(texts, tmp_path / "second", address)).train)


def test_who_dies_while_he_writes_leaves_nothing_that_counts(texts, tmp_path, store, monkeypatch):  # noqa: F811
    """Before each write that makes a shard of one file, and of its order."""
    (tmp_path / "one.txt").write_text((texts / "0.txt").read_text())
    Tokenizer.train(iter([(texts / "0.txt").read_text()]), 300).save(tmp_path / "tokenizer")
    data = {"train": [str(tmp_path / "one.txt")], "val_fraction": 0, "tokenizer": str(tmp_path / "tokenizer")}
    alone, address, write = (
        ready(host(texts, tmp_path / "alone", None, **data)),
        f"memory://{tmp_path.name}",
        remote.write,
    )
    for at in itertools.count():
        writes = itertools.count()

        def dying(*arguments, at=at, writes=writes):
            if next(writes) == at:
                raise KeyboardInterrupt
            write(*arguments)

        monkeypatch.setattr(remote, "write", dying)
        try:
            ready(host(texts, tmp_path / f"dying-{at}", f"{address}-{at}", **data))
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(remote, "write", write)
            assert same(ready(host(texts, tmp_path / f"next-{at}", f"{address}-{at}", **data)).train, alone.train)
    assert at > 8


def test_a_store_that_refuses_is_named_before_a_step(texts, tmp_path, address, store):  # noqa: F811
    config = host(texts, tmp_path / "run", address)
    store.denied.add("/bucket")
    with pytest.raises(DataError, match=r"tokens/tokenizer-\w+/whole.json may not be read"):
        ready(config)
    store.denied.clear()
    store.faults.extend([404, 404, *[503] * 99])
    with pytest.raises(Unavailable, match=r"cannot be (read|written) now, its store does not answer or refuses"):
        ready(config)
    store.faults.clear()
    assert same(ready(config).train, ready(host(texts, tmp_path / "alone", None)).train)


def test_a_store_that_refuses_later_has_the_run_wait(texts, tmp_path, address, store, monkeypatch, caplog):  # noqa: F811
    want = [trainer_for(host(texts, tmp_path / "first", address))]
    found = [trainer_for(host(texts, tmp_path / "second", address))]
    store.denied.add("/bucket")
    pauses = iter([lambda: store.faults.extend([503] * 99), store.faults.clear, store.denied.clear])
    clock = SimpleNamespace(monotonic=retry.time.monotonic, sleep=lambda _: next(pauses, int)())
    monkeypatch.setattr(retry, "time", clock)
    losses = [[trainer.step().loss for _ in range(3)] for [trainer] in (want, found)]
    assert losses[0] == losses[1]
    assert next(pauses, None) is None, "it was waited for"
    assert [message.partition(":")[0] for message in caplog.messages if "run" in message] == [
        "the run pauses until its data can be read",
        "its data can be read again; the run goes on",
    ]


def test_what_was_damaged_there_is_not_trained_on(texts, tmp_path, store):  # noqa: F811
    address = f"{store.url}/bucket/tokens"
    ready(host(texts, tmp_path / "first", address))
    for path, data in store.objects.items():
        if path.endswith("tokens.bin"):
            store.objects[path] = data[:-1] + bytes([data[-1] ^ 1])
    second = ready(host(texts, tmp_path / "second", address)).train
    with pytest.raises(DataError, match=r"tokens.bin is not what was written there, from byte"):
        second.take(second.sequences(Sequences(0, second.num_sequences)))
    shard = next(path for path in store.objects if "/shard-" in path and path.endswith("whole.json"))
    for text, says in (
        (b"{", "is damaged"),
        (json.dumps({"files": {"../x": {}}}).encode(), r"names '\.\./x', which is no file of it"),
        (json.dumps({"files": {"/x": {}}}).encode(), "names '/x'"),
    ):
        store.objects[shard] = text
        with pytest.raises(TrinityError, match=says):
            ready(host(texts, tmp_path / "third", address))


def test_what_was_made_before_is_shared_when_a_store_is_named(texts, tmp_path, store, monkeypatch):  # noqa: F811
    address = f"memory://{tmp_path.name}"
    first = ready(host(texts, tmp_path / "run", None))
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("done again"))
    ready(host(texts, tmp_path / "run", address))
    assert same(ready(host(texts, tmp_path / "other", address)).train, first.train)


def test_an_array_in_blocks_is_the_array(tmp_path, monkeypatch):
    """Blocks of a size that no entry's divides."""
    monkeypatch.setattr(caching, "BLOCK_BYTES", 10)
    whole = np.arange(100, dtype=np.uint32)
    (tmp_path / "made").mkdir()
    whole.tofile(tmp_path / "made" / "tokens.bin")
    there = caching.Shared(f"memory://{tmp_path.name}/made")
    there.put(tmp_path / "made")
    rng = np.random.default_rng(0)
    for number in range(5):
        (copy := tmp_path / str(number)).mkdir()
        there.fetched(copy)
        ranged = caching.Ranged(copy / "tokens.bin", np.uint32)
        for begin, end in np.sort(rng.integers(0, 101, (5, 2))):
            assert np.array_equal(ranged[begin:end], whole[begin:end])
        assert len(ranged) == 100
