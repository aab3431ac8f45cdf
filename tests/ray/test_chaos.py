"""`trinity chaos train` in small: a shard and the worker are killed, messages are lost. A report, and the weights of the
undisturbed run."""

import json

import yaml

from tests.ray.runs import config_for, decisions
from trinity.cli import main


def test_training_under_chaos_loses_nothing_and_says_so(ray_session, tmp_path, capsys):
    config = config_for(tmp_path, steps=30).replace(placement={"niceness": 0})  # other work may have the cores
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    chaos = ["--faults", "kill-shard,kill-worker,lose-messages", "--every", "0.5", "--seconds", "2", "--compare"]
    assert main(["chaos", "train", str(tmp_path / "run.yaml"), *chaos]) == 0
    found = json.loads((tmp_path / "ray" / "chaos.json").read_text())["results"][0]
    values, faults = found["values"], found["faults"]
    assert [fault["fault"] for fault in faults] == ["lose-messages", "kill-shard", "kill-worker"]
    assert all(fault["target"] and "not found" not in fault["target"] for fault in faults)
    assert all(fault["recovered_s"] > 0 for fault in faults[:2]), "the next one waited for that"
    assert decisions(tmp_path / "ray") == list(range(1, 31)), "each step was logged once, in order"
    assert (values["steps"], values["steps lost"]) == (30, 0)
    assert 0 < values["goodput (steps x their median time / wall)"] <= 1.2
    assert values["weights bitwise those of the undisturbed run"] == "yes"
    assert values["largest difference of a weight"] == 0
    out = capsys.readouterr().out
    assert "### Faults; a step takes" in out
    assert "### Training under chaos" in out
