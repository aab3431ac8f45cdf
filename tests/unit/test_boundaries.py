"""A folder is a dependency boundary: this walks every import statement, lazy ones included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for top in ("trinity", "actors", "serving", "protos") for p in (ROOT / top).rglob("*.py"))
FORBIDDEN_OUTSIDE = {  # library -> the only places that may say it
    "ray": ("actors", "serving", "trinity/cli.py", "trinity/commands"),
    "grpc": ("serving", "protos", "trinity/cli.py", "trinity/commands"),
    "fastapi": ("serving",),
    "uvicorn": ("serving",),
}
INSIDE_TRINITY = {  # folder -> the sibling folders it may not import
    "model": ("experts", "placement", "engine"),
    "experts": ("model", "placement", "engine"),
    "placement": ("model", "experts", "engine"),
    "engine": ("experts", "placement"),
    "exact": ("model", "experts", "placement", "engine"),
}
UPWARDS = {
    "trinity": ("actors", "serving", "protos"),
    "actors": ("serving", "protos"),
    "protos": ("trinity", "actors", "serving"),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def ids(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_imports_point_one_way(path):
    here = ids(path)
    is_root = here.startswith(("trinity/cli.py", "trinity/commands"))  # the composition root may import everyone
    for module in imports(path):
        top, _, rest = module.partition(".")
        allowed = FORBIDDEN_OUTSIDE.get(top)
        assert allowed is None or here.startswith(allowed), f"{here} imports {module}"
        if not is_root:
            assert top not in UPWARDS.get(here.split("/")[0], ()), f"{here} imports {module}"
        if here.startswith("trinity/") and top == "trinity" and "/" in here.removeprefix("trinity/"):
            folder = here.split("/")[1]
            assert rest.split(".")[0] not in INSIDE_TRINITY.get(folder, ()), f"{here} imports {module}"


def test_the_pure_parts_of_placement_need_only_numpy():
    for path in (ROOT / "trinity/placement").glob("*.py"):
        assert not [m for m in imports(path) if m.split(".")[0] in ("torch", "ray")], path


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "config.py"], ids=ids)
def test_the_environment_is_read_in_config_only(path):
    text = path.read_text()
    assert "os.environ" not in text, f"{ids(path)} reads the environment; trinity/config.py is the place"
    assert "os.getenv" not in text, f"{ids(path)} reads the environment; trinity/config.py is the place"


@pytest.mark.parametrize("path", [p for p in SOURCES if "_pb2" not in p.name], ids=ids)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 450, f"{ids(path)} is too long; is there a seam?"
