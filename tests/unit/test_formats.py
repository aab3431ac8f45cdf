"""Documents of files: every format, what is no text, and which files a folder, a pattern and a dataset mean."""

import bz2
import errno
import gzip
import io
import json
import lzma
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trinity.data.documents import documents
from trinity.errors import DataError


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
    for source in (tmp_path / name, tmp_path, tmp_path):
        assert list(documents([str(source)])) == ["one", "two"]
    in_archive = "1 files of archives that are neither .txt nor .json"
    left_out = in_archive if "t" in name.split(".")[1][:1] else "3 rows without text in 'text'"
    said = [f"{source}: left out are {left_out}" for source in (tmp_path / name, tmp_path)]
    assert caplog.messages == said, "each source once"


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
        (gzip.compress(b"x", mtime=0), "gzip"),
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
