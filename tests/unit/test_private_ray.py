"""A command whose private Ray ends under it."""

import os
import signal
import subprocess
import sys
from threading import Event

from actors.cluster import leave_with
from tests.waiting import WAIT_S

LEAVING = """
import subprocess, sys
from threading import Event, Thread
from actors import cluster
from trinity.utils.processes import below
import os
child = subprocess.Popen(["sleep", "600"])
cluster.WATCH_S = 0.05
Thread(target=cluster.leave_with, args=(below(os.getpid()), Event())).start()
print(child.pid, flush=True)
Event().wait()
"""


def test_it_leaves_at_once_and_says_why():
    """Ray would look for its head for a minute."""
    command = subprocess.Popen(
        [sys.executable, "-c", LEAVING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.kill(int(command.stdout.readline()), signal.SIGTERM)
    _, said = command.communicate(timeout=WAIT_S)
    assert command.returncode == 1
    assert "the private Ray of this command has ended" in said


def test_it_does_not_once_it_leaves_by_itself():
    is_over = Event()
    is_over.set()
    leave_with({os.getpid(): "another time"}, is_over)
