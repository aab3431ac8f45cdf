"""The tests' own switch: hosts come and go while frames are on their way."""

import os
import threading

from tests.chaos import switch as switches
from tests.chaos.switch import Switch
from tests.waiting import until

BROADCAST = b"\xff" * 6 + b"sender" + b"hello"


class Pipes(Switch):
    """Pipes for devices: what is written into one is read at the switch's port of that name."""

    def plug(self, name):
        port, writer = os.pipe()
        os.set_blocking(port, False)
        self._ports[port] = name
        self._poll.register(port)
        os.write(self._waker, b"x")
        return writer


def test_a_host_vanishes_while_its_frame_is_passed_on(monkeypatch):
    """The switch died of a KeyError, and with it the network of all hosts."""
    switch, passed, vanishing = Pipes(), [], []
    switch._write = lambda target, frame: passed.append(frame)
    writers = {name: switch.plug(name) for name in ("a", "b", "c")}
    read = os.read

    def vanish(port, size):
        frame = read(port, size)
        if frame == BROADCAST and not vanishing:
            thread = threading.Thread(target=switch.unplug, args=("a",))
            thread.start()  # one that has yet to begin is not alive, and would pass for one that has ended
            vanishing.append(thread)
            thread.join(0.3)  # it is quick where nothing keeps it
        return frame

    monkeypatch.setattr(switches.os, "read", vanish)
    os.write(writers["a"], BROADCAST)
    until(lambda: vanishing and not vanishing[0].is_alive())
    os.write(writers["b"], BROADCAST)
    until(lambda: len(passed) == 3)  # to b and c, then to c
    switch.close()
    for writer in writers.values():
        os.close(writer)
