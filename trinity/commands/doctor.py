"""`trinity doctor`: what to paste in a bug report. Finds problems before they are met at 3 a.m."""

import argparse
import math
import platform
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from trinity.commands.placement import cluster_of
from trinity.config import preset
from trinity.errors import TrinityError
from trinity.utils.machine import available_bytes, meminfo, versions

if TYPE_CHECKING:
    from actors.round_trips import Measured

PACKAGES = ["trinity-moe", "ray", "torch", "triton", "megablocks", "stanford-stk", "safetensors", "tokenizers"]
PACKAGES += ["transformers", "grpcio", "protobuf", "pydantic", "numpy", "starlette", "uvicorn"]
PORTS = {"HTTP": 8000, "gRPC": 9000, "Ray": 6379, "Ray dashboard": 8265}


LAYERS_OF = ("nano", "mini", "large")
SLOWEST = 4  # others of a node that are shown


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    sections = {"system": _system(), "packages": versions(PACKAGES), "devices": _devices(), "native": _native()}
    sections["ports"] = _ports()
    if arguments.address:
        sections |= _nodes(arguments)
    for title, lines in sections.items():
        print(title)
        for key, value in lines.items():
            print(f"  {key:<18} {value}")
    return 0


def _system() -> dict[str, str]:
    from trinity.config import num_cpus

    free, total = available_bytes(), meminfo().get("MemTotal", 0)
    shared = Path("/dev", "shm")  # Ray's object store lives there
    shm = shutil.disk_usage(shared) if shared.is_dir() else None
    disk = shutil.disk_usage(".")
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cpus": str(num_cpus()),
        "memory": f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB available",
        "/dev/shm": f"{shm.free / 2**30:.1f} of {shm.total / 2**30:.1f} GiB free"
        if shm
        else "missing: Ray will be slow",
        "disk here": f"{disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB free",
    }


def _devices() -> dict[str, str]:
    import torch

    from trinity.errors import ConfigError

    gpus = {}
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        gpus[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    device = torch.device("cuda" if gpus else "cpu")
    for name in ("auto", "megablocks"):
        try:
            from trinity.experts.registry import resolve  # an extension of other sources is refused here

            gpus[f"backend {name}"] = f"{resolve(name, device).name} on {device}"
        except ConfigError as error:
            gpus[f"backend {name}"] = error.message
    return gpus


def _native() -> dict[str, str]:
    try:
        from trinity.native import described
    except TrinityError as error:
        return {"extension": error.message}
    return described()


def _ports() -> dict[str, str]:
    return {f"{name} {port}": "free" if _is_free(port) else "in use" for name, port in PORTS.items()}


def _nodes(arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Kernels of each node of the cluster, round trips between them, and what the slowest costs a token."""
    with cluster_of(arguments):
        from actors.round_trips import measured

        found = measured()
    known = {name: each for name, each in found.items() if not isinstance(each, TrinityError)}
    away = {name: each.message for name, each in found.items() if isinstance(each, TrinityError)}
    slowest_s = max((to_s for each in known.values() for to_s in each.to_s.values() if to_s is not None), default=0.0)
    trips = {name: _shown(each) for name, each in known.items()} | away
    computes = {name: each.computes for name, each in known.items()}
    return {
        "nodes compute with": computes,
        "round trips, slowest first": {**trips, "a token then pays": _paid(slowest_s)},
    }


def _shown(found: "Measured") -> str:
    """The others, slowest first; those that cannot be reached before them."""
    from actors.dataplane.handshake import MOST_SKEW_S

    slow = sorted(found.to_s.items(), key=lambda pair: -math.inf if pair[1] is None else -pair[1])
    others = [f"{other} {'cannot be reached' if to_s is None else f'{1000 * to_s:.2f} ms'}" for other, to_s in slow]
    clock = [f"clock {found.ahead_s:+.1f} s"] if abs(found.ahead_s) > MOST_SKEW_S else []
    return ", ".join([*clock, *others[:SLOWEST]]) or "alone"


def _paid(round_trip_s: float) -> str:
    """Cost for each token of engine and shards so far apart: its layers wait one after the other."""
    layers = {name: len(preset(name).moe_layers) for name in LAYERS_OF}
    each = ", ".join(f"{1000 * round_trip_s * num:.1f} ms in {name}" for name, num in layers.items())
    return f"{each} where engine and shards are that far apart (docs/operations.md)"


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
