"""`trinity bench placement` runs, its baseline is the published algorithm, and its loads are what it says."""

import json

import numpy as np
import pytest

from trinity.bench import eplb, placement
from trinity.bench.expert_loads import HOTTEST, drifting
from trinity.cli import main
from trinity.placement.planner import PlanGoal


def bench(out, *flags):
    code = main(["bench", "placement", "--quick", "--windows", "3", "--shards", "8", "--out", str(out), *flags])
    return code, json.loads((out / "placement.json").read_text()) if code == 0 else None


def test_the_smoke_run_writes_tables_json_and_a_picture(tmp_path, capsys):
    code, tree = bench(tmp_path)
    assert code == 0
    assert (tmp_path / "placement.png").read_bytes().startswith(b"\x89PNG")
    planners, trade_off, targets = tree["tables"]
    rows = {row[0]: row[1:] for row in planners["rows"]}
    assert set(rows) == {
        placement.OURS, placement.FRESH, placement.GLOBAL, placement.HIERARCHICAL, placement.STALE,
    }  # fmt: skip
    assert rows[placement.STALE][4] == 0
    assert rows[placement.OURS][4] < 0.5 * min(rows[placement.FRESH][4], rows[placement.GLOBAL][4])
    assert [row[3] for row in targets["rows"][:4]] == ["yes"] * 4
    assert len(trade_off["rows"]) == 2
    assert len(tree["results"][0]["steps"][placement.OURS]) == 3
    assert len(tree["curves"]) == 3
    assert "EPLB, by groups" in capsys.readouterr().out


def test_the_baseline_gives_the_example_of_its_readme():
    """12 experts in 4 groups, 16 slots, 2 nodes with 4 devices each; which slot of a device does not matter."""
    load_LE = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    published = [
        [{5, 6}, {5, 7}, {8, 4}, {3, 4}, {10, 9}, {10, 2}, {0, 1}, {11, 1}],
        [{7, 10}, {6, 8}, {6, 11}, {8, 9}, {2, 4}, {5, 1}, {5, 0}, {3, 1}],
    ]
    assert [[set(slots) for slots in row] for row in eplb.plan(load_LE, 8, 16, 4, 2).tolist()] == published


def test_packs_are_equal_in_size_and_the_rest_is_greedy():
    pack_LP = eplb.pack(np.array([[9.0, 1.0, 5.0, 4.0, 3.0, 2.0]]), 2)
    assert pack_LP.tolist() == [[0, 0, 1, 1, 0, 1]]


def test_the_loads_are_as_hot_and_drift_as_stated():
    load_WLE = drifting(2, 200, 256, rho=0.9, seed=1)
    hottest_L = load_WLE[0].max(1) / load_WLE[0].mean(1)
    assert HOTTEST[0] - 0.01 < hottest_L.min() < HOTTEST[0] + 0.5
    assert HOTTEST[1] - 0.5 < hottest_L.max() < HOTTEST[1] + 0.01
    one, two = np.log(load_WLE)
    kept = [np.corrcoef(a, b)[0, 1] for a, b in zip(one, two, strict=True)]
    assert np.mean(kept) == pytest.approx(0.9, abs=0.02)
    np.testing.assert_array_equal(load_WLE, drifting(2, 200, 256, rho=0.9, seed=1))


@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_counts_of_a_file_are_measured(tmp_path, suffix):
    counts, path = np.round(drifting(3, 2, 25, rho=0.9)), tmp_path / f"counts.{suffix}"
    np.save(path, counts) if suffix == "npy" else path.write_text(json.dumps(counts.tolist()))
    code, tree = bench(tmp_path, "--load", str(path), "--spare", "7")
    assert code == 0
    assert "3 windows of 2 layers x 25 experts, 8 shards, 32 slots a layer" in tree["tables"][0]["title"]
    assert placement.HIERARCHICAL not in [row[0] for row in tree["tables"][0]["rows"]]  # 25 experts are no 8 groups


def test_one_window_has_nothing_to_move(tmp_path):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(drifting(1, 2, 24, rho=0.9)[0].tolist()))
    code, tree = bench(tmp_path, "--load", str(path))
    assert code == 0
    assert {row[5] for row in tree["tables"][0]["rows"]} == {""}
    assert tree["curves"] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2]", "has shape (2,)"), ("[[1, -2]]", "negative"), ("[[1], [2, 3]]", "no numbers"), ("{", "no numbers")],
)
def test_a_file_that_is_no_load_is_named(tmp_path, capsys, text, message):
    path = tmp_path / "counts.json"
    path.write_text(text)
    assert bench(tmp_path, "--load", str(path))[0] == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert message in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load", "missing.npy"], "missing.npy does not exist"),
        (["--windows", "1"], "use 2 or more"),
        (["--shards", "0"], "--shards 0 is below 1"),
        (["--goal", "2"], "goal 2.0 is no balance"),
    ],
)
def test_wrong_flags_are_answered(tmp_path, capsys, flags, message):
    assert bench(tmp_path, *flags)[0] == 2
    assert message in capsys.readouterr().err


def test_what_both_planners_report_is_measured_alike():
    """Where a device has two replicas of one expert, the second counts for the balance and is no move."""
    load_LE = np.array([[4.0, 2.0]])
    double = placement.Planned(np.array([[[2, 0], [0, 1]]]), None, 0.0)
    assert placement._balance(load_LE, double).overall == 3 / 4
    single = placement.Planned(np.array([[[1, 0], [0, 1]]]), None, 0.0)
    assert placement._moved(single, double) == 0
    assert placement._moved(double, placement.Planned(np.array([[[0, 1], [1, 0]]]), None, 0.0)) == 1
    steps = placement.follow(
        drifting(2, 2, 24, 0.9), placement.planners(placement.Cluster(8, 4, 8, 32), PlanGoal(), 24)
    )
    assert all(step.moved is None for step, _ in steps.values())
