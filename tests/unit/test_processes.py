"""Processes below one are found, and ended where they do not end by themselves; nobody else's."""

import os
import subprocess
import sys

import pytest

from tests.unit.fuzzed_port import eventually
from trinity.utils.processes import below, command_of, end_those_left

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
CHILD = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def tree():
    """-> a child, and the pid of its own, which lets nobody end it but by force."""
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    said = sorted(int(child.stdout.readline()) for _ in range(2))
    yield child, said[1]
    child.kill()
    child.wait()
    child.stdout.close()


def test_what_stays_behind_is_ended(tree):
    child, grandchild = tree
    found = below(child.pid)
    assert set(found) == {grandchild}
    assert {child.pid, grandchild} <= set(below(os.getpid()))
    assert command_of(grandchild) == sys.executable
    child.kill()
    child.wait()
    assert end_those_left(found, after_s=0.1) == [grandchild]
    assert eventually(lambda: end_those_left(found, after_s=0) == [])


def test_those_that_go_by_themselves_are_waited_for(tree):
    child, grandchild = tree
    both = below(os.getpid())
    mine = {pid: both[pid] for pid in (child.pid,)}
    child.kill()
    assert end_those_left(mine, after_s=60) == []
    assert command_of(grandchild) == sys.executable, "nobody else's"
    assert end_those_left({grandchild: both[grandchild]}, after_s=0) == [grandchild]


def test_another_process_of_the_same_number_is_let_be(tree):
    child, _ = tree
    assert end_those_left({child.pid: "another time"}, after_s=0) == []
    assert child.poll() is None
