"""What the documents name is there: files and headings behind links, paths, names in files, settings, commands, targets.

Conventions that these tests read: `path/to/file.py:name` is something defined in that file, `path/to/test_x.py::test_y` a test;
a path with `<` in it is a pattern, and not checked. In code blocks and code spans alike.
"""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import pytest

from trinity.cli import COMMANDS, PLACEMENT
from trinity.commands.bench import BENCHES
from trinity.commands.chaos import KINDS
from trinity.config import Config

ROOT = Path(__file__).parents[2]
DOCS = sorted(path for glob in ("*.md", "docs/*.md", "examples/*.md", ".github/**/*.md") for path in ROOT.glob(glob))
PRESENT = [path for path in DOCS if path.name != "CHANGELOG.md"]  # a history names what is gone, too
FENCED = re.compile(r"^```[\s\S]*?^```|^(?: {4}.*\n)+", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(
    r"(?<![\w./-])((?:trinity|actors|serving|protos|tests|docs|clusters|scripts|examples|\.github|\.ci)/[\w./*{},<>-]*)"
    r"(?:::?(\w+(?:\.\w+)*))?"
)
DOTTED = re.compile(r"(?<![\w./-])((?:trinity|actors|serving|protos)(?:\.[A-Za-z_]\w*)+)")
SETTING = re.compile(
    r"(?<![\w./])(?:--)?((?:model|optim|data|train|track|preferences|rl|distill|placement|engine|serve|cluster)(?:\.[a-z_]\w*)+)(?![\w(/])"
)
SUBCOMMANDS = {"placement": PLACEMENT, "bench": BENCHES, "chaos": KINDS}
ELSEWHERE = {"trinity/clusters/settings.yaml"}  # in a container image
NOT_SETTINGS = (".yaml", ".py", ".md", ".json", ".safetensors", ".layers", ".png")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def code(path):
    """The code of a document: spans and blocks, a string each."""
    text = re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.DOTALL)
    return FENCED.findall(text) + re.findall(r"`([^`]+)`", FENCED.sub("", text))


def slugs(path):
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in plain}


@functools.cache
def defined(path):
    """Names that a file defines, methods and fields included; of a file that is not Python, its words."""
    if path.suffix != ".py":
        return set(re.findall(r"\w+", path.read_text()))
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


