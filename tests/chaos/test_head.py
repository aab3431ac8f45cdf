"""Ray's head (GCS) dies and comes back: rows flow meanwhile, and the pool can be changed afterwards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_rows_flow_while_the_head_is_away(tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "gcs")}
    env |= storage | {"PYTHONPATH": str(ROOT), "RAY_gcs_rpc_server_reconnect_timeout_s": "120"}
    command = [sys.executable, str(Path(__file__).with_name("head_driver.py")), str(tmp_path / "placement")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    print("\n" + done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "rows flowed without a head" in done.stdout
    assert "the pool grew afterwards" in done.stdout
