"""A node with replicas is lost and comes back: they are parted again, under load, and nobody is asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("spread_driver.py")


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_replicas_are_on_two_nodes_again():
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, DRIVER], env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{found['num_calls']} calls, longest {found['longest_s']} s, changes {found['changes']}")
    assert found["nodes"] == [1, 0, 1]
    assert not found["errors"]
    assert found["num_calls"] > 0
    assert found["changes"][0] == "spread"
