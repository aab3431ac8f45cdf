"""`trinity bench train` and `decode` with shard actors: the arms agree, are timed, and nothing is left behind.

By default the one beside serving alone; tests/unit/test_bench_train_decode.py has the commands without actors."""

import json

import pytest
import torch

from trinity.bench import models
from trinity.bench.models import Split
from trinity.cli import main


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(what, out, *flags):
    """-> {title: {arm: row}} of a quick run with the experts in actors; every pool is gone afterwards."""
    from actors import pool as pools

    assert main(["bench", what, "--quick", "--threads", "1", "--out", str(out), *flags]) == 0
    assert not [name for name in pools.names("trinity") if name.startswith("bench-")]
    assert (out / f"{what}.png").stat().st_size > 10_000
    report = json.loads((out / f"{what}.json").read_text())
    tables = [(table["title"].split(":")[0], table) for table in report["tables"]]
    return {
        title: {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
        for title, table in tables
    }


@pytest.mark.chaos
def test_train_with_shard_actors(ray_session, tmp_path):
    tables = run("train", tmp_path, "--splits", "2:1,1:1", "--without", "transformers")
    arms, first, second = tables["Training with AdamW"], *(models.actor_arm(Split(n, 1)) for n in (2, 1))
    assert set(arms) == {models.HERE, first, second}
    assert arms[first]["loss of step 1"] == arms[models.HERE]["loss of step 1"]
    assert arms[first]["gradient norm"] == arms[models.HERE]["gradient norm"]
    assert set(tables["Training with Muon"]) == {models.HERE, first}
    assert all(arm["min"] > 0 for arm in arms.values())


@pytest.mark.chaos
def test_decode_with_shard_actors(ray_session, tmp_path):
    tables = run("decode", tmp_path, "--shards", "2")
    arm = models.actor_arm(Split(1, 1))
    said = tables["Greedy tokens against transformers'"][arm]
    assert said["identical"] + said["ties"] == 4
    assert {models.HERE, models.TRANSFORMERS, arm} < set(tables["Decoding"])
    curve = tables["ms per layer of a decode step over shards"]
    assert set(curve) == {2}
    assert all(row["shard actors, threads 1:1"] > 0 for row in curve.values())


def test_serve_with_training(ray_session, tmp_path):
    """Both arms get whole answers, and training goes on in one and rests in the other."""
    from actors import pool as pools

    flags = ["--with-training", "--quick", "--set", "model.num_hidden_layers=2", "--set", "train.seq_len=32"]
    flags += ["--set", "placement.niceness=0"]  # beside other work, what takes idle cores only would never get one
    assert main(["bench", "serve", *flags, "--out", str(tmp_path)]) == 0
    assert "bench" not in pools.names("trinity")
    assert (tmp_path / "serve-with-training.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "serve-with-training.json").read_text())
    arms = {each["arm"]: each["rounds"][0] for each in report["results"]}
    assert all(arms[arm]["failed"] == 0 and arms[arm]["completed"] == 4 for arm in ("requests alone", "both"))
    assert all(arms[arm]["training_tokens_per_s"] > 0 for arm in ("training alone", "both"))
    assert arms["both"]["versions"] >= 1
    facts = dict(report["tables"][1]["rows"])
    assert facts["ms to take up a version, median"] > 0
