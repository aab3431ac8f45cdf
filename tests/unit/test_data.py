"""Data: documents come as they are, packing loses and repeats nothing, order depends on (seed, step) alone."""

import bz2
import errno
import gzip
import io
import itertools
import json
import lzma
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trinity.config import DataConfig, TrainConfig, preset
from trinity.data import token_store
from trinity.data.dataset import PackedDataset
from trinity.data.documents import documents
from trinity.data.prepare import prepare
from trinity.data.token_store import split
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


# --- documents ------------------------------------------------------------------------------------------------------


def test_every_kind_of_file(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "sub" / ".git" / "config").write_text("hidden")
    (tmp_path / "a.txt").write_bytes(b"ok \xff caf\xc3\xa9")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "\\ud800 half", "n": 1}')
    (tmp_path / "sub" / "c.md").write_text("# title\r\n")
    (tmp_path / "sub" / "d.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "sub" / "e.py").touch()
    pq.write_table(pa.table({"text": ["x", None, "y", "z"]}), tmp_path / "sub" / "p.parquet", row_group_size=2)
    expected = ["ok \ufffd café", "one", "? half", "# title\r\n", "x", "y", "z"]
    assert list(documents([str(tmp_path)])) == expected
    assert list(documents([str(tmp_path / "**" / "*.md"), str(tmp_path / "a.txt")])) == [
        "# title\r\n",
        "ok \ufffd café",
    ]
    assert list(documents([str(tmp_path)], max_documents=2)) == expected[:2]


def test_the_standard_library_is_always_the_same():
    first, second = (list(documents(["stdlib"], max_documents=20)) for _ in range(2))
    assert first == second
    assert first[0].startswith('"""Record of phased-in incompatible language changes')


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x.jsonl:2 is not valid JSON"),
        ("x.jsonl", b'{"body": "a", "id": 1}\n', r"x.jsonl has no text in 'text', only body, id; set data.text_field"),
        ("x.jsonl", b'\n[1]\n', r"x.jsonl:2 has no text in 'text', only list"),
        ("x.jsonl", b'{"text": 5}', r"x.jsonl:1 has no text"),
        ("x.jsonl", b'{"text": "\xff"}', r"x.jsonl:1 is not valid JSON"),
        ("x.jsonl", b"[" * 100_000, r"x.jsonl:1 is not valid JSON"),
        ("x.parquet", b"PAR1 nothing", r"x.parquet is not a readable Parquet file"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(documents([str(tmp_path / name)]))


def test_bad_columns_and_truncated_parquet(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"body": ["long text"] * 1000, "text": [[1]] * 1000}), file)
    for field, says in (("missing", "no column 'missing', only body, text"), ("text", "not a readable Parquet file")):
        with pytest.raises(DataError, match=says):
            list(documents([str(file)], field))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(documents([str(file)], "body"))


ROWS = [{"text": "one"}, {"text": None}, {"id": 3}, {"text": ""}, {"text": "two"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def arrow(new_writer):
    sink = io.BytesIO()
    table = pa.table({"text": [row.get("text") for row in ROWS], "n": range(5)})
    with new_writer(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def parquet():
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [row.get("text") for row in ROWS]}), sink)
    return sink.getvalue()


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def tar(**members):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return sink.getvalue()


