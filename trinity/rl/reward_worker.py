"""The process in which rewards and environments run, one call after the other over its pipes: what functions.py starts.

Decisions: a function is the user's own program, so nothing is forbidden to it; but it may fail, print, hang or end its
process without hurting the run that asks. Its time is its caller's to bound (trinity/utils/boxes.py).
Frames are JSON: {"function": ..., "answer": ..., "row": ...} there, {"reward": ...} or {"error": ...} back; {"function": ...,
"messages": ..., "row": ...} there, {"next": [...], "reward": ...} back; {"functions": ...} are only looked up.
"""

import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from trinity.utils.boxes import LENGTH

ROLES = ("user", "tool", "system")  # who speaks beside the model
Function = Callable[[Any, dict[str, Any]], Any]


@cache
def function(spec: str) -> Function:
    """The function that module:function, or file.py:function, names."""
    where, _, name = spec.rpartition(":")
    if not where.endswith(".py"):
        found = getattr(importlib.import_module(where), name)
    else:
        module_spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert module_spec is not None
        assert module_spec.loader is not None
        sys.path.insert(0, str(Path(where).parent))  # what lies beside it, it may import
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        found = getattr(module, name)
    if not callable(found):
        raise TypeError(f"{name} is a {type(found).__name__}, no function")
    return found


def answer(request: bytes) -> bytes:
    """The reply to what was asked for, or why there is none."""
    try:
        reply = _done(json.loads(request))
    except Exception as error:  # a foreign program can raise anything
        reply = {"error": f"{type(error).__name__}: {error}"[:1000]}
    return json.dumps(reply).encode()


def _done(asked: dict[str, Any]) -> dict[str, Any]:
    for spec in asked.get("functions", ()):
        function(spec)
    if "answer" in asked:
        return {"reward": number(function(asked["function"])(asked["answer"], asked["row"]))}
    return turn(function(asked["function"])(asked["messages"], asked["row"])) if "messages" in asked else {}


def turn(value: Any) -> dict[str, Any]:
    """Turn of an environment, from what it returned (environment.py)."""
    if isinstance(value, bool | int | float):
        return {"next": [], "reward": number(value)}
    said, reward = value if isinstance(value, tuple) and len(value) == 2 else (value, 0.0)
    return {"next": [message(each) for each in (said if isinstance(said, list) else [said])], "reward": number(reward)}


def message(value: Any) -> dict[str, Any]:
    found = {"role": "user", "content": value} if isinstance(value, str) else value
    if isinstance(found, dict) and isinstance(found.get("content"), str) and found.get("role") in ROLES:
        return found
    raise ValueError(
        f"it returned {str(value)[:100]!r}, which is no number, text or message with a role of {', '.join(ROLES)}"
    )


def number(value: Any) -> float:
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise ValueError(f"it returned {str(value)[:100]}, which is no finite number")


def main() -> None:
    source, target = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a function prints is no frame
    while len(head := source.read(LENGTH.size)) == LENGTH.size:
        reply = answer(source.read(*LENGTH.unpack(head)))
        target.write(LENGTH.pack(len(reply)) + reply)
        target.flush()
