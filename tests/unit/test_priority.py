"""Threads that give way, and what they start."""

import os
import sys
import threading

import pytest
import torch

from trinity.ops.batch_invariant.threads import in_threads
from trinity.utils.niceness import IDLE, LowPriorityExecutor, give_way, of_this_thread

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere niceness belongs to processes")


def on_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def after(niceness, look=of_this_thread):
    def work():
        give_way(niceness)
        return look()

    return on_a_thread(work)


def test_a_thread_gives_way_alone():
    before = of_this_thread()
    assert after(0) == before
    assert after(7) == (os.SCHED_OTHER, 7)
    assert after(IDLE) == (os.SCHED_IDLE, 19)
    assert of_this_thread() == before


def test_threads_that_it_starts_are_like_it():
    assert after(IDLE, lambda: on_a_thread(of_this_thread)) == (os.SCHED_IDLE, 19)


def test_where_no_thread_may_be_idle_it_is_as_nice_as_can_be(monkeypatch):
    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert after(IDLE) == (os.SCHED_OTHER, 19)


def test_patient_work_is_done_on_threads_that_give_way():
    begun = []
    patient = LowPriorityExecutor(IDLE, lambda: begun.append(threading.get_ident()))
    found = patient.run(lambda a, b: (a + b, threading.get_ident(), of_this_thread()), 1, 2)
    assert found == (3, begun[0], (os.SCHED_IDLE, 19))
    assert begun[0] != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        patient.run(lambda: 1 // 0)


def test_without_niceness_the_caller_works_itself():
    assert LowPriorityExecutor().run(threading.get_ident) == threading.get_ident()


def test_helpers_of_a_thread_are_as_patient_as_it_is():
    """Pools of helpers are kept: inference must not get one that an idle thread has started."""

    def used():
        torch.set_num_threads(2)
        found, both = set(), threading.Barrier(2)

        def run(first, last):
            found.add(of_this_thread())
            both.wait(10)

        in_threads(2, 1 << 30, run)
        return found

    assert after(IDLE, used) == {(os.SCHED_IDLE, 19)}
    assert on_a_thread(used) == {of_this_thread()}