ARCHIVE = tar(a_txt=b"one", a_jpg=b"\xff\xd8\0", b_json=b'{"text": "two"}')
FORMATS = {
    "a.jsonl": LINES,
    "a.NDJSON": LINES,
    "lines.json": LINES,
    "a.json": json.dumps(ROWS).encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "parts.json.gz": gzip.compress(LINES) + gzip.compress(b""),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.jsonl.zst": zstd(LINES),
    "a.PARQUET": parquet(),
    "a.parq": parquet(),
    "a.parquet.gz": gzip.compress(parquet()),
    "a.arrow": arrow(pa.ipc.new_stream),
    "b.arrow": arrow(pa.ipc.new_file),
    "a.feather": arrow(pa.ipc.new_file),
    "a.tar": ARCHIVE,
    "a.tar.gz": gzip.compress(ARCHIVE),
    "a.tgz": gzip.compress(ARCHIVE),
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_every_format(tmp_path, caplog, name):
    (tmp_path / name).write_bytes(FORMATS[name])
    assert list(documents([str(tmp_path / name)])) == list(documents([str(tmp_path)])) == ["one", "two"]
    left_out = (
        "1 files that are neither" if "t" in name.split(".")[1][:1] else f"{name}: 3 of 5 rows have no text in 'text'"
    )
    assert len([line for line in caplog.messages if left_out in line]) == 1, "said, once"


@pytest.mark.parametrize("packing", [gzip, bz2, lzma])
def test_a_packed_text_is_a_document(tmp_path, packing):
    file = tmp_path / f"a.txt.{ {gzip: 'gz', bz2: 'bz2', lzma: 'xz'}[packing] }"
    file.write_bytes(packing.compress(b"one\ntwo"))
    assert list(documents([str(file)])) == ["one\ntwo"]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=f"{file.name} cannot be read"):
        list(documents([str(file)]))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_text_says_how_it_is_encoded(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("né".encode(encoding))
    assert list(documents([str(tmp_path)])) == ["né"]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"text\0text", "binary"),
        ("no mark".encode("utf-16-le"), "binary"),
        (gzip.compress(b"x"), "gzip"),
        (zstd(b"x"), "zstd"),
        (parquet(), "Parquet"),
        (arrow(pa.ipc.new_file), "Arrow"),
        (b"PK\3\4...", "zip"),
        (b"%PDF-1.7", "PDF"),
        (b"BZh9", "bzip2"),
    ],
)
def test_what_is_no_text_is_no_document(tmp_path, caplog, data, what):
    (tmp_path / "named.txt").write_bytes(data)
    with pytest.raises(
        DataError, match=rf"named.txt is {what}, no text; leave it out, or give it the end of its format"
    ):
        list(documents([str(tmp_path / "named.txt")]))
    (tmp_path / "good.txt").write_text("good")
    assert list(documents([str(tmp_path)])) == ["good"]
    assert "1 files are left out, they hold no text: named.txt" in caplog.text


def test_characters_that_are_lost_are_counted(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1") * 3 + "\ufffd".encode())
    assert list(documents([str(tmp_path)])) == ["\ufffd" * 4]
    assert "a.txt: 3 characters are no UTF-8 and are replaced" in caplog.text


def test_json_beside_other_text_is_text(tmp_path):
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "tsconfig.json").write_text("{// with a comment\n}")
    (tmp_path / "a.py").write_text("import x")
    assert list(documents([str(tmp_path)])) == ["import x", '{"name": "x"}', "{// with a comment\n}"]
    with pytest.raises(DataError, match="has no text in 'text', only name"):
        list(documents([str(tmp_path / "package.json")]))


