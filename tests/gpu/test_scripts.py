"""What a machine with a GPU runs once, rehearsed without one: building kernels, packages that are carried, the check.

`make gpu-kernels` says what is missing instead of failing somewhere in a build.
"""

import json
import os
import re
import subprocess
import sys
import zipfile

import pytest
import torch

from tests.gpu.children import ROOT, environment
from tests.gpu.test_shared_buffer_cuda import Child

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


CHEAP = {  # stage -> something it must have found
    "machine": "packages",
    "ceilings": "TFLOP/s",
    "shared-buffer": "skipped" if not torch.cuda.is_available() else "passed",
    "hop": "way",
    "summary": "failed",
}


def checked(folder, stages, python=sys.executable):
    """-> what the check on the CPU left: its summary, and by stage the lines of its results."""
    env = environment(PYTHON=str(python), GPU_CHECK_DEVICE="cpu", GPU_CHECK_STAGES=" ".join(stages))
    done = subprocess.run(
        [str(SCRIPTS / "gpu_check.sh"), str(folder)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "summary.txt").read_text() == done.stdout
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return done.stdout, {name: [line for line in lines if line["stage"] == name] for name in stages}


def test_the_check_of_a_gpu_is_rehearsed_and_a_stage_that_fails_stops_no_other(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *"--name ceilings"*) exit 3 ;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    summary, found = checked(tmp_path / "out", CHEAP, python)
    ends = {name: lines[-1] for name, lines in found.items()}
    assert {name: end["rc"] for name, end in ends.items()} == {**dict.fromkeys(CHEAP, 0), "ceilings": 3}
    assert all(0 <= end["seconds"] <= end["limit_s"] for end in ends.values())
    for name, wanted in CHEAP.items():
        assert name == "ceilings" or any(wanted in line for line in found[name]), name
    assert found["summary"][0]["failed"] == ["ceilings"]
    assert re.search(r"ceilings +FAILED \(3\)", summary)
    assert re.search(r"hop +passed", summary)


def test_the_stages_of_the_check_take_nine_minutes_at_most_and_each_has_its_program():
    text = (SCRIPTS / "gpu_check.sh").read_text()
    stages = re.findall(r"^python_stage (\w+) (\d+) (\w+)", text, re.MULTILINE)
    (install,) = re.findall(r"\bstage install (\d+) ", text)
    assert int(install) + sum(int(limit) for _, limit, _ in stages) <= 9 * 60
    programs = {path.stem for path in (SCRIPTS / "gpu_stages").glob("*.py") if "def measure(run" in path.read_text()}
    assert {module for *_, module in stages} == programs
