"""`make gpu-kernels` says what is missing instead of failing somewhere in a build."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_kernels.sh"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build, so nothing is refused")
def test_gpu_kernels_refuses_a_cpu_torch():
    done = subprocess.run(["sh", str(SCRIPT), sys.executable], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"a CUDA build of torch: this one is {torch.__version__}" in done.stderr
    assert "make gpu-kernels" in done.stderr
