"""Workers come and go with their nodes: no step is lost, none taken twice, and the data stay in order."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_worker_joins_with_a_node_and_leaves_with_it(tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("elastic_driver.py")), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=550)
    print("\n" + done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
