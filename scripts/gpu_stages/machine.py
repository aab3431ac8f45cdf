"""What this machine is: versions of what the check stands on, and the GPU with its driver."""

import importlib
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "pydantic", "pytest", "megablocks", "stanford-stk", "safetensors", "tokenizers")
ASKED = ("name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.mem", "power.limit")


def measure(run: Any) -> Iterator[dict[str, Any]]:
    """Raises RuntimeError when the device is not there, after having said what is."""
    yield {"python": platform.python_version(), "packages": {name: _version(name) for name in PACKAGES}}
    yield {"has_ray": importlib.util.find_spec("ray") is not None, "megablocks_operators": _operators()}
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
        yield {"nvidia-smi": subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()}
    if run.device == "cuda":
        yield _gpu()


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no CUDA device; rehearse with GPU_CHECK_DEVICE=cpu")
    found = torch.cuda.get_device_properties(0)
    capability = f"{found.major}.{found.minor}"
    return {
        "gpu": found.name,
        "capability": capability,
        "processors": found.multi_processor_count,
        "bytes": found.total_memory,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _operators() -> str:
    try:
        importlib.import_module("torch")
        importlib.import_module("megablocks_ops")
    except ImportError as error:
        return str(error)
    return "loaded"
