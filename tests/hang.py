"""A hang fails after the timeout's time of a machine that is ours (tests/waiting.py), by pytest-timeout's own means."""

import signal
import threading
import time

import pytest
import pytest_timeout

from tests.waiting import have_passed

LOOK_AGAIN_S = 5.0


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item, settings):
    if threading.current_thread() is not threading.main_thread():
        return None  # the plugin has another way
    began_s = time.monotonic()

    def ring(number, frame):
        if have_passed(settings.timeout, began_s):
            pytest_timeout.timeout_sigalrm(item, settings)
        signal.setitimer(signal.ITIMER_REAL, LOOK_AGAIN_S)

    def cancel():
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    item.cancel_timeout = cancel
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout)
    return True
