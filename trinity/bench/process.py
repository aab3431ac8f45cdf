"""The processes that `trinity bench dispatch` and `train` measure against. Each does one thing until its stdin closes.

    python -m trinity.bench.process     a JSON object of orders a line on stdin, a JSON object a line on stdout

The role `raw` is here, without torch: what a plain Unix socket does. The others are where HOMES says, or in echo.py.
Decisions: a secret comes through stdin, where no process table shows it; orders end, and so does the process, with its parent.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trinity.errors import Unavailable
from trinity.utils.garbage import uncollected

HOMES = {"transformers": "train", "engine": "apart", "generate": "apart"}

# -- the comparison: a raw echo, and its caller


def echo_raw(listener: socket.socket) -> None:
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=echo_one, args=(sock,), daemon=True).start()


def echo_one(sock: socket.socket) -> None:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    size = int.from_bytes(sock.recv(8, socket.MSG_WAITALL), "little")  # said once, for all of a connection
    buffer = memoryview(bytearray(size))
    while sock.recv_into(buffer, size, socket.MSG_WAITALL) == size:
        sock.sendall(buffer)
    sock.close()


def raw_caller(where: str | tuple[str, int], payload: memoryview) -> tuple[socket.socket, Callable[[], memoryview]]:
    """-> its socket, and a function that sends the payload and returns what came back, in a buffer that is used again.
    `where`: a Unix socket's path, or host and port."""
    sock, size = socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET), len(payload)
    sock.connect(where)
    if not isinstance(where, str):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(size.to_bytes(8, "little"))
    back = memoryview(bytearray(size))

    def call() -> memoryview:
        sock.sendall(payload)
        got = sock.recv_into(back, size, socket.MSG_WAITALL)
        assert got == size, f"{got} of {size} bytes came back"
        return back

    return sock, call


def timed(call: Callable[[], Any], num_calls: int) -> list[float]:
    """Microseconds of each call."""
    found = []
    for _ in range(num_calls):
        started_ns = time.perf_counter_ns()
        call()
        found.append((time.perf_counter_ns() - started_ns) / 1000)
    return found


def processor_us(pids: Sequence[int]) -> float:
    """Microseconds that all threads of these processes have had a core for."""
    tasks = [path for pid in pids for path in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1000


# -- a process and its parent


class Child:
    """A process of this module. It ends when it is closed, or when this process dies: its stdin closes with either."""

    def __init__(self, **orders: Any):
        command = [sys.executable, "-m", "trinity.bench.process"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.tell(**orders)

    def tell(self, **orders: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(orders) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next answer; waits for it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Unavailable(f"the bench's process {self.process.pid} ended early; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@contextmanager
def children(orders: Sequence[dict[str, Any]]) -> Iterator[list[Child]]:
    """Processes started side by side, ended together."""
    started = [Child(**order) for order in orders]
    try:
        yield started
    finally:
        for child in started:
            child.close()


@contextmanager
def pinned(pids: Sequence[int], cores: set[int]) -> Iterator[None]:
    """Have all threads of these processes, and those that they start, run on these cores; on those of this process before."""
    before = os.sched_getaffinity(0)
    _pin(pids, cores)
    try:
        yield
    finally:
        _pin(pids, before)


def _pin(pids: Sequence[int], cores: set[int]) -> None:
    for pid in pids:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(thread), cores)


def say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def raw() -> None:
    with tempfile.TemporaryDirectory(prefix="trinity-") as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/raw.sock")
        listener.listen()
        tcp = socket.create_server(("127.0.0.1", 0))
        for each in (listener, tcp):
            threading.Thread(target=echo_raw, args=(each,), daemon=True).start()
        say(path=listener.getsockname(), port=tcp.getsockname()[1])
        sys.stdin.read()


def main() -> None:
    orders = json.loads(sys.stdin.readline())
    role = orders.pop("role")
    home = HOMES.get(role, "echo")
    with uncollected():
        run = raw if role == "raw" else importlib.import_module(f"trinity.bench.{home}").ROLES[role]
    run(**orders)
    os._exit(0)  # a thread that waits inside torch or a socket would abort the usual way out


if __name__ == "__main__":
    main()
