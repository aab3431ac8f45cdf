"""The extension in C++: found, switched off, refused, and left out where it cannot be built."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trinity import native
from trinity.errors import ConfigError

ROOT = Path(__file__).parents[2]
built = pytest.mark.skipif(native.lib is None, reason="the extension is not built, or switched off")


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "ring").mkdir()
    (tmp_path / "ring" / "a.cpp").write_text("int a;\n")
    (tmp_path / "CMakeLists.txt").write_text("project(x)\n")
    return tmp_path


def made_of(sources, contract=native.CONTRACT):
    return SimpleNamespace(__file__="_native.abi3.so", contract=contract, sources=native.digest_of(sources))


@built
def test_cmake_and_python_count_the_same_sources():
    assert native.lib.sources == native.digest_of(native.SOURCES)
    assert native.lib.isa in ("generic", "avx2", "avx512", "avx512_bf16")
    assert native.described()["instructions"] == native.lib.isa


def test_one_of_these_sources_is_taken(sources):
    module = made_of(sources)
    assert native.checked(module, sources) is module
    assert native.checked(module, sources / "of no checkout") is module


def test_one_of_other_sources_is_refused_by_name(sources):
    module = made_of(sources)
    (sources / "ring" / "a.cpp").write_text("int b;\n")
    with pytest.raises(ConfigError, match=r"_native.abi3.so was built from other sources .*scripts/build_native.sh"):
        native.checked(module, sources)


@pytest.mark.parametrize("contract", [native.CONTRACT + 1, None])
def test_one_for_other_callers_is_refused_by_name(sources, contract):
    with pytest.raises(ConfigError, match=rf"for callers of contract {contract}, this is {native.CONTRACT}"):
        native.checked(made_of(sources, contract), sources)


def test_it_can_be_switched_off():
    code = "from trinity import native; print(native.lib, native.described()['extension'])"
    env = {**os.environ, "TRINITY_NATIVE": "0"}
    said = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, check=True, capture_output=True, text=True)
    assert said.stdout == "None switched off by TRINITY_NATIVE=0\n"


def test_without_a_compiler_the_build_says_so_and_goes_on(tmp_path):
    env = {**os.environ, "CXX": "no-such-compiler", "PYTHON": sys.executable}
    script = [ROOT / "scripts" / "build_native.sh", tmp_path]
    said = subprocess.run(script, env=env, check=True, capture_output=True, text=True)
    assert len(said.stderr.splitlines()) == 1
    assert "no-such-compiler" in said.stderr
    assert not list(tmp_path.iterdir())
