"""One stage of scripts/gpu_check.sh: `python3 scripts/gpu_stages STAGE --device cuda --results FILE [ARGUMENT ...]`.

A stage is a module beside this one with `measure(run)`, which yields what it finds as dicts of plain values; each becomes a
line of FILE at once, so that a stage that is stopped leaves what it had. It raises what is wrong.
"""

import argparse
import importlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # this repository, installed or not
STAGES = ("machine", "ceilings", "suite", "shard", "trainer", "engine", "syncs", "bench", "hop", "summary")


@dataclass(frozen=True)
class Run:
    """What a stage is told. `is_small`: a rehearsal on a CPU, with sizes that take seconds there."""

    device: str
    results: Path
    arguments: tuple[str, ...]

    @property
    def is_small(self) -> bool:
        return self.device == "cpu"


def written(value: Any) -> Any:
    """Floats to four digits; what JSON has no word for as text."""
    if isinstance(value, dict):
        return {str(key): written(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [written(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, int | str | None) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--name", help="what the results call the stage")
    parser.add_argument("arguments", nargs="*")
    given = parser.parse_intermixed_args()
    run = Run(given.device, given.results, tuple(given.arguments))
    for found in importlib.import_module(given.stage).measure(run):
        line = json.dumps({"stage": given.name or given.stage, **written(found)})
        print(line, flush=True)
        with run.results.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
