"""An expert backend for the name in the configuration, and why it was chosen.

`auto` is megablocks on CUDA where its compiled operators are importable, torch everywhere else.
"""

import importlib
import importlib.util
import logging
from importlib.metadata import PackageNotFoundError, version

import torch

from trinity.errors import ConfigError
from trinity.experts.base import ExpertBackend
from trinity.experts.reference import ReferenceBackend
from trinity.experts.torch_backend import TorchBackend

log = logging.getLogger(__name__)
NAMES = ("auto", "reference", "torch", "megablocks")
PACKAGES = ("torch", "triton", "megablocks", "stanford-stk", "grouped_gemm")


def resolve(name: str, device: torch.device | str) -> ExpertBackend:
    """The backend called `name` for tensors on `device`; logs one line that says which and why.

    Raises ConfigError for an unknown name, and for megablocks where it cannot run.
    """
    if name not in NAMES:
        raise ConfigError(f"unknown expert backend {name!r}; there are {', '.join(NAMES)}")
    chosen, reason = _choose(name, torch.device(device))
    log.info("expert backend %s on %s (%s): %s", chosen, device, _versions(), reason)
    return _build(chosen)


def _choose(name: str, device: torch.device) -> tuple[str, str]:
    """-> the backend's own name, and why it."""
    if name in ("reference", "torch"):
        return name, "asked for"
    obstacle = _obstacle(device, name)
    if name == "auto":
        return ("torch", f"not megablocks: {obstacle}") if obstacle else ("megablocks", "CUDA and MegaBlocks are there")
    if obstacle:
        raise ConfigError(f"expert backend megablocks cannot run on {device}: {obstacle}")
    return name, "asked for"


def _build(name: str) -> ExpertBackend:
    if name == "megablocks":
        from trinity.experts.megablocks_backend import MegaBlocksBackend

        return MegaBlocksBackend()
    return ReferenceBackend() if name == "reference" else TorchBackend()


def _obstacle(device: torch.device, name: str) -> str | None:
    """The obstacle that keeps MegaBlocks from running on `device`, with the remedy; None if nothing does."""
    if device.type == "cpu" and name == "megablocks" and _interpreted():
        return None
    if device.type != "cuda" or not torch.cuda.is_available():
        return "it needs a CUDA device and there `make gpu-kernels`; use backend torch or auto here"
    try:
        importlib.import_module("trinity.experts.megablocks_backend")
    except ImportError as error:  # not installed, without its compiled operators, or built for another torch
        return f"{error}; run `make gpu-kernels`"
    return None


def _interpreted() -> bool:
    """Say whether Triton's interpreter is on, without which MegaBlocks needs a GPU; tests switch it on."""
    if not all(importlib.util.find_spec(package) for package in ("triton", "megablocks")):
        return False
    from trinity.experts import megablocks_cpu

    if megablocks_cpu.can_interpret():
        megablocks_cpu.install()
    return megablocks_cpu.can_interpret()


def _versions() -> str:
    return ", ".join(filter(None, map(_version, PACKAGES)))


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""
