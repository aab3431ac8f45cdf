"""Environments that are not ours: proxies, installations that cannot be written, files with our packages' names."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest

from actors.cluster import check_names
from trinity.config import PACKAGES, setup_environment, setup_grpc, setup_proxies
from trinity.config.env import GRPC_EXCEPTIONS
from trinity.errors import ConfigError

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"
HERE = ("http://localhost:1", "http://127.0.0.1:1", "http://[::1]:1")


@pytest.fixture
def environment(monkeypatch):
    """An environment without a word of proxies, to be spoiled; afterwards it is as it was."""
    monkeypatch.setattr(os, "environ", os.environ)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.setenv(name, "")  # put back at the end, whatever is set in between
        monkeypatch.delenv(name)
    return monkeypatch


def asks_proxy(url):
    """Whether httpx would send a request for `url` to a proxy, by the environment."""
    with httpx.Client() as client:
        return client._transport_for_url(httpx.URL(url)) is not client._transport


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("excepted", [{}, {"no_proxy": "intra.example"}, {"NO_PROXY": " intra.example, .corp "}])
def test_no_proxy_is_asked_for_this_machine(environment, name, excepted):
    for key, value in {name: NOWHERE, **excepted}.items():
        environment.setenv(key, value)
    assert any(map(asks_proxy, HERE))
    setup_proxies()
    setup_proxies()
    assert not any(map(asks_proxy, HERE))
    assert asks_proxy("http://huggingface.co")
    assert asks_proxy("http://intra.example") is not bool(excepted)
    assert os.environ["no_proxy"].count("localhost") == 1


def test_without_proxies_nothing_is_said(environment):
    setup_proxies()
    assert "no_proxy" not in os.environ


def grpc_answers(address):
    with grpc.insecure_channel(address) as channel:
        try:
            return channel.unary_unary("/any/Thing")(b"", timeout=20) == b"here"
        except grpc.RpcError:
            return False


@pytest.mark.parametrize("excepted", [{}, {"no_proxy": "intra.example"}, {"no_grpc_proxy": "intra.example"}])
def test_processes_of_a_pool_talk_to_each_other_without_a_proxy(environment, excepted):
    """By gRPC itself, to an address that is no loopback where there is one: what Ray Serve's replicas do."""

    class Here(grpc.GenericRpcHandler):
        def service(self, details):
            return grpc.unary_unary_rpc_method_handler(lambda request, context: b"here")

    server = grpc.server(ThreadPoolExecutor(1), handlers=(Here(),))
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    address = f"127.0.0.2:{port}"
    for key, value in {"http_proxy": NOWHERE, "https_proxy": NOWHERE, **excepted}.items():
        environment.setenv(key, value)
    assert not grpc_answers(address)
    setup_grpc()
    assert grpc_answers(address)
    assert os.environ[GRPC_EXCEPTIONS].startswith("intra.example," if excepted else "localhost,")
    server.stop(None)


def test_a_private_cluster_is_prepared_for_its_surroundings(environment):
    names = ("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "RAY_preload_python_modules")
    for name in names:
        environment.setenv(name, "")
        environment.delenv(name)
    setup_environment("disabled", is_local=False)
    assert not any(name in os.environ for name in names)
    setup_environment("disabled")
    assert [os.environ[name] for name in names] == ["0", ",".join(PACKAGES)]


def test_the_packages_that_workers_load_first_are_all_there_are():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"} == set(PACKAGES)


def test_a_file_of_our_packages_name_is_refused_where_workers_would_take_it(tmp_path):
    check_names(tmp_path)
    check_names(ROOT)
    (tmp_path / "serving.py").touch()
    with pytest.raises(
        ConfigError, match=r"would take .*serving.py for Trinity's own 'serving'; start the command in another"
    ):
        check_names(tmp_path)
    (tmp_path / "serving.py").unlink()
    (tmp_path / "actors").mkdir()
    check_names(tmp_path)  # a folder of things, no package
    (tmp_path / "actors" / "__init__.py").touch()
    with pytest.raises(ConfigError, match="own 'actors'"):
        check_names(tmp_path)


COMPILE = """
import os, sys
import numba
from pathlib import Path
from trinity.ops.batch_invariant import compiled
from trinity.ops.batch_invariant.elementwise import sigmoid
print(numba.config.CACHE_DIR)
"""


@pytest.mark.parametrize("home", ["/proc/nowhere", None])
def test_kernels_compile_where_the_installation_cannot_be_written(tmp_path, home):
    """Below /proc nobody writes, root neither; a folder that __pycache__ is a file in is one, too."""
    shutil.copytree(ROOT / "trinity", tmp_path / "trinity", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("", "ops", "ops/batch_invariant"):
        (tmp_path / "trinity" / folder / "__pycache__").touch()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(tmp_path),
        "TMPDIR": str(temporary),
        "XDG_CACHE_HOME": "/proc/nowhere",
    }
    environment |= {"HOME": home} if home else {}
    found = subprocess.run(
        [sys.executable, "-B", "-c", COMPILE], env=environment, cwd="/", capture_output=True, text=True, timeout=100
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().startswith(str(temporary))