def test_a_folder_of_the_hub_is_its_training_split(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("# a card")
    for part, text in (("train", "a"), ("test", "b"), ("validation", "c")):
        pq.write_table(pa.table({"text": [text]}), tmp_path / "data" / f"{part}-00000-of-00001.parquet")
    assert list(documents([str(tmp_path)])) == ["a"]
    assert "1 files are left out, they describe the data: README.md" in caplog.text
    assert (
        "2 files are left out, they are of other splits than train; name them to train on them: data/test-"
        in caplog.text
    )
    assert list(documents([str(tmp_path / "data" / "test-*")])) == ["b"]


def test_what_save_to_disk_writes_is_rows(tmp_path):
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(arrow(pa.ipc.new_stream))
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert list(documents([str(tmp_path)])) == ["one", "two"]


@pytest.mark.parametrize("pattern", ["missing.txt", "*.nothing", ""])
def test_patterns_that_match_nothing(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no text file matches"):
        list(documents([pattern]))


# --- split ----------------------------------------------------------------------------------------------------------

KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=1).map(lambda keys: np.array(keys, np.uint64))
FRACTIONS = st.floats(0, 0.49)


def test_links_are_not_entered_and_their_loops_end(tmp_path):
    """Two that lead back would be 2^40 paths, each of which has every text again."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("one")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "no.txt").write_text("no")
    for name in ("x", "y"):
        (tmp_path / "a" / name).symlink_to(tmp_path)
    (tmp_path / "itself.txt").symlink_to(tmp_path / "itself.txt")
    for pattern in (
        tmp_path,
        tmp_path / "**",
        tmp_path / "**" / "*.txt",
        tmp_path / "*" / "*.txt",
        tmp_path / "a" / "o*",
    ):
        assert list(documents([str(pattern)])) == ["one"], pattern


def test_a_pattern_is_found_from_here(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    assert list(documents(["a/*.txt"])) == list(documents(["*/one.txt"])) == list(documents(["a"])) == ["one"]


@pytest.mark.parametrize("name", ["lines.jsonl", "text.txt"])
def test_a_document_that_nobody_can_hold_is_named(tmp_path, monkeypatch, name):
    """A sparse file has any length, and its line no end."""
    monkeypatch.setattr("trinity.data.formats.MAX_DOCUMENT_BYTES", 1000)
    with (tmp_path / name).open("wb") as file:
        file.write(b"x" * 9000)  # what is zero from its start is no text
        file.truncate(40 << 30)
    with pytest.raises(DataError, match=rf"{name} has a document of more than 1,000 bytes; cut it"):
        list(documents([str(tmp_path / name)]))


def test_a_file_that_breaks_off_while_it_is_read_is_named(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("text")

    class Broken:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, size):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("trinity.data.formats.opened", lambda file: Broken())
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Input/output error"):
        list(documents([str(file)]))


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
    order = np.concatenate([dataset.sequences(step, batch) for step in range(2 * size)])
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
        alone = dataset.batch(step, total, 0, 1, micro, world * micro_batch)
        parts = [dataset.batch(step, total, rank, world, micro, micro_batch) for rank in range(world)]
        assert all(
            torch.equal(torch.cat(found), want) for found, want in zip(zip(*parts, strict=True), alone, strict=True)
        )


@given(packings(), st.integers(0, 40))
def test_a_resumed_run_continues_the_order(packing, resume):
    dataset, batch = packing
    whole = [dataset.sequences(step, batch).tolist() for step in range(resume + 3)]
    again = PackedDataset(dataset.store, dataset.seq_len, dataset.seed)
    assert [again.sequences(step, batch).tolist() for step in range(resume, resume + 3)] == whole[resume:]


def test_epochs_and_seeds_have_orders_of_their_own():
    store = store_of([500])
    orders = [PackedDataset(store, 5, seed).sequences(epoch, 99).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(99)) for order in orders)


def test_too_little_text_names_the_numbers():
    dataset = PackedDataset(store_of([4, 4]), 8, 0)
    assert dataset.num_sequences == 0
    with pytest.raises(DataError, match=r"8 tokens of text are less than one sequence of train.seq_len \+ 1 = 9"):
        dataset.batch(0, 1, 0, 1, 0, 1)


# --- prepare --------------------------------------------------------------------------------------------------------


def test_prepared_documents_are_the_corpus(corpus, tmp_path):
    made = prepared(corpus, tmp_path / "out")
    train, val = stored(made.train), stored(made.val)
    assert Counter(train + val) == Counter(TEXTS)
    assert 1 <= len(val) <= 15
    assert train != [text for text in TEXTS if text in train], "shuffled"
    batch = made.train.batch(0, 4, 0, 1, 0, 4)
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


def test_what_an_older_release_has_prepared_is_gone_on_with(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(token_store.fingerprint, "__kwdefaults__", {"form": 1})
        before = prepared(corpus, tmp_path / "out")
    for file in (tmp_path / "out").rglob("content"):
        file.unlink()
    again = prepared(corpus, tmp_path / "out")
    assert again.train.store.tokens.filename == before.train.store.tokens.filename
    assert again.train.store.content == ""


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


@pytest.mark.parametrize("part", ["train/tokens.npy", "val/starts.npy"])
def test_damaged_stores_are_named(corpus, tmp_path, part):
    prepared(corpus, tmp_path / "out")
    file = next((tmp_path / "out" / "data").glob("tokens-*")) / part
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"is damaged .* delete that folder"):
        prepared(corpus, tmp_path / "out")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_preparation_leaves_nothing(corpus, tmp_path, monkeypatch, failure):
    def fail(*_):
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(token_store, "write_documents", fail)
        with pytest.raises((DataError, KeyboardInterrupt)):
            prepared(corpus, tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out" / "data").iterdir()] == [".lock"]
    assert prepared(corpus, tmp_path / "out").train.num_sequences


@pytest.mark.parametrize("locks_work", [True, False])
def test_many_may_prepare_at_once(corpus, tmp_path, monkeypatch, locks_work):
    built, together, build = [], threading.Barrier(4), token_store._build

    def counted(folder, *rest):
        build(folder, *rest)
        built.append(folder)
        if not locks_work:
            together.wait(timeout=30)  # all four have built when the first renames

    monkeypatch.setattr(token_store, "_build", counted)
    if not locks_work:
        monkeypatch.setattr(token_store.fcntl, "flock", lambda *_: None)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: prepared(corpus, tmp_path / "out"), range(4)))
    assert len(built) == (1 if locks_work else 4)
    assert all(np.array_equal(one.train.store.tokens, made[0].train.store.tokens) for one in made)
    assert len(list((tmp_path / "out" / "data").iterdir())) == 2