def expanded(pattern):
    """`a/{b,c}.py` -> both."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    return [
        e for each in found[1].split(",") for e in expanded(pattern[: found.start()] + each + pattern[found.end() :])
    ]


def paths_in(path):
    """(path, name in it or None) for each path that a document's code names."""
    for text in code(path):
        for pattern, name in PATH.findall(text):
            if "<" not in pattern and pattern.rstrip(".,") not in ELSEWHERE:
                yield from ((each.rstrip(".,"), name) for each in expanded(pattern))


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_links_lead_somewhere(path):
    for target in LINK.findall(FENCED.sub("", path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{name_of(path)} links to {target}"
        assert not anchor or anchor in slugs(found), f"{name_of(path)}: {target} is no heading of {name_of(found)}"


@pytest.mark.parametrize("path", PRESENT, ids=name_of)
def test_paths_and_the_names_in_them_exist(path):
    for pattern, name in paths_in(path):
        files = list(ROOT.glob(pattern)) if "*" in pattern else [f for f in [ROOT / pattern] if f.exists()]
        assert files, f"{name_of(path)} names {pattern}"
        for part in name.split(".") if name else ():
            assert part in defined(files[0]), f"{name_of(path)}: {pattern} defines no {part}"


@pytest.mark.parametrize("path", PRESENT, ids=name_of)
def test_dotted_names_exist(path):
    for dotted in {name for text in code(path) for name in DOTTED.findall(text)}:
        if dotted.startswith("trinity.v1"):  # the protocol's package
            continue
        parts, at = dotted.split("."), ROOT
        while parts and ((at / parts[0]).is_dir() or (at / f"{parts[0]}.py").is_file()):
            at /= parts.pop(0)
        file = at / "__init__.py" if at.is_dir() else at.with_suffix(".py")
        assert set(parts) <= defined(file), f"{name_of(path)}: there is no {dotted}"


@pytest.mark.parametrize("path", PRESENT, ids=name_of)
def test_settings_exist(path):
    tree = Config.from_tree({"model": "tiny"}).model_dump()
    for setting in {name for text in code(path) for name in SETTING.findall(text)}:
        if setting.endswith(NOT_SETTINGS) or "layers." in setting:
            continue
        node = tree
        for part in setting.split("."):
            assert part in (node if isinstance(node, dict) else ()), f"{name_of(path)}: there is no setting {setting}"
            node = node[part]


@pytest.mark.parametrize("path", PRESENT, ids=name_of)
def test_commands_exist(path):
    for text in code(path):
        for command, rest in re.findall(r"(?:^|&& |\bbin/)trinity ([a-z][a-z|]*) ?([a-z|]*)", text, re.MULTILINE):
            for each in command.split("|"):
                assert each in COMMANDS, f"{name_of(path)}: there is no `trinity {each}`"
            known = SUBCOMMANDS.get(command, {})
            for each in filter(None, rest.split("|") if known else ()):
                assert each in known, f"{name_of(path)}: there is no `trinity {command} {each}`"


@pytest.mark.parametrize("path", PRESENT, ids=name_of)
def test_targets_of_make_exist(path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for text in code(path):
        for target in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
            assert target in targets, f"{name_of(path)}: there is no `make {target}`"


def test_the_index_names_every_document():
    listed = LINK.findall((ROOT / "docs" / "README.md").read_text())
    for path in sorted((ROOT / "docs").glob("*.md")):
        assert path.name == "README.md" or path.name in listed, f"docs/README.md does not list {path.name}"


@functools.cache
def boundaries():
    spec = importlib.util.spec_from_file_location("boundaries", ROOT / "tests" / "unit" / "test_boundaries.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MAY_IMPORT


def folder_rows():
    """(packages, the last cell) of each row of the folder tables; `trinity/models` stands for all that is in it."""
    for row in re.findall(r"^\| `.*\|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        drawn = [path.removesuffix(".py").replace("/", ".") for path in re.findall(r"`([^`]+)`", cells[0])]
        inside = tuple(f"{name}." for name in drawn if "." in name)
        yield [p for p in boundaries() if p in drawn or p.startswith(inside)], cells[-1]


def test_the_folder_table_shows_every_package():
    shown = {package for packages, _ in folder_rows() for package in packages}
    assert set(boundaries()) == shown, f"docs/architecture.md does not show {set(boundaries()) - shown}"


@pytest.mark.parametrize("top", ["trinity", "actors"])
def test_the_folder_table_says_who_may_import_whom(top):
    """In cells that are lists of names; others are sentences."""
    checked = 0
    for packages, cell in folder_rows():
        if packages and packages[0].startswith(f"{top}.") and re.fullmatch(r"([a-z_]+(, [a-z_]+)*)?", cell):
            allowed = set().union(*(boundaries()[package] for package in packages)) - set(packages)
            names = {package.split(".")[1] for package in allowed if package.startswith(f"{top}.")}
            assert cell == "everything" or names == set(filter(None, cell.split(", "))), (
                f"{packages} may import {names}"
            )
            checked += 1
    assert checked >= 8


@functools.cache
def words():
    """Every word of the code, tests included."""
    folders = ("trinity", "actors", "serving", "protos", "clusters", "tests")
    files = [
        path for top in folders for path in (ROOT / top).rglob("*") if path.suffix in (".py", ".proto", ".js", ".json")
    ]
    return set(re.findall(r"\w+", "\n".join(path.read_text() for path in files)))


@pytest.mark.parametrize("path", ["CONTRIBUTING.md", "docs/glossary.md"])
def test_names_of_the_code_exist(path):
    names = {span for span in code(ROOT / path) if re.fullmatch(r"[A-Za-z_]\w+", span)}
    assert len(names) > 40
    assert names <= words(), f"{path} names {sorted(names - words())}"
