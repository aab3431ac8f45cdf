"""Tokenising on a cluster: the shards of a single process, bit for bit; what is there is not made again; errors are ours."""

import gzip
import json
import shutil

import pytest

from actors.jobs.tokenise import tokenise
from trinity.config import Config, DataConfig, TrainConfig, preset
from trinity.data import prepare as preparing
from trinity.errors import DataError
from trinity.preparing import prepared
from trinity.text.tokenizer import Tokenizer


@pytest.fixture
def settings(ray_session, tmp_path):
    """(data, train, model) of four files of different kinds."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": f"row {n} " * 30}) + "\n" for n in range(40)]
    (folder / "a.jsonl").write_text("".join(lines[:20]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join([*lines[20:], '{"id": 1}\n']).encode()))
    (folder / "c.txt").write_text("one document " * 100)
    (folder / "d.txt").touch()
    Tokenizer.train(iter(lines), 300).save(tmp_path / "tokenizer")
    data = DataConfig(train=(str(folder),), val_fraction=0.1, tokenizer=str(tmp_path / "tokenizer"))
    return data, TrainConfig(seq_len=16), preset("tiny")


def made(settings, out_dir):
    """Tokenise on the cluster; -> how many shards were made."""
    told = []
    for recipe, files, folder in preparing.recipes(*settings, out_dir):
        tokenise(recipe, files, folder, lambda *numbers: told.append(numbers))
    assert told == [(n, len(told)) for n in range(1, len(told) + 1)]
    return len(told)


def bytes_of(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_shards_are_those_of_one_process_and_made_once(settings, tmp_path, monkeypatch):
    assert made(settings, tmp_path / "cluster") == 4
    alone = preparing.prepare(*settings, tmp_path / "alone")
    shards = bytes_of(tmp_path / "cluster" / "data" / "shards")
    assert shards == bytes_of(tmp_path / "alone" / "data" / "shards")
    assert made(settings, tmp_path / "cluster") == 0

    config, said = (
        Config(model=settings[2], data=settings[0], train={"seq_len": 16, "out_dir": str(tmp_path / "train")}),
        [],
    )
    monkeypatch.setattr("trinity.preparing.say", said.append)
    prepared(config)
    assert said == [], "little is made here"
    shutil.rmtree(tmp_path / "train")
    monkeypatch.setattr(preparing, "MUCH_BYTES", 1)
    assert prepared(config).train.store.content == alone.train.store.content
    assert said[-1] == "tokenised 4 of 4 files"
    assert bytes_of(tmp_path / "train" / "data" / "shards") == shards, "as `trinity train` begins"

    first, *_ = (tmp_path / "cluster" / "data" / "shards").glob("shard-*")
    first.rename(tmp_path / "lost")  # as after a kill: each is whole or not there
    (tmp_path / "corpus" / "e.txt").write_text("one more " * 30)
    assert made(settings, tmp_path / "cluster") == 2
    assert shards.items() <= bytes_of(tmp_path / "cluster" / "data" / "shards").items()

    monkeypatch.setattr("trinity.data.token_store._tokenise", lambda *_: pytest.fail("tokenised again"))
    (tmp_path / "corpus" / "e.txt").unlink()
    again = preparing.prepare(*settings, tmp_path / "cluster")
    assert again.train.store.content == alone.train.store.content


def test_a_file_that_cannot_be_read_is_named(settings, tmp_path):
    (tmp_path / "corpus" / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"bad.jsonl:2 is not valid JSON .*; repair or remove the line"):
        made(settings, tmp_path / "out")
    shards = (tmp_path / "out" / "data" / "shards").glob("shard-*/shard.json")
    assert not any("bad.jsonl" in file.read_text() for file in shards), "no half of one has its name"
