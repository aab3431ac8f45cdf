"""Runs of synthetic data for the tests: three files of input, settings, and what a run has made."""

import gzip
import json
import random
from pathlib import Path

import pytest

from trinity.config import SynthesisConfig
from trinity.config.tree import section
from trinity.data.documents import documents
from trinity.data.formats import rows
from trinity.synthesis import asking
from trinity.synthesis.maker import Maker
from trinity.synthesis.passages import passages
from trinity.synthesis.run import Run, made_here
from trinity.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
WORDS = [
    "river", "stone", "light", "garden", "winter", "copper", "signal", "harbour",
    "meadow", "lantern", "orchard", "thunder", "velvet", "compass", "marble",
]  # fmt: skip
PROMPT = "{manner}. Passage: {text}"
TEMPLATE = {"prompt": PROMPT, "values": {"manner": ["Plainly", "Briefly"]}, "temperature": 0.6, "max_tokens": 64}
MOST = 20  # tokens of a passage


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(iter([" ".join(WORDS) * 20]), 400).save(folder)
    return folder


@pytest.fixture
def inputs(tmp_path):
    """Three files: rows, a text of several paragraphs, packed rows."""
    folder, chance = tmp_path / "in", random.Random(0)
    folder.mkdir()

    def text(num_paragraphs):
        return "\n\n".join(" ".join(chance.choices(WORDS, k=14)) for _ in range(num_paragraphs))

    def lines():
        return "".join(json.dumps({"text": text(2)}) + "\n" for _ in range(4))

    (folder / "a.jsonl").write_text(lines())
    (folder / "b.txt").write_text(text(5))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines().encode(), mtime=0))
    return folder


@pytest.fixture(autouse=True)
def _pauses(monkeypatch):
    monkeypatch.setattr(asking, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(asking, "SAY_AFTER_S", 0)


def tree(inputs, tokenizer, url, out, **more):
    given = {
        "input": {"paths": [str(inputs)], "tokenizer": str(tokenizer), "chunk_tokens": MOST, "min_chunk_tokens": 4},
        "server": {"url": url, "concurrency": 3},
        "styles": ["backwards"],
        "templates": {"backwards": TEMPLATE},
        "output": {"dir": str(out), "packing": ".zst"},
    }
    for name, values in more.items():
        given[name] = {**given[name], **values} if name in given and isinstance(values, dict) else values
    return given


def config_of(*args, **more):
    return section(SynthesisConfig, "", tree(*args, **more))


def synthesized(config, model="backwards"):
    """Run to the end; -> the run."""
    run = Run(config)
    with run.owned(model):
        maker = Maker(config, config.server.url, "secret", model, config.server.concurrency)
        run.synthesize(lambda shards: made_here(maker, shards))
    return run


def found_in(run, what="data"):
    """Every row in that folder."""
    return [row for file in sorted((run.folder / what).iterdir()) for _, row in rows(file)]


def content(run):
    """The bytes of everything that a finished run has, but for when its files were looked at."""
    return {
        file.relative_to(run.folder): file.read_bytes()
        for name in ("data", "left_out", "partial")
        for file in sorted((run.folder / name).rglob("*"))
        if file.is_file()
    }


def sources(out):
    """The documents that a training would read of a run so far."""
    return list(documents([str(out / "data")])) if list(out.glob("data/[!.]*")) else []


def wanted(inputs, tokenizer):
    """(file, document, passage) -> the passage."""
    core = Tokenizer.load(tokenizer)
    return {
        (str(file), n, m): passage
        for file in sorted(inputs.iterdir())
        for n, text in enumerate(documents([str(file)]))
        for m, passage in enumerate(passages(text, core, MOST))
    }


def key_of(row):
    made = row["provenance"]
    return made["source"], made["document"], made["passage"]
