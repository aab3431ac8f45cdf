"""The Triton kernels of the MegaBlocks paths compile to Hopper machine code, also where there is no GPU to run them."""

import subprocess
import sys
from pathlib import Path

import pytest
import triton

from tests.gpu.children import environment

HERE = Path(__file__).parent
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


@pytest.mark.skipif(not PTXAS.exists(), reason=f"this triton ships no assembler ({PTXAS.name})")
def test_every_kernel_compiles_for_hopper(tmp_path):
    env = environment(TRITON_CACHE_DIR=str(tmp_path))
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HERE / "compile_kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    sizes = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in sizes} == {"gather", "scatter", "sdd", "dsd", "row_indices", "ring", "wait"}
    assert all(int(size) > 1000 for _, size in sizes)
