"""A folder is a dependency boundary: a table says what each package may import, and whatever it does not name fails.

Every import statement counts, those inside functions and under TYPE_CHECKING included. docs/architecture.md draws the table.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("trinity", "actors", "serving", "protos")
SOURCES = sorted(p for top in OURS for p in (ROOT / top).rglob("*.py"))
EVERYBODY = {"trinity.errors", "trinity.utils", "trinity.config", "trinity.native"}  # may be imported by all

FAMILIES = {"trinity.models.afmoe", "trinity.models.glm4_moe", "trinity.models.qwen3_moe"}
MODELS = {"trinity.models.common", "trinity.models.rules", "trinity.models.registry"}  # nobody outside knows a family
LIBRARY = {
    "trinity.rpc", "trinity.ops", *MODELS, "trinity.state", "trinity.optim", "trinity.placement", "trinity.dispatch",
    "trinity.text", "trinity.checkpoint", "trinity.experts", "trinity.observability", "trinity.pool", "trinity.engine",
    "trinity.data", "trinity.synthesis", "trinity.train", "trinity.adapters",
}  # fmt: skip
ACTORS = {
    "actors.names", "actors.dataplane", "actors.sync", "actors.shard", "actors.shard_server", "actors.control", "actors.pool",
    "actors.cluster", "actors.round_trips", "actors.train", "actors.train_metrics", "actors.chaos", "actors.jobs",
    "actors.rendezvous",
}  # fmt: skip
SERVING = {
    "serving.access", "serving.addresses", "serving.adoption",
    "serving.app", "serving.bodies", "serving.body_worker", "serving.chosen_replica",
    "serving.continuation", "serving.deploy", "serving.fitting",
    "serving.engine", "serving.errors", "serving.frontend", "serving.gateway", "serving.grpc", "serving.http",
    "serving.launch", "serving.limits", "serving.line_end", "serving.lines", "serving.metrics", "serving.nodes",
    "serving.page", "serving.pins", "serving.pool_operator", "serving.removal", "serving.roles", "serving.routed",
    "serving.routing", "serving.slices", "serving.streams", "serving.tracing", "serving.training_run",
    "serving.vllm_names",
}  # fmt: skip

MAY_IMPORT: dict[str, set[str]] = {
    "trinity": {
        "trinity.llm", "trinity.rl",  # the names of `from trinity import ...`
        "trinity.models.registry",  # so that a configuration knows the families, whoever reads it
    },
    "trinity.errors": set(),
    "trinity.utils": set(),
    "trinity.config": set(),
    "trinity.native": set(),
    "trinity.rpc": set(),
    "trinity.ops": set(),
    "trinity.models.common": {"trinity.ops", "trinity.models.rules"},
    "trinity.models.registry": {"trinity.models.common"},  # and families, by the name that a checkpoint gives
    "trinity.models.rules": set(),
    **{family: {"trinity.models.common", "trinity.models.rules", "trinity.ops"} for family in FAMILIES},
    "trinity.state": set(),
    "trinity.optim": {"trinity.state"},  # strides: how a stack lies in memory decides how its moments are updated
    "trinity.placement": set(),
    "trinity.dispatch": {"trinity.rpc", "trinity.placement", "trinity.observability"},
    "trinity.text": set(),
    "trinity.adapters": {*MODELS, "trinity.ops"},
    "trinity.checkpoint": {
        *MODELS, "trinity.rpc", "trinity.text",
        "trinity.adapters",  # a folder may be an adapter's: it counts as its base with the adapter merged in
        "trinity.ops",  # what the bytes of a quantised matrix stand for
    },
    "trinity.experts": {
        "trinity.ops", "trinity.rpc", "trinity.state", "trinity.optim", "trinity.checkpoint", "trinity.models.rules",
        "trinity.adapters",  # names and first values of what lies beside an expert's weights
    },
    "trinity.observability": set(),
    "trinity.pool": {
        "trinity.experts", "trinity.dispatch", "trinity.placement", "trinity.rpc",
        "trinity.state",  # a pool hands out the backbone of a version
    },
    "trinity.engine": {"trinity.models.common", "trinity.ops", "trinity.text"},  # pool and checkpoint are handed in
    "trinity.data": {"trinity.text", "trinity.checkpoint"},  # a tokenizer may be that of a model on the Hub
    "trinity.train": {
        "trinity.pool", "trinity.dispatch", *MODELS, "trinity.checkpoint", "trinity.data", "trinity.optim", "trinity.state",
        "trinity.rpc", "trinity.observability", "trinity.adapters",
        "trinity.text",  # a checkpoint holds the tokenizer
    },
    "trinity.llm": {  # an offline program is composed here: a checkpoint, shards in this process, an engine
        *MODELS, "trinity.checkpoint", "trinity.engine", "trinity.pool", "trinity.rpc", "trinity.text",
    },
    "trinity.rl": {  # training and an engine, composed
        "trinity.data", "trinity.engine", "trinity.llm", *MODELS, "trinity.observability", "trinity.pool", "trinity.state",
        "trinity.train",
        "trinity.checkpoint",  # reference scores belong to the weights that a run begins with
        "trinity.text",  # a teacher and its student have one tokenizer
    },
    "trinity.evaluate": {  # an engine over a trainer's weights asks what a user would
        "trinity.engine", "trinity.observability", "trinity.rl", "trinity.train",
        "trinity.data",  # prompts whose answers rewards judge
    },
    "trinity.launch": {
        "trinity.checkpoint", "trinity.evaluate", "trinity.observability", "trinity.pool", "trinity.preparing", "trinity.rl",
        "trinity.train", "actors.pool", "actors.train", "serving.app",
    },
    "trinity.preparing": {  # of all stages, by a job where there is much
        "trinity.checkpoint", "trinity.data", "trinity.stages", "trinity.text", "actors.jobs",
    },
    "trinity.stages": {"trinity.checkpoint", "trinity.evaluate"},
    "trinity.synthesis": {"trinity.checkpoint", "trinity.data", "trinity.text"},  # tokenizers of models, too
    "trinity.bench": {*LIBRARY, "trinity.llm", "trinity.launch", *ACTORS, *SERVING, "protos"},
    "trinity.chaos": {*LIBRARY, "trinity.bench", "trinity.launch", "trinity.rl", *ACTORS, *SERVING, "protos"},
    "trinity.commands": {
        *LIBRARY, "trinity", "trinity.evaluate", "trinity.llm", "trinity.launch", "trinity.preparing", "trinity.stages",
        "trinity.bench", "trinity.chaos", "trinity.rl", *ACTORS, *SERVING, "protos",
    },
    "trinity.cli": {"trinity", "trinity.commands"},
    "actors.names": {"trinity.rpc"},
    "actors.dataplane": {"trinity.dispatch", "trinity.rpc", "actors.names"},  # where Ray's errors become ours
    "actors.sync": {  # what an engine and a trainer follow: tables, weights, memory of those that died
        "trinity.dispatch", "trinity.engine", *MODELS, "trinity.placement", "trinity.pool", "trinity.state", "trinity.text",
        "trinity.train", "actors.names", "actors.dataplane",
    },
    "actors.cluster": {"actors.sync"},
    "actors.shard_server": {
        "trinity.checkpoint", "trinity.experts", "trinity.pool", "trinity.rpc", "trinity.state", "actors.names",
        "actors.dataplane", "actors.sync",
    },
    "actors.shard": {"actors.names", "actors.dataplane", "actors.shard_server", "trinity.experts"},
    "actors.control": {
        "trinity.experts", "trinity.placement", "trinity.pool", "trinity.rpc", "actors.names", "actors.dataplane",
        "actors.shard", "actors.sync",
    },
    "actors.pool": {
        "trinity.dispatch", "trinity.placement", "trinity.pool", "trinity.rpc", "trinity.state", "actors.names",
        "actors.dataplane", "actors.sync", "actors.shard", "actors.control",
    },
    "actors.jobs": {"trinity.data", "trinity.synthesis"},
    "actors.rendezvous": set(),
    "actors.round_trips": {"actors.names"},
    "actors.train": {
        "trinity.checkpoint", "trinity.data", "trinity.evaluate", "trinity.observability", "trinity.state", "trinity.train",
        "actors.pool", "actors.rendezvous", "actors.sync", "actors.train_metrics",
        "trinity.rl",  # preferences and rewards are runs like any other
    },
    "actors.train_metrics": {"trinity.models.common", "trinity.observability", "trinity.train"},
    "actors.chaos": {
        "trinity.dispatch", "trinity.train", "actors.control", "actors.names", "actors.pool", "actors.train",
    },
    "serving.addresses": set(),
    "serving.access": set(),
    "serving.streams": set(),
    "serving.errors": set(),
    "serving.limits": set(),
    "serving.nodes": set(),
    "serving.removal": set(),
    "serving.page": {"trinity.placement"},
    "serving.vllm_names": set(),
    "serving.tracing": {"trinity.engine"},
    "serving.training_run": {"trinity.observability"},  # the log of the run that is served
    "serving.pins": set(),
    "serving.continuation": {"serving.pins", "trinity.engine"},
    "serving.metrics": {"serving.vllm_names", "trinity.engine", "trinity.observability", "trinity.placement"},
    "serving.pool_operator": {"serving.errors", "trinity.placement"},
    "serving.frontend": {
        "serving.access", "serving.continuation", "serving.limits", "serving.metrics", "serving.pins",
        "serving.pool_operator", "serving.tracing", "serving.training_run", "trinity.engine", "trinity.text",
    },
    "serving.roles": set(),
    "serving.routing": {"serving.frontend", "trinity.engine"},
    "serving.routed": {"serving.frontend", "serving.roles", "serving.routing", "trinity.engine"},
    "serving.chosen_replica": set(),  # Ray Serve pickles it by value
    "serving.bodies": set(),
    "serving.http": {
        "serving.access", "serving.addresses", "serving.bodies", "serving.errors", "serving.frontend", "serving.page",
        "serving.streams", "serving.tracing", "serving.training_run", "trinity", "trinity.engine", "trinity.text",
    },
    "serving.grpc": {
        "protos", "serving.access", "serving.addresses", "serving.bodies", "serving.errors", "serving.frontend",
        "serving.http", "serving.pool_operator", "serving.streams", "serving.tracing",
        "trinity.engine", "trinity.placement", "trinity.text",
    },
    "serving.body_worker": {"serving.grpc", "serving.http", "trinity.text"},  # a program of its own
    "serving.gateway": {"serving.addresses", "serving.frontend", "serving.grpc", "serving.http", "serving.limits"},
    "serving.engine": {
        "trinity.checkpoint", "trinity.engine", "trinity.models.registry", "trinity.text", "actors.pool", "actors.sync",
        "serving.addresses", "serving.fitting", "serving.frontend", "serving.line_end", "serving.lines", "serving.nodes",
        "serving.roles", "serving.routed",
    },
    "serving.line_end": {"serving.slices", "trinity.engine"},
    "serving.lines": {"serving.line_end", "serving.slices", "trinity.engine"},
    "serving.slices": {"trinity.engine"},
    "serving.fitting": {"trinity.engine", "trinity.models.registry", "trinity.pool"},
    "serving.launch": {"trinity.checkpoint", "trinity.engine", "trinity.pool", "trinity.rpc", "trinity.text", "actors.pool"},
    "serving.app": {
        "actors.control", "actors.names", "serving.addresses", "serving.engine", "serving.frontend", "serving.gateway",
        "serving.nodes", "serving.pins", "serving.pool_operator", "serving.removal",
    },
    "serving.adoption": {"actors.names", "actors.pool", "serving.app", "serving.removal"},
    "serving.deploy": {"serving.app", "serving.launch"},
    "protos": set(),
}  # fmt: skip

ONLY_IN = {  # library -> the packages that may say it; others than these are free
    "ray": ("actors", "serving.adoption", "serving.app", "serving.chosen_replica", "serving.deploy", "serving.engine",
        "serving.nodes", "serving.removal", "trinity.bench"),
    "grpc": ("serving.grpc", "serving.engine", "serving.errors", "protos", "trinity.bench", "trinity.commands"),
    "grpc_health": ("serving.grpc",),
    "grpc_reflection": ("serving.grpc",),
    "starlette": ("serving.http",),
    "uvicorn": ("serving.http",),
    "h11": ("serving.http",),
    "httpx": ("trinity.bench", "trinity.commands", "trinity.synthesis"),
    "opentelemetry": ("serving.tracing",),
    "prometheus_client": ("serving.metrics", "serving.vllm_names", "trinity.observability.registry", "actors.train_metrics"),
    "lm_eval": ("trinity.commands", "trinity.evaluate"),
    "trackio": ("trinity.observability",),
    "wandb": ("trinity.observability",),
    "mlflow": ("trinity.observability",),
    "transformers": ("trinity.bench",),
    "megablocks": ("trinity.experts",),
    "stk": ("trinity.experts",),
    "triton": ("trinity.experts",),
    "numba": ("trinity.ops",),
    "llvmlite": ("trinity.ops",),
    "safetensors": ("trinity.checkpoint",),
    "huggingface_hub": ("trinity.checkpoint",),
    "tokenizers": ("trinity.text",),
    "jinja2": ("trinity.text",),
    "llguidance": ("trinity.text.grammar", "trinity.engine.grammars"),
    "pyarrow": ("trinity.data", "trinity.synthesis"),
    "fsspec": ("trinity.data.remote",),
    "aiohttp": ("trinity.data.remote",),
    "matplotlib": ("trinity.bench", "trinity.train"),
    "tqdm": ("trinity.train", "trinity.utils"),
    "yaml": ("trinity.config", "trinity.launch"),
    "pydantic": ("trinity.config", "trinity.models", "trinity.engine", "trinity.commands", "serving.http", "serving.deploy",
        "trinity.checkpoint.quantisation"),  # there: expressions from a stranger's file, in linear time
    "torch": (
        "trinity.rpc", "trinity.utils", "trinity.ops", "trinity.models", "trinity.state", "trinity.optim",
        "trinity.dispatch", "trinity.checkpoint", "trinity.experts", "trinity.observability", "trinity.engine",
        "trinity.adapters", "trinity.data", "trinity.train", "trinity.rl", "trinity.llm", "trinity.bench", "trinity.chaos",
        "trinity.commands", "actors.dataplane", "actors.shard_server", "actors.sync", "actors.train", "actors.train_metrics",
    ),
}  # fmt: skip


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def package(module: str) -> str:
    """The row of the table that a module belongs to."""
    parts = module.split(".")
    if parts[0] == "protos":
        return "protos"
    return ".".join(parts[: 3 if parts[:2] == ["trinity", "models"] else 2])


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module that a file imports, with what it takes out of a package where that is a module itself."""

    def found() -> Iterator[str]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{ids(path)} has a relative import"
                assert node.module
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if node.module.split(".")[0] in OURS and is_module(inner) else node.module

    return tuple(found())


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def edges() -> set[tuple[str, str]]:
    pairs = ((package(module_of(p)), package(m)) for p in SOURCES for m in imports(p) if m.split(".")[0] in OURS)
    return {(here, there) for here, there in pairs if here != there}


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_imports_point_one_way(path):
    """What the table does not name, fails; so does a package that has no row."""
    here = package(module_of(path))
    if here in ("actors", "serving", "trinity.models"):  # their __init__ files say what the folder is
        assert not imports(path)
        return
    assert here in MAY_IMPORT, f"{ids(path)} is of no package in the table: give {here} a row"
    for module in imports(path):
        if module.split(".")[0] in OURS:
            there = package(module)
            assert there == here or there in EVERYBODY | MAY_IMPORT[here], f"{ids(path)} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_libraries_stay_where_they_belong(path):
    here = module_of(path)
    for module in imports(path):
        homes = ONLY_IN.get(module.split(".")[0])
        assert homes is None or f"{here}.".startswith(tuple(f"{home}." for home in homes)), (
            f"{ids(path)} imports {module}"
        )


