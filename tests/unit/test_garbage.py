"""What is imported inside the block stays, and the collector does not look at it; whatever comes later it collects."""

import subprocess
import sys

SCRIPT = """
import gc, weakref
from trinity.utils.garbage import uncollected

class Node:
    def __init__(self):
        self.own = self

def is_collected(watched):
    gc.collect()
    return watched() is None

with uncollected():
    assert not gc.isenabled()
    before = weakref.ref(Node())
assert gc.isenabled()
assert gc.get_freeze_count() > 1000
assert is_collected(weakref.ref(Node()))
assert not is_collected(before)
try:
    with uncollected():
        import no_such_module
except ImportError:
    print(gc.isenabled())
"""


def test_what_is_there_at_the_end_stays_and_all_else_is_collected():
    """In a process of its own: this one's objects stay as they are."""
    assert subprocess.check_output([sys.executable, "-c", SCRIPT], text=True).strip() == "True"
