"""The examples run: training and offline generation here, reinforcement learning in test_rollout.py, clients in tests/serve."""

import importlib.util
import re
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.unit.killed_stages import train_here

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """-> losses, and the checkpoint that the training example wrote."""
    folder = tmp_path_factory.mktemp("example")
    (folder / "text.txt").write_text(" ".join(f"word{i % 7} is {i % 5}" for i in range(3000)))
    example = load("train_in_one_process")
    return example.train(example.settings([str(folder / "text.txt")], steps=8, out=str(folder / "run")))


def test_a_model_is_trained_in_one_process(trained):
    losses, checkpoint = trained
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert (checkpoint / "manifest.json").is_file()


def test_prompts_are_completed_offline(trained, capsys):
    prompts = ["word1 is", "word2"]
    texts = load("offline_generation").main([str(trained[1]), *prompts, "--max-tokens", "4"])
    assert len(texts) == 2
    out = capsys.readouterr().out
    assert all(repr(prompt) in out for prompt in prompts)


def test_the_recipe_goes_from_text_to_a_model_that_chats(tmp_path, monkeypatch, capsys):
    """All its stages with a step or two each, in this process: files, stages, gates, exports, scores, a chat."""
    recipe = load("recipe")
    tree = yaml.safe_load(recipe.RECIPE.read_text())
    (tmp_path / "code.txt").write_text(" ".join(f"def f{i % 7}(x): return x + {i}" for i in range(3000)))
    for part in (tree, *tree["stages"]):
        part["train"] = {**part.get("train", {}), **({"steps": 2} if part is not tree else {"save_every": 0})}
        for task in part.get("evaluate", {}).get("tasks", ()):
            task |= {"questions": 2} | ({"at_least": 0.0} if "at_least" in task else {})
    text = yaml.safe_dump(tree).replace("stdlib", str(tmp_path / "code.txt"))
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "RECIPE", tmp_path / "recipe.yaml")
    monkeypatch.setattr(recipe, "QUESTIONS", 2)
    monkeypatch.setattr(recipe, "write_data", partial(recipe.write_data, scale=0.01))
    monkeypatch.setattr("trinity.commands.train._trained", train_here)
    assert recipe.main([]) == 0
    shown = capsys.readouterr().out
    for name in recipe.EXPORTS:
        assert f"transformers loads {name} and goes on: " in shown
        assert f"### {name}" in shown
        assert "niah" in (tmp_path / "runs" / "recipe" / name / "README.md").read_text() or name == "Preview"
    assert "> who are you?" in shown


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_how_to_run_it_and_is_listed(path):
    assert f".venv/bin/python examples/{path.name}" in load(path.stem).__doc__
    assert f"]({path.name})" in (ROOT / "examples" / "README.md").read_text()


def test_every_example_is_run_by_a_test():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for path in EXAMPLES:
        assert re.search(rf'"{path.stem}(\.py)?"', tests), f"no test names {path.name}"
