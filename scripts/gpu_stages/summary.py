"""What the other stages left, as a short table: the last thing a log shows."""

import json
from collections.abc import Iterator
from typing import Any


def measure(run: Any) -> Iterator[dict[str, Any]]:
    lines = [json.loads(line) for line in run.results.read_text().splitlines()]
    ended = [line for line in lines if "rc" in line]
    for line in ended:
        state = {0: "passed", 124: "out of time", 137: "out of time"}.get(line["rc"], f"FAILED ({line['rc']})")
        print(f"{line['stage']:<13} {state:<14} {line['seconds']:>6.1f} s of {line['limit_s']}")
    failed = [line["stage"] for line in ended if line["rc"]]
    yield {"num_stages": len(ended), "failed": failed, "seconds": sum(line["seconds"] for line in ended)}
