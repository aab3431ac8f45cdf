"""The soak's meter: it finds what grows, and says nothing of what does not."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.chaos.meter import Growth, Meter
from tests.chaos.soak import OURS, wrongs

GROWS = """
import subprocess, sys, threading
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
for line in sys.stdin:
    child.stdin.write(line)
    child.stdin.flush()
    print(child.stdout.readline(), end="", flush=True)
"""
CHILD = """
import os, sys, threading
kept = []
for line in sys.stdin:
    kept.append(bytearray(os.urandom(int(line))))
    if int(line):
        kept.append(open(os.devnull))
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    print("done", flush=True)
"""


@contextmanager
def tree():
    """A process and its child; what its `stdin` is told the child keeps."""
    process = subprocess.Popen(
        [sys.executable, "-c", GROWS, CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


def metered(num_bytes):
    with tree() as process:
        meter = Meter(process.pid)
        for _ in range(12):
            process.stdin.write(f"{num_bytes}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            meter.sample()
        return meter.growth()


def test_a_child_that_grows_is_found():
    growth = metered(1 << 20)
    assert len(growth) == 2
    child = max(growth, key=lambda each: each.mib_per_hour)
    assert child.mib_per_hour > 1000
    assert child.num_threads[1] >= child.num_threads[0] + 6
    assert child.num_descriptors[1] >= child.num_descriptors[0] + 6


def test_one_that_does_not_is_not():
    for each in metered(0):
        assert each.num_threads[0] == each.num_threads[1]
        assert each.num_descriptors[0] == each.num_descriptors[1]


@pytest.mark.parametrize("name", [*OURS, "gcs_server"])
def test_what_is_wrong_is_named(name):
    calm = Growth(name, 1, 100.0, 1.9, (5, 7), (9, 9))
    assert wrongs([calm]) == []
    grown = wrongs([calm._replace(mib_per_hour=2.1)])
    assert len(grown) == (name in OURS)
    assert len(wrongs([calm._replace(num_threads=(5, 9)), calm._replace(num_descriptors=(5, 9))])) == 2
    json.dumps(calm._asdict())
