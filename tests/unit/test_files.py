"""Every file of the repository: its size, its line ends, its syntax. What is ignored by git is not looked at."""

import ast
import fnmatch
import json
import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MAX_BYTES = 500 << 10
OTHERS = re.compile(
    r"(Of|That|So|With|As|By|For|In|Into|Until|When|Without|From|After|Before|If|To|Whether|May|Only|No|Nobody"
    r"|What|Whatever|How|Where|Who|Whose|Why)\b"
)
BINARY = {".binpb", ".png", ".safetensors"}
AS_WRITTEN = "run_of_before"  # a checkpoint, whose manifest knows each byte
GENERATED = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
IGNORED = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line)]


def files(folder=ROOT):
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in IGNORED) or path.is_symlink():
            continue
        yield from files(path) if path.is_dir() else [path]


FILES = list(files())
TEXTS = [path for path in FILES if path.suffix not in BINARY and AS_WRITTEN not in path.parts]


def shown(path):
    return path.relative_to(ROOT).as_posix()


def test_there_are_files():
    assert {"README.md", ".pre-commit-config.yaml", "trinity/cli.py", "clusters/aws-p5.yaml"} <= set(map(shown, FILES))


def test_no_file_is_large():
    large = {shown(path): path.stat().st_size for path in FILES if path.stat().st_size > MAX_BYTES}
    assert not large, f"{large} bytes; {MAX_BYTES} are enough for a file that git keeps for ever"


def test_texts_end_in_one_line_end_and_lines_in_no_blank():
    bad = []
    for path in TEXTS:
        if path.name.endswith(GENERATED):
            continue
        text = path.read_bytes().decode("utf-8")
        if text and (not text.endswith("\n") or text.endswith("\n\n")):
            bad.append(f"{shown(path)}: its end")
        bad += [f"{shown(path)}:{n}" for n, line in enumerate(text.split("\n"), 1) if line != line.rstrip()]
    assert not bad, bad


def test_no_conflict_is_left():
    marks = tuple(mark * 7 + " " for mark in "<>|")
    bad = [shown(path) for path in TEXTS for line in path.read_text().splitlines() if line.startswith(marks)]
    assert not bad


@pytest.mark.parametrize(
    ("suffixes", "parse"),
    [
        ((".yaml", ".yml"), lambda text: list(yaml.safe_load_all(text))),
        ((".json",), json.loads),
        ((".toml",), tomllib.loads),
    ],
    ids=["yaml", "json", "toml"],
)
def test_syntax(suffixes, parse):
    found = [path for path in TEXTS if path.suffix in suffixes]
    assert found
    for path in found:
        try:
            parse(path.read_text())
        except ValueError as error:
            raise AssertionError(f"{shown(path)}: {error}") from None
        except yaml.YAMLError as error:
            raise AssertionError(f"{shown(path)}: {error}") from None


def test_docstrings_begin_with_a_verb_or_a_noun():
    """Not with a preposition, a conjunction or a question, which leave the reader to guess what the thing is."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for path in (
        path for path in FILES if shown(path).startswith(("trinity/", "actors/", "serving/")) and path.suffix == ".py"
    ):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
        found = [text for node in nodes if OTHERS.match(text := ast.get_docstring(node) or "")]
        assert not found, f"{shown(path)}: {found}"


def test_scripts_can_be_run_and_nothing_else():
    for path in TEXTS:
        is_script = path.read_bytes()[:2] == b"#!"
        assert os.access(path, os.X_OK) == is_script, (
            f"{shown(path)}: chmod {'+x' if is_script else '-x'}, or its first line"
        )
