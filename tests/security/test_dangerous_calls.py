"""S1: nothing outside the tests can run code that came as data."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for top in ("trinity", "actors", "serving", "protos", "scripts") for p in (ROOT / top).rglob("*.py"))
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("os", "system")}
TRUE_KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}


def danger(node):
    if isinstance(node, ast.Import):
        return next((a.name for a in node.names if a.name.split(".")[0] in MODULES), None)
    if isinstance(node, ast.ImportFrom):
        return node.module if (node.module or "").split(".")[0] in MODULES else None
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
        return node.func.id
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        name = (node.func.value.id, node.func.attr)

        if name in CALLS:
            return ".".join(name)
    on = [
        k.arg
        for k in node.keywords
        if k.arg in TRUE_KEYWORDS and not (isinstance(k.value, ast.Constant) and not k.value.value)
    ]
    return on[0] if on else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_dangerous_call(path):
    found = [(node.lineno, what) for node in ast.walk(ast.parse(path.read_text())) if (what := danger(node))]
    assert not found, f"{path.relative_to(ROOT)}: {found}"


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from marshal import loads", "eval('1')", "torch.load('x')", "yaml.load(f)", "run('x', shell=True)",
     "np.load('x', allow_pickle=True)", "f(trust_remote_code=flag)"],
)  # fmt: skip
def test_the_check_sees_what_it_forbids(code):
    assert any(danger(node) for node in ast.walk(ast.parse(code)))


@pytest.mark.parametrize("code", ["np.load('x')", "run(['x'], shell=False)", "re.compile('x')"])
def test_the_check_leaves_the_rest_alone(code):
    assert not any(danger(node) for node in ast.walk(ast.parse(code)))
