"""Constraints are tried in processes of their own before an engine compiles them.

Decision: what a schema or a pattern costs is only known once it was spent. So a process that has so much time and memory, and
nothing else to lose, compiles each and walks some way into its answers; what it ends over is refused.
"""

import json
import os
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

from trinity.errors import InvalidRequest
from trinity.text.grammar.constraint import Constraint
from trinity.text.grammar.vocabulary import Vocabulary
from trinity.utils.boxes import Boxes

NUM_WORKERS, CPU_S = 2, 1.0
ROOT = Path(__file__).parents[3]
UNKNOWN = b"?"  # the reply of a process that has not seen this vocabulary


def admit(constraint: Constraint, vocabulary: Vocabulary) -> str:
    """The grammar of a constraint that can be afforded, for `compiler.matcher`. Blocks; safe from any thread. Raises
    ValueError, with the reason, for any other."""
    asked = json.dumps({"constraint": asdict(constraint), "vocabulary": vocabulary.digest}).encode() + b"\n"
    reply = _workers().ask(asked)
    if reply == UNKNOWN:
        reply = _workers().ask(asked + vocabulary.packed)
    if reply is None:
        raise ValueError(f"it takes longer than {CPU_S:g} s to compile; ask for less structure")
    said = json.loads(reply)
    if "grammar" in said:
        return str(said["grammar"])
    raise ValueError(said["error"])


def refusal(why: str) -> InvalidRequest:
    """The answer to whoever asked for it."""
    return InvalidRequest(f"structured_outputs: {why}", param="structured_outputs")


@cache
def _workers() -> Boxes:
    command = [sys.executable, "-P", "-m", "trinity.text.grammar.admission_worker", str(CPU_S)]
    return Boxes(NUM_WORKERS, command, {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"})


os.register_at_fork(after_in_child=_workers.cache_clear)  # two processes would read from one pipe
