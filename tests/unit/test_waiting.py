"""The suite's own clock: a hang fails, and what others take of the machine does not count."""

import os
import subprocess
import sys
import time

import pytest

from tests import waiting

LOOP = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
HANGS = """
import threading
from tests import hang
from tests.hang import pytest_timeout_set_timer

hang.LOOK_AGAIN_S = 0.2

def test_hangs():
    threading.Event().wait()
"""


def test_a_hang_fails(tmp_path):
    (tmp_path / "conftest.py").write_text(HANGS)
    (tmp_path / "test_it.py").write_text("from conftest import test_hangs")
    python = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    ended = subprocess.run([*python, "--timeout=1", str(tmp_path)], env=env, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "Timeout" in ended.stdout


@pytest.mark.parametrize(("others", "passed_s", "has"), [(0, 9, False), (0, 11, True), (0.5, 11, False), (1, 41, True)])
def test_time_that_others_take_does_not_count(monkeypatch, others, passed_s, has):
    monkeypatch.setattr(waiting, "others_share", lambda: others)
    assert waiting.have_passed(10, time.monotonic() - passed_s) is has


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="needs /proc")
def test_ours_is_what_this_run_started():
    started = []
    try:
        for env in (os.environ, {key: value for key, value in os.environ.items() if key != "PYTEST_VERSION"}):
            started.append(subprocess.Popen(LOOP, env=env, stdout=subprocess.PIPE))
            started[-1].stdout.readline()
        ours, others = (str(process.pid) for process in started)
        found = waiting.our_ticks()
        assert str(os.getpid()) in found
        assert ours in found
        assert others not in found
    finally:
        for process in started:
            process.kill()
            process.communicate()