def test_only_jobs_use_ray_data():
    users = {module_of(path) for path in SOURCES if any(m.startswith("ray.data") for m in imports(path))}
    assert {package(user) for user in users} == {"actors.jobs"}


def test_no_package_imports_itself_through_others():
    left = edges()
    while ends := {there for _, there in left} - {here for here, _ in left}:
        left = {(here, there) for here, there in left if there not in ends}
    assert not left, f"a cycle among {sorted(left)}"


def test_the_table_names_nothing_that_is_not_there():
    there = {package(module_of(path)) for path in SOURCES}
    assert set(MAY_IMPORT) <= there
    assert set().union(*MAY_IMPORT.values()) <= there


def test_the_pure_parts_of_placement_need_only_numpy():
    outside = {module.split(".")[0] for path in (ROOT / "trinity/placement").glob("*.py") for module in imports(path)}
    assert not outside & {"torch", "ray", "pydantic"}


def test_who_only_controls_starts_without_torch():
    """The placement service, a gateway's replica, and what removes a pool's folders: torch takes longer than all else that
    they import, and a restart is a gap for callers."""
    code = (
        "import sys; sys.modules['torch'] = None; import actors.control.service, actors.sync.shm_folders, serving.app"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", [p for p in SOURCES if ids(p) != "trinity/config/env.py"], ids=ids)
def test_the_environment_is_read_in_config_only(path):
    text = path.read_text()
    for call in ("os.environ", "os.getenv"):
        assert call not in text, f"{ids(path)} reads the environment; trinity/config/env.py is the place"


@pytest.mark.parametrize("path", [p for p in SOURCES if "_pb2" not in p.name], ids=ids)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 450, f"{ids(path)} is too long; is there a seam?"
