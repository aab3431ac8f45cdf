"""Who goes first where more threads could run than there are cores: on Linux, each has a niceness of its own."""

import os
import sys
import threading

_mine = threading.local()


def give_way(niceness: int) -> None:
    """This thread, and those that it starts from now on, to others by that much (0 to 19), for good: only a privileged
    process may go back. Cheap when repeated. Nothing where threads have no niceness of their own."""
    if sys.platform == "linux" and getattr(_mine, "niceness", 0) < niceness:
        _mine.niceness = niceness
        me = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, me, max(niceness, os.getpriority(os.PRIO_PROCESS, me)))
