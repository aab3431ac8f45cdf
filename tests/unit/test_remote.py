"""Files at addresses: the same documents as here, by ranges, whatever the store does meanwhile; what will not work is named.

s3:// runs where s3fs is installed, against a store of the test's own (tests/object_store.py); the rest always.
"""

import gzip
import importlib
import io
import json
import socket
import sys
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.object_store import object_store
from trinity.config import DataConfig, TrainConfig, preset
from trinity.data import remote
from trinity.data.documents import documents, files, stamps
from trinity.data.prepare import prepare
from trinity.errors import DataError, Unavailable
from trinity.text.tokenizer import Tokenizer

LINES = "".join(json.dumps({"text": text}) + "\n" for text in ("one", None, "two")).encode()


def parquet(texts, **settings):
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "other": [text * 1000 for text in texts]}), sink, **settings)
    return sink.getvalue()


def arrow(texts):
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": texts}))
    return sink.getvalue()


def tar(**members):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(f"{name}.txt")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return sink.getvalue()


TREE = {
    "README.md": b"a card",
    "a.jsonl": LINES,
    "b.jsonl.gz": gzip.compress(LINES),
    "c.jsonl.zst": pa.compress(LINES, codec="zstd", asbytes=True),
    "d.parquet": parquet(["three", "four"], row_group_size=1),
    "e.arrow": arrow(["five"]),
    "f.tar": tar(x=b"six"),
    "g/h.txt": "sévén".encode(),
    "g/picture": b"\x89PNG\0\0",
    "g/.hidden": b"hidden",
}
TEXTS = ["one", "two"] * 3 + ["three", "four", "five", "six", "sévén"]
ADDRESSES = ("s3", "http", "memory", "file")


@pytest.fixture(scope="module")
def server():
    with object_store() as store:  # one for all: a client of S3 takes a second to start
        yield store


@pytest.fixture
def store(server, monkeypatch):
    """An object store whose bucket holds TREE, with clients that lose patience soon."""
    server.clear()
    remote._reads_ranges.cache_clear()
    for name, data in TREE.items():
        server.put(f"/bucket/data/{name}", data)
    monkeypatch.setattr(remote, "PATIENCE_S", 0.3)
    client = {"endpoint_url": server.url, "key": "test", "secret": "test"}
    client |= {"config_kwargs": {"retries": {"max_attempts": 0}, "read_timeout": 1}}
    monkeypatch.setitem(fsspec.config.conf, "s3", client)
    return server


@pytest.fixture(params=ADDRESSES)
def root(request, store, tmp_path):
    """The address of the folder that holds TREE."""
    if request.param == "s3":
        pytest.importorskip("s3fs")
        return "s3://bucket/data"
    if request.param == "http":
        return f"{store.url}/bucket/data/"
    folder = f"memory://{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path}/there"
    system, path = fsspec.core.url_to_fs(folder)
    for name, data in TREE.items():
        system.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        system.pipe_file(f"{path}/{name}", data)
    return folder


@pytest.fixture(params=["s3", "http"])
def served(request, store):
    """The address of a file that a server has, and its path there."""
    if request.param == "s3":
        pytest.importorskip("s3fs")
    return {"s3": "s3://bucket/data/a.jsonl", "http": f"{store.url}/bucket/data/a.jsonl"}[request.param]


def test_documents_are_those_of_the_same_files_here(root, caplog):
    assert list(documents([root])) == TEXTS
    assert "1 files are left out, they describe the data: README.md" in caplog.text
    assert "1 files are left out, they hold no text: g/picture" in caplog.text


def test_patterns_and_single_files(root):
    root = root.rstrip("/")
    assert list(documents([f"{root}/*.jsonl*"])) == TEXTS[:6]
    assert list(documents([f"{root}/g/*"])) == ["sévén"]
    assert list(documents([f"{root}/d.parquet", f"{root}/g/h.txt"])) == ["three", "four", "sévén"]
    assert list(documents([f"{root}/d.parquet"], "other", 1)) == ["three" * 1000]
    with pytest.raises(DataError, match=r"g/picture is binary, no text"):
        list(documents([f"{root}/g/picture"]))


def test_what_is_not_there_is_named(root):
    for missing in ("nothing.jsonl", "nowhere/*.jsonl"):
        with pytest.raises(DataError, match=r"nothing.jsonl is not there|no text file matches '.*no"):
            list(documents([f"{root.rstrip('/')}/{missing}"]))


def test_stamps_tell_a_change(root):
    before = stamps([root])
    assert stamps([root]) == before
    assert len({stamp[0] for stamp in before}) == 7
    assert all(stamp[1] > 0 and stamp[2] for stamp in before)


def test_a_changed_file_has_another_stamp(store, served):
    before = stamps([served])
    store.put("/bucket/data/a.jsonl", LINES.replace(b"one", b"eno"))
    assert stamps([served]) != before


