"""Processes that do what other people's input may make costly, one request after the other over their pipes.

Decisions: who asks waits on a pipe, which costs its process nothing, however long the other one computes; what a request may
use of memory and time is the kernel's to bound, in the process (its own program sets the limits). One that was ended over a
request is started again for the next. A frame is a length (4 bytes, little-endian) and so many bytes, each way.
"""

import queue
import select
import struct
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

LENGTH = struct.Struct("<I")


class Box:
    """One such process; started when it is first asked. It ends by itself when this one does.

    `env`: all of its environment, None: that of this process. `greeting`: a request that a new process gets before any other,
    for as long as it takes."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None, greeting: bytes | None = None):
        self.command, self.env, self.greeting = command, env, greeting
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes, timeout_s: float | None = None) -> bytes | None:
        """-> its reply, or None where it has ended over the question, or was ended because it took longer."""
        reply = None
        try:
            with suppress(BrokenPipeError):
                if self._process is None and self.greeting is not None:
                    self._exchange(self.greeting, None)
                reply = self._exchange(request, timeout_s)
        finally:
            if reply is None and self._process is not None:  # ended, or left in the middle of a frame
                self._process.kill()
                self._process.communicate()
                self._process = None
        return reply

    def _exchange(self, request: bytes, timeout_s: float | None) -> bytes | None:
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=self.env, cwd="/"
            )
        source, target = self._process.stdout, self._process.stdin
        assert source is not None
        assert target is not None
        target.write(LENGTH.pack(len(request)))
        target.write(request)
        target.flush()
        if timeout_s is not None and not select.select([source], [], [], timeout_s)[0]:
            return None
        head = source.read(LENGTH.size)
        return source.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else None


class Boxes:
    """Some of them, for any thread; who asks while all are busy waits."""

    def __init__(self, num: int, command: Sequence[str], env: Mapping[str, str] | None, greeting: bytes | None = None):
        self.command, self.env, self._idle = command, env, queue.SimpleQueue[Box]()
        for _ in range(num):
            self._idle.put(Box(command, env, greeting))

    def ask(self, request: bytes, timeout_s: float | None = None) -> bytes | None:
        """-> the reply of whichever is idle first, or None where it has ended over the question."""
        box = self._idle.get()
        try:
            return box.ask(request, timeout_s)
        finally:
            self._idle.put(box)
