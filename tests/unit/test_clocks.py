"""Clocks of hosts differ, and jump. What waits, waits by a clock that does neither; time of day is for stamps."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAMPS = {  # what shows a time of day, or keeps one for the next process
    "actors/control/migration.py", "actors/control/reconciler.py", "actors/dataplane/handshake.py", "actors/round_trips.py",
    "serving/frontend.py", "serving/vllm_names.py", "trinity/data/kept.py", "trinity/observability/tracking/trackers.py",
}  # fmt: skip


def asks_the_time_of_day(path):
    tree = ast.parse(path.read_text())
    named = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "time"]
    assert not [alias for node in named for alias in node.names if alias.name == "time"], path
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("time", "now", "utcnow")
    ]
    return any(isinstance(node.value, ast.Name) and node.value.id in ("time", "datetime") for node in calls)


def test_nothing_waits_by_the_time_of_day():
    sources = [path for top in ("trinity", "actors", "serving") for path in (ROOT / top).rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in sources if asks_the_time_of_day(path)} == STAMPS
