"""The examples run: training and offline generation here, reinforcement learning in test_rollout.py, clients in tests/serve."""

import importlib.util
import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_how_to_run_it_and_is_listed(path):
    assert f".venv/bin/python examples/{path.name}" in load(path.stem).__doc__
    assert f"]({path.name})" in (ROOT / "examples" / "README.md").read_text()


def test_every_example_is_run_by_a_test():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for path in EXAMPLES:
        assert re.search(rf'"{path.stem}(\.py)?"', tests), f"no test names {path.name}"