@pytest.mark.parametrize("size", [3 << 20, 0])
def test_a_file_is_read_by_ranges(store, served, size, monkeypatch):
    """And only what is needed of it: the columns of Parquet that are asked for."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1 << 20)
    text = "x" * size
    store.put("/bucket/data/a.jsonl", json.dumps({"text": text}).encode())
    assert list(documents([served])) == ([text] if size else [])
    taken = [asked for method, _, asked in store.log if method == "GET" and asked and not asked.startswith("bytes=1-1")]
    assert len(taken) == (4 if size else 1)
    store.put("/bucket/data/p.parquet", parquet(["a", "b"], compression="none", use_dictionary=False))
    store.put("/bucket/data/q.parquet", parquet(["c" * 3000], compression="none", use_dictionary=False))
    store.log.clear()
    assert list(documents([served.replace("a.jsonl", "q.parquet")])) == ["c" * 3000]
    assert sum(b - a for a, b in map(span, store.log) if b) < 2 << 20, "not the three million of the other column"


def span(entry):
    """(first, last) of a range that was asked for; zeros for none."""
    first, _, last = (entry[2] or "bytes=0-0").removeprefix("bytes=").partition("-")
    return int(first), int(last)


@pytest.mark.parametrize("faults", [[503] * 3, ["drop"], [500, "drop", 503], [429]])
def test_a_store_that_refuses_for_a_while_is_asked_again(store, served, faults, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE_S", 30)
    list(documents([served]))  # whatever is asked for once
    for skipped in range(2):
        store.faults.extend([0] * skipped + faults)
        assert list(documents([served])) == ["one", "two"]
    assert not store.faults


def test_a_store_that_goes_silent_is_asked_again(store, served, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE_S", 0.2)
    monkeypatch.setattr(remote, "PATIENCE_S", 30)
    store.faults.extend([0, "silence"])
    assert list(documents([served])) == ["one", "two"]


def test_a_store_that_goes_on_refusing_is_named(store, served):
    store.faults.extend([503] * 10_000)
    with pytest.raises(Unavailable, match=r"a.jsonl cannot be read now, its store does not answer or refuses: .*503"):
        list(documents([served]))


def test_a_store_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE_S", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable, match="cannot be read now"):
            files(f"http://127.0.0.1:{free.getsockname()[1]}/bucket/a.jsonl")


@pytest.mark.parametrize("denied", ["/bucket", "/bucket/data/a.jsonl"])
def test_who_may_not_read_is_told(store, served, denied):
    store.denied.add(denied)
    with pytest.raises(DataError, match=r"a.jsonl may not be read .*FSSPEC_S3"):
        list(documents([served]))


def test_no_such_bucket(store):
    pytest.importorskip("s3fs")
    with pytest.raises(DataError, match=r"s3://nobucket/data is not there .*check the address, and the bucket"):
        files("s3://nobucket/data")


def test_a_file_that_changes_while_it_is_read_is_named(store, served, monkeypatch):
    """A block of the new version would follow one of the old."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1 << 10)
    long = b"".join(b'{"text": "%d"}\n' % n for n in range(1000))
    store.put("/bucket/data/a.jsonl", long)
    [file] = files(served)
    store.when_read["/bucket/data/a.jsonl"] = long[:5000]
    with pytest.raises(DataError, match=r"a.jsonl has changed since it was listed"), file.open("rb") as stream:
        stream.read()
    with pytest.raises(DataError, match=r"a.jsonl has changed since it was listed"):
        file.require_unchanged()


def test_a_server_without_ranges_is_read_through_a_file(store):
    store.takes_ranges = False
    root = f"{store.url}/bucket/data"
    assert list(documents([f"{root}/d.parquet", f"{root}/a.jsonl"])) == ["three", "four", "one", "two"]
    store.faults.extend([0, 0, 0, "drop", 503])
    assert list(documents([f"{root}/a.jsonl"])) == ["one", "two"]


def test_a_query_is_no_part_of_the_name(store):
    assert list(documents([f"{store.url}/bucket/data/a.jsonl?version=1"])) == ["one", "two"]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("nonsense://a/b.jsonl", "is no address that can be read: Protocol not known: nonsense"),
        ("gs://a/b.jsonl", r"needs a client of gs:// that is not installed: pip install gcsfs"),
    ],
)
def test_addresses_of_nobody(address, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=says):
        files(address)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(DataError, match=r"s3:// that is not installed: pip install 'trinity-moe\[data\]'"):
        files("s3://bucket/data")


def prepared(address, out_dir, tmp_path):
    """What is prepared of an address with a tokenizer of its own."""
    if not (tmp_path / "tokenizer").exists():
        Tokenizer.train(iter(TEXTS), 300).save(tmp_path / "tokenizer")
    data = DataConfig(train=(address,), tokenizer=str(tmp_path / "tokenizer"), val_fraction=0.1)
    return prepare(data, TrainConfig(seq_len=2), preset("tiny"), out_dir).train.store.content


def test_a_run_of_an_address_is_that_of_the_files(root, tmp_path):
    (tmp_path / "here" / "g").mkdir(parents=True)
    for name, data in TREE.items():
        (tmp_path / "here" / name).write_bytes(data)
    assert prepared(root, tmp_path / "out", tmp_path) == prepared(str(tmp_path / "here"), tmp_path / "other", tmp_path)


def test_prepared_data_need_no_store(store, served, tmp_path):
    """A worker that starts again asks for the list of files, and goes on when nobody answers."""
    content = prepared(served, tmp_path / "out", tmp_path)
    store.faults.extend([503] * 10_000)
    assert prepared(served, tmp_path / "out", tmp_path) == content
    with pytest.raises(Unavailable):
        prepared(served, tmp_path / "other", tmp_path)
    store.faults.clear()
    store.put("/bucket/data/a.jsonl", LINES * 2)
    assert prepared(served, tmp_path / "out", tmp_path) != content


def test_a_file_that_changes_after_it_was_listed_makes_no_shard(store, served, tmp_path):
    store.when_read["/bucket/data/a.jsonl"] = LINES.replace(b"one", b"eno")
    with pytest.raises(DataError, match=r"a.jsonl has changed since it was listed"):
        prepared(served, tmp_path / "out", tmp_path)
    assert not list((tmp_path / "out" / "data").rglob("shard-*"))
