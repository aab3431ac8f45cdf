"""A run that was begun before today's layout and names (commit 3a32943) goes on, and can be served.

`run_of_before/` is what that commit left of a run of five steps: its settings, its text, its checkpoint of step 2, and the
losses that it found in the steps after.
"""

import json
import shutil
from pathlib import Path

import pytest

from serving.launch import resolve
from tests.unit.test_trainer import trainer_for
from trinity.checkpoint import latest_checkpoint, open_checkpoint
from trinity.config import Config, read_yaml
from trinity.config.tree import RENAMED
from trinity.errors import ConfigError

FOLDER = Path(__file__).with_name("run_of_before")
SETTINGS = read_yaml(FOLDER / "settings.yaml")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy, where its relative paths lead."""
    shutil.copytree(FOLDER, tmp_path / "run")
    shutil.move(tmp_path / "run/text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path("run")


def test_its_settings_have_the_names_of_then():
    for name, new in RENAMED.items():
        section, key = name.split(".")
        assert key in SETTINGS[section]
        with pytest.raises(ConfigError, match=f"it is called '{new}' now"):
            Config.from_tree({"model": "tiny", section: {key: SETTINGS[section][key]}})


def test_it_goes_on_with_the_losses_of_then(run):
    """On another number of shards, so sums are in another order."""
    newer = {name.split(".")[1]: new.split(".")[1] for name, new in RENAMED.items()}
    sections = {
        section: {newer.get(key, key): value for key, value in SETTINGS[section].items()}
        for section in ("model", "data", "train", "optim")
    }
    trainer = trainer_for(Config.from_tree(sections).replace(train={"resume": True}), num_shards=1)
    assert (trainer.version, trainer.position) == (2, 2)
    want = json.loads((FOLDER / "later.json").read_text())["steps 3 to 5"]
    assert [trainer.step().loss for _ in want] == pytest.approx(want, abs=1e-5)


def test_it_can_be_served(run):
    checkpoint = open_checkpoint(latest_checkpoint(run))
    checkpoint.verify()
    from_checkpoint = resolve(str(checkpoint.path), {})
    live = resolve(str(run), {"serve": {"weights": "live"}})
    assert from_checkpoint.model == live.model == checkpoint.config
    assert live.placement.pool == SETTINGS["placement"]["pool"]
