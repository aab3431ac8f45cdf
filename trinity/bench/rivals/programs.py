"""Arms of a comparison with other people's engines: whose process runs which checkpoint, and in which environment.

Decisions: a turn is a process of its own, so that nobody's memory, threads or allocator meet another's; loading and a first
round of everything are not timed. A rival starts as its documentation wants: vLLM with Intel's OpenMP preloaded, none with what
our command line sets for OpenMP (GOMP_SPINCOUNT).
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trinity.bench.process import Child
from trinity.errors import ConfigError, Unavailable
from trinity.utils.terminal import say

OURS, LLAMA, VLLM = "ours", "llama.cpp", "vLLM"
VLLM_SETTINGS = (
    "VLLM_ENABLE_V1_MULTIPROCESSING=0",  # so that its engine is in this process
    "VLLM_CPU_OMP_THREADS_BIND=nobind",  # else it leaves a core free
    "VLLM_NO_USAGE_STATS=1",
    "HF_HUB_OFFLINE=1",
)
ENV = "/usr/bin/env"
ROOT = Path(__file__).parents[3]
NO_OPPONENT = "no fair opponent: eager"


@dataclass(frozen=True)
class Arm:
    """`kind` of numbers in `path`, a checkpoint's folder or a GGUF file."""

    program: str
    kind: str
    path: Path
    eager: bool = False

    @property
    def name(self) -> str:
        return f"{self.program}, {self.kind}"


class Place:
    """Setting of all arms: our Python and the rivals', a folder for what they print, threads, and room for requests."""

    def __init__(self, given: argparse.Namespace, size: Mapping[str, int]):
        self.venv, self.out = Path(given.rivals).resolve(), Path(given.out).resolve()
        self.threads, self.size, self.block_size = given.threads, dict(size), given.block_size
        if not self.python.is_file():
            raise ConfigError(
                f"{self.venv} is no environment with other people's engines: make interop-rivals, or --rivals FOLDER"
            )
        say(f"what they print goes to {given.out}/rivals-*.log")

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    def command(self, arm: Arm) -> list[str]:
        found = [ENV, f"PYTHONPATH={ROOT}"]
        if arm.program != OURS:
            found[1:1] = ["-u", "GOMP_SPINCOUNT"]
        if arm.program == VLLM:
            found += [
                f"OMP_NUM_THREADS={self.threads}",
                f"LD_PRELOAD={self.venv / 'lib' / 'libiomp5.so'}",
                *VLLM_SETTINGS,
            ]
        return [*found, sys.executable if arm.program == OURS else str(self.python), "-m", "trinity.bench.rivals.child"]

    def orders(self, arm: Arm) -> dict[str, Any]:
        found = {"program": arm.program, "path": str(arm.path), "threads": self.threads, "size": self.size}
        more: dict[str, dict[str, Any]] = {
            OURS: {"expert_dtype": arm.kind, "weight_dtype": arm.kind} if arm.kind == "int8" else {},
            VLLM: {"dtype": arm.kind, "eager": arm.eager, "block_size": self.block_size},
            LLAMA: {"libraries": str(self.venv)},
        }
        return {**found, **more.get(arm.program, {})}


class Program(Child):
    """A process that loads its engine; `mode` is how it says that it runs."""

    mode = ""

    def __init__(self, place: Place, arm: Arm):
        self.log = place.out / f"rivals-{arm.name.replace(', ', '-')}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                place.command(arm), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.tell(**place.orders(arm))

    def ask(self, **order: Any) -> dict[str, Any]:
        self.tell(**order)
        return self.hear()


def loaded(place: Place, arm: Arm) -> Program:
    """The arm's process, ready. Where vLLM cannot compile the model it runs without. Raises Unavailable."""
    program = Program(place, arm)
    try:
        program.mode = program.hear()["mode"]
    except Unavailable:
        program.close()
        if arm.program != VLLM or arm.eager:
            raise Unavailable(f"{arm.name} did not start; what it said is in {program.log}") from None
        return loaded(place, replace(arm, eager=True))
    return program


@contextmanager
def running(place: Place, arm: Arm) -> Iterator[Program]:
    """The arm's process, ended with the block."""
    program = loaded(place, arm)
    try:
        yield program
    finally:
        program.close()


def gguf(place: Place, checkpoint: Path, kind: str) -> Path:
    """The checkpoint as a file for llama.cpp, written unless it is there."""
    target = place.out / f"{checkpoint.name}-{kind}.gguf"
    if not target.is_file():
        say(f"writing {target.name}")
        what = ["-m", "trinity.bench.rivals.gguf_file", str(checkpoint), str(target), kind]
        subprocess.run([ENV, f"PYTHONPATH={ROOT}", str(place.python), *what], check=True)
    return target


def in_turns(arms: Sequence[Arm], rounds: int) -> Iterator[Arm]:
    """Each arm once a round; who begins changes."""
    for number in range(rounds):
        yield from arms if number % 2 == 0 else reversed(arms)
