"""`trinity bench experts` of one shape: right first, then fast; its seconds, verdicts and targets as lines."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trinity.cli import main

TABLES = ("Backends", "Correctness", "Targets")  # the others show the results once more
ROWS = ("1", "4", "16", "64", "256", "1024")


def measure(run: Any) -> Iterator[dict[str, Any]]:
    """`run.arguments`: the shape. Raises RuntimeError where the command fails."""
    (shape,) = run.arguments
    sizes = ["--quick", "--shape", "tiny"] if run.is_small else ["--shape", shape, "--experts", "32", "--rows", *ROWS]
    with tempfile.TemporaryDirectory() as folder:
        code = main(["bench", "experts", "--device", run.device, *sizes, "--out", folder])
        tree = json.loads(Path(folder, "experts.json").read_text())
    yield from tree["results"]
    yield from (table for table in tree["tables"] if table["title"].startswith(TABLES))
    if code:
        raise RuntimeError(f"bench experts ended with {code}")
