"""The extension in C++ (native/), and the only place that imports it: `lib` is the module, or None where there is none.

Decisions: nothing needs it, everything has a path without it. `TRINITY_NATIVE=0` switches it off. What was built from other
sources, or for other callers, is refused by name before it computes a row; an extension that is absent is no error, and
`trinity doctor` says so.
"""

import hashlib
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from trinity.config import native_is_wanted
from trinity.errors import ConfigError

BITS = 1  # counted up when sums or roundings of any kernel change: who has another number gives other answers
FORMATS = ("float32", "bfloat16", "int8", "fp8", "nvfp4")  # of experts, in the order of native/kernels/kernels.h
CONTRACT = 2  # native/module.cpp
SOURCES = Path(__file__).parents[1] / "native"  # of a checkout; an installed package has none
REMEDY = "scripts/build_native.sh builds it anew, TRINITY_NATIVE=0 goes on without it"


def digest_of(folder: Path) -> str:
    """Digest of all sources below `folder`, as native/CMakeLists.txt counts it."""
    files = [
        path for path in folder.rglob("*") if path.suffix in (".cpp", ".h", ".inl") or path.name == "CMakeLists.txt"
    ]
    lines = [
        f"{path.relative_to(folder).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:16]


def checked(module: ModuleType, sources: Path) -> ModuleType:
    """Return the extension if it is the one that these files of Python call. Raises ConfigError."""
    if (contract := getattr(module, "contract", None)) != CONTRACT:
        raise ConfigError(f"{module.__file__} is for callers of contract {contract}, this is {CONTRACT}: {REMEDY}")
    wanted = digest_of(sources) if sources.is_dir() else module.sources
    if module.sources != wanted:
        raise ConfigError(f"{module.__file__} was built from other sources ({module.sources}; here {wanted}): {REMEDY}")
    return module


def _loaded() -> Any:
    if not native_is_wanted():
        return None
    try:
        module = importlib.import_module("trinity._native")
    except ModuleNotFoundError:
        return None
    return checked(module, SOURCES)


def computes() -> str:
    """Return what this process computes experts with, in words for a peer: the kernels' instructions, or python, and their
    formats."""
    if not hasattr(lib, "ring_kernel"):
        return f"python: {' '.join(FORMATS)}"
    known = [name for number, name in enumerate(FORMATS) if lib.ring_kernel(number)]
    return f"{lib.isa}: {' '.join(known)}"


def described() -> dict[str, str]:
    """Return what there is, in words, for `trinity doctor`."""
    how = {"computes": f"{computes()}; bits {BITS}"}
    if lib is None:
        return {"extension": "not built" if native_is_wanted() else "switched off by TRINITY_NATIVE=0", **how}
    has_ring = hasattr(lib, "ring_open")
    return {
        "extension": f"contract {lib.contract}, sources {lib.sources}",
        "instructions": lib.isa,
        **how,
        "ring": "between callers and shards of this host" if has_ring else "none: this system has no futex",
        "frames": "between hosts without Python" if has_ring else "by Python",
    }


lib: Any = _loaded()
