"""What a machine with a GPU runs once, rehearsed without one: building kernels, packages that are carried, the check.

`make gpu-kernels` says what is missing instead of failing somewhere in a build.
"""

import os
import subprocess
import sys
import zipfile

import pytest
import torch

from tests.gpu.children import ROOT, environment
from tests.gpu.test_mailbox_cuda import Child

SCRIPTS = ROOT / "scripts"
SCRIPT = SCRIPTS / "gpu_kernels.sh"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build, so nothing is refused")
def test_gpu_kernels_refuses_a_cpu_torch():
    done = subprocess.run(["sh", str(SCRIPT), sys.executable], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"a CUDA build of torch: this one is {torch.__version__}" in done.stderr
    assert "make gpu-kernels" in done.stderr


def wheel(folder, name, version, tag, files):
    """A wheel of a few files, as pip takes it."""
    info = f"{name}-{version}.dist-info"
    files |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {tag}\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No index answers; what pip installs goes to a folder of its own. -> the folders of carried wheels and of packages."""
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    settings = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_RETRIES": "0",
        "PIP_TARGET": site,
        "PIP_FIND_LINKS": wheels,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    return wheels, site


def test_a_carried_wheel_with_operators_needs_no_network_and_no_compiler(offline):
    wheels, site = offline
    tag = f"cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-linux_x86_64"
    wheel(wheels, "megablocks", "0.10.0", tag, {"megablocks_ops.py": "", "megablocks/__init__.py": ""})
    wheel(wheels, "megablocks", "0.10.0", "py3-none-any", {"megablocks/__init__.py": "without operators"})
    done = subprocess.run(
        ["sh", str(SCRIPT), sys.executable], capture_output=True, text=True, env=environment(PYTHONPATH=str(site))
    )
    assert done.returncode == 0, done.stderr
    assert "came as a wheel" in done.stdout
    assert (site / "megablocks_ops.py").is_file()


def test_without_a_carried_wheel_nothing_is_fetched(offline):
    command = ["sh", str(SCRIPTS / "install_megablocks.sh"), sys.executable, "--carried"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (1, "")


def test_the_children_of_tests_find_packages_that_are_carried_in_a_folder(tmp_path, monkeypatch):
    """Python imports `sitecustomize` from its path when it starts: the child shows that this folder is still on it."""
    shown = tmp_path / "shown"
    (tmp_path / "sitecustomize.py").write_text(f"open({str(shown)!r}, 'a').write('here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = Child("cpu")
    child.end()
    assert shown.read_text() == "here"
    assert environment()["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(tmp_path)]
