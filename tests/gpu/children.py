"""The environment of the processes that tests start: theirs, with this repository before whatever else is on PYTHONPATH."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**changes: str) -> dict[str, str]:
    """Packages that were carried in a folder on PYTHONPATH stay importable."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **changes}
