"""`trinity doctor`: what to paste in a bug report. Finds problems before they are met at 3 a.m."""

import argparse
import platform
import shutil
import socket
from pathlib import Path

from trinity.utils.machine import meminfo, versions

PACKAGES = ["trinity-moe", "ray", "torch", "triton", "megablocks", "stanford-stk", "safetensors", "tokenizers"]
PACKAGES += ["transformers", "grpcio", "protobuf", "pydantic", "numpy", "fastapi", "uvicorn"]
PORTS = {"HTTP": 8000, "gRPC": 9000, "Ray": 6379, "Ray dashboard": 8265}


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    sections = {"system": _system(), "packages": versions(PACKAGES), "devices": _devices(), "ports": _ports()}
    for title, lines in sections.items():
        print(title)
        for key, value in lines.items():
            print(f"  {key:<18} {value}")
    return 0


def _system() -> dict[str, str]:
    from trinity.config import num_cpus

    memory = {k: v for k, v in meminfo().items() if k in ("MemTotal", "MemAvailable")}
    shared = Path("/dev", "shm")  # Ray's object store lives there
    shm = shutil.disk_usage(shared) if shared.is_dir() else None
    disk = shutil.disk_usage(".")
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cpus": str(num_cpus()),
        "memory": f"{memory.get('MemAvailable', 0) / 2**30:.1f} of {memory.get('MemTotal', 0) / 2**30:.1f} GiB available",
        "/dev/shm": f"{shm.free / 2**30:.1f} of {shm.total / 2**30:.1f} GiB free"
        if shm
        else "missing: Ray will be slow",
        "disk here": f"{disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB free",
    }


def _devices() -> dict[str, str]:
    import torch

    from trinity.errors import ConfigError
    from trinity.experts.registry import resolve

    gpus = {}
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        gpus[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    device = torch.device("cuda" if gpus else "cpu")
    for name in ("auto", "megablocks"):
        try:
            gpus[f"backend {name}"] = f"{resolve(name, device).name} on {device}"
        except ConfigError as error:
            gpus[f"backend {name}"] = error.message
    return gpus


def _ports() -> dict[str, str]:
    return {f"{name} {port}": "free" if _is_free(port) else "in use" for name, port in PORTS.items()}


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
