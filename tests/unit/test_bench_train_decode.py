"""`trinity bench train` and `decode`, in one process and beside transformers: they run, and they notice wrong answers."""

import json
from argparse import Namespace

import pytest
import torch

from trinity.bench import apart, decode, families, models, train
from trinity.cli import main
from trinity.config import preset
from trinity.errors import ConfigError, TrinityError
from trinity.placement.table import PlacementTable

QUICK = ["--quick", "--threads", "1", "--without", "actors"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(out, *arguments):
    """-> the JSON, by title's first word and arm."""
    assert main(["bench", *arguments, *QUICK, "--out", str(out)]) == 0
    assert (out / f"{arguments[0]}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / f"{arguments[0]}.json").read_text())


def rows(report, title):
    """-> {arm: {column: cell}} of the table with that title."""
    table = next(t for t in report["tables"] if t["title"].startswith(title))
    return {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}


def test_train_agrees_with_transformers_before_it_compares_times(out, capsys):
    report = run(out, "train")
    arms = rows(report, "Training with AdamW")
    assert set(arms) == {models.HERE, models.TRANSFORMERS}
    assert set(rows(report, "Training with Muon")) == {models.HERE}
    for arm in arms.values():
        assert float(arm["loss of step 1"]) == pytest.approx(7.63, abs=0.2)
        assert arm["min"] <= arm["tokens/s median"] <= arm["max"]
    phases = rows(report, "Seconds of a step")[models.HERE]
    assert phases["sum"] == pytest.approx(128 / arms[models.HERE]["tokens/s median"], rel=1e-6)
    assert all(phases[name] > 0 for name in train.PHASES)
    assert "Training with AdamW: preset tiny" in capsys.readouterr().out


def test_decode_says_the_same_tokens_as_transformers(out):
    report = run(out, "decode")
    said = rows(report, "Greedy tokens")[models.HERE]
    assert said["identical"] + said["ties"] == 4
    arm = rows(report, "Decoding")[models.HERE]
    in_all_s = arm["prompts s"] + 5 * arm["ms a step"] / 1e3
    assert arm["tokens/s in all"] == pytest.approx(4 * 6 / in_all_s, rel=1e-6)
    assert arm["tokens/s median"] == pytest.approx(4 * 5 / (5 * arm["ms a step"] / 1e3), rel=1e-6)
    assert [curve["x_label"] for curve in report["curves"]] == ["requests", "shards"]
    assert all(ms > 0 for curve in report["curves"] for line in curve["lines"].values() for ms in line)


def test_the_checkpoint_is_written_once_and_again_for_another_model(tmp_path):
    tiny = preset("tiny").model_copy(update={"vocab_size": 512, "num_experts": 4})
    path = models.checkpoint(tiny, tmp_path / "model")
    written = (path / "manifest.json").stat().st_mtime_ns
    models.checkpoint(tiny, tmp_path / "model")
    assert (path / "manifest.json").stat().st_mtime_ns == written
    models.checkpoint(tiny.model_copy(update={"num_experts": 8}), tmp_path / "model")
    assert (path / "manifest.json").stat().st_mtime_ns != written


def step_of(loss, grad_norm):
    return lambda: train.Step(1, loss, grad_norm, dict.fromkeys(train.PHASES, 1.0))


@pytest.mark.parametrize(("loss", "grad_norm"), [(2.002, 1.0), (2.0, 1.002), (float("nan"), 1.0), (2.0, float("nan"))])
def test_train_refuses_to_time_arms_that_differ(loss, grad_norm):
    race = train.Race(10)
    race.add(models.HERE, 1, step_of(2.0, 1.0))
    race.add("other", 1, step_of(2.0005, 1.0005))
    race.check()
    race.add("wrong", 1, step_of(loss, grad_norm))
    with pytest.raises(TrinityError, match="'wrong' has loss"):
        race.check()


def test_first_steps_in_bf16_may_differ_by_more():
    race = train.Race(10, train.MAX_DIFFERENCE["bfloat16"])
    race.add(models.HERE, 1, step_of(2.0, 1.0))
    race.add("other", 1, step_of(2.009, 1.009))
    race.check()
    race.add("wrong", 1, step_of(2.011, 1.0))
    with pytest.raises(TrinityError, match="'wrong' has loss"):
        race.check()


def test_decode_counts_as_ties_only_what_transformers_cannot_tell_apart():
    theirs = [[1, 2, 3], [1, 2, 3], [1, 2, 3]]
    ours = [[1, 2, 3], [1, 9, 9], [1, 2, 9]]
    gaps_NB = [[1.0, 1.0, 1.0], [1.0, 5e-5, 1.0], [1.0, 0.0, 2e-4]]
    same, ties, other = decode.agreement(ours, theirs, gaps_NB)
    assert same == 1
    assert ties == ["request 1 at token 1: gap 5.0e-05"]
    assert other == ["request 2 at token 2: gap 2.0e-04"]


def test_decode_refuses_to_time_an_engine_that_says_something_else(out, monkeypatch, capsys):
    honest = decode.Ours.run

    def lie(self, prompts, num_new):
        found = honest(self, prompts, num_new)
        return found._replace(tokens=[[(token + 1) % 2048 for token in tokens] for tokens in found.tokens])

    monkeypatch.setattr(decode.Ours, "run", lie)
    assert main(["bench", "decode", *QUICK, "--out", str(out)]) == 2
    assert "differ in 4 of 4 requests beyond ties" in capsys.readouterr().err


def test_apart_runs_a_process_for_each_turn(tmp_path):
    options = ["--apart", "--layers", "2", *QUICK, "--without", "transformers"]
    assert main(["bench", "decode", *options, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "decode.json").read_text())
    arm, (turn,) = report["results"][0]["arm"], report["results"][0]["turns"]
    assert arm == models.HERE
    assert [[len(tokens) for tokens in run["tokens"]] for run in turn["runs"]] == [[4], [3] * 4]
    step_s = turn["runs"][0]["decode_s"] / 3
    told = rows(report, "One request and the memory")
    read = 1e9 * (told["bytes of matrices a token, GB"]["median"] + told["of keys and values, GB"]["median"])
    assert told["share of it"]["median"] == pytest.approx(read / step_s / turn["bytes_per_s"])


def test_gains_of_families_are_compared(tmp_path):
    assert main(["bench", "decode", "--families", "--quick", "--out", str(tmp_path)]) == 0
    (table, _) = json.loads((tmp_path / "decode-families.json").read_text())["tables"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    assert [(row["requests"], row["family"]) for row in rows] == [
        (n, kind) for n in (1, 2) for kind in families.QUICK["kinds"]
    ]
    for first, row in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert row["gain"] == pytest.approx(row[models.TRANSFORMERS] / row["ours"])  # of one round
        assert row[f"/ {families.FIRST}'s"] == pytest.approx(row["gain"] / first["gain"])


def turn_of(tokens_per_s, tokens):
    runs = [
        {"tokens": [tokens] * s.requests, "first_s": s.requests * s.prompt_len / tokens_per_s, "decode_s": 1.0,
         "num_decoded": tokens_per_s, "likely": [[tokens[0], 3]] * s.requests} for s in apart.USUAL
    ]  # fmt: skip
    return {"load_s": 2.0, "bytes_per_s": 1e12, "runs": runs}


@pytest.mark.parametrize(("theirs", "failure"), [([7, 1], ""), ([3, 7], "0 of 42 first tokens")])
def test_apart_compares_medians_of_turns_and_first_tokens(theirs, failure):
    turns = {
        models.HERE: [turn_of(rate, [7, 2]) for rate in (10.0, 40.0, 30.0)],
        models.TRANSFORMERS: [turn_of(rate, theirs) for rate in (10.0, 10.0, 10.0)],
    }
    given = Namespace(preset="nano", layers=None, threads=2, rounds=3)
    report = apart.report(given, preset("nano"), apart.USUAL, turns)
    assert {what: value for what, value, _, _ in report.targets if "x" in what or "at once" in what} == {
        f"{what}: {models.HERE} / {models.TRANSFORMERS}": 3.0 for what in apart.TARGETS if what != apart.LOADING
    }
    assert report.failure.startswith(failure)
    assert bool(report.failure) == bool(failure)


def test_what_a_token_reads_of_nano():
    weights, kept = apart.token_bytes(preset("nano"), 100)
    assert weights == pytest.approx(1.64e9, rel=0.01)
    assert kept == 100 * 56 * 1024
    assert apart.token_bytes(preset("nano"), 4096)[1] == (14 * 4096 + 42 * 2048) * 1024


def test_apart_refuses_what_memory_does_not_hold():
    with pytest.raises(ConfigError, match="--layers"):
        apart.check_room(1 << 50)


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
def test_rows_sent_is_what_random_routing_sends(num_shards):
    model = preset("bench")
    table = PlacementTable.spread(model.moe_layers, model.num_experts, tuple(map(str, range(num_shards))))
    ids_TK = torch.rand(4000, model.num_experts, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :4]
    shard_E = torch.from_numpy(table.shard_LEN)[0, :, 0]
    sent = sum(len(row.unique()) for row in shard_E[ids_TK]) / len(ids_TK)
    assert decode.rows_sent(model, num_shards) == pytest.approx(sent, rel=0.03)


@pytest.mark.parametrize("text", ["2", "2:1:1", "0:1", "a:b", ""])
def test_a_split_is_two_numbers(text, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "train", "--splits", text])
    assert "--splits" in capsys.readouterr().err
