"""Synthetic data from our own server over a tiny checkpoint, in this process."""

import json
import random

import pytest
import yaml

from tests.serve.test_real import write_checkpoint
from trinity.cli import main
from trinity.data.formats import rows

WORDS = [
    "word", "number", "and", "then", "some", "more", "of", "it",
    "river", "stone", "light", "garden", "winter", "copper", "signal",
]  # fmt: skip
ANY = {"same_script": None, "max_repetition": None, "max_copied": None, "whole": False, "refusals": []}


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_checkpoint_is_served_asked_and_named(tmp_path, capsys, api):
    """Its answers are gibberish; each has a row that says of which weights it is, and a second run has the same."""
    chance, checkpoint = random.Random(0), write_checkpoint(tmp_path / "toy")
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(chance.choices(WORDS, k=12))}) + "\n" for _ in range(4))
    )
    template = {"prompt": "{text}\nAgain: ", "max_tokens": 8, "length_ratio": [0, 99]}
    settings = {
        "input": {"paths": [str(tmp_path / "in.jsonl")], "chunk_tokens": 64, "min_chunk_tokens": 2},
        "server": {"checkpoint": str(checkpoint), "api": api},
        "styles": ["again"],
        "templates": {"again": template},
        "checks": ANY,
        "dedup": {"near": None, "exact": False},
    }
    (tmp_path / "synthesize.yaml").write_text(yaml.safe_dump(settings))
    found = []
    for name in ("one", "two"):
        out = tmp_path / name
        assert main(["synthesize", str(tmp_path / "synthesize.yaml"), "--output.dir", str(out)]) == 0
        [shard] = (out / "data").iterdir()
        found.append([row for _, row in rows(shard)])
    assert found[0] == found[1]
    assert {row["provenance"]["document"] for row in found[0]} <= set(range(4))
    assert found[0], capsys.readouterr().out
    for row in found[0]:
        assert row["text"]
        made = row["provenance"]
        assert made["weights_versions"] == {"first": 9, "last": 9}
        assert made["model"] == "toy"
        assert 0 < made["completion_tokens"] <= 8 < made["prompt_tokens"]
