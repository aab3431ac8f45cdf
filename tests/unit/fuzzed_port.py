"""A shard's port, what may be said to it, and what must hold after it: for test_direct_fuzz.py."""

import contextlib
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from actors.dataplane import server
from actors.dataplane.client import Connection
from actors.dataplane.frames import HEADER, FrameLimits, Header, request
from actors.dataplane.server import Combiner, DirectServer
from trinity.config import OptimConfig, preset
from trinity.dispatch.transport import LocalTransport
from trinity.errors import DeadlineExceeded
from trinity.pool.local import local_pool
from trinity.rpc.messages import Backward, Fetch, Forward, Load, Rows

MODEL = preset("tiny").model_copy(
    update=dict(hidden_size=16, moe_intermediate_size=8, num_experts=8, num_experts_per_tok=3)
)
LAYER = MODEL.moe_layers[0]
LIMITS = FrameLimits(16, 8, torch.float32)
SECRET = b"f" * 32
AT_ONCE_S = 0.8 * server.HANDSHAKE_S  # it waits for nobody to be shown out
COUNTS = ("num_rows", "dim", "num_slots")


def call_of(num_rows=5, op_id="fuzz:1", num_slots=3, **options):
    rng = torch.Generator().manual_seed(num_rows)
    ids_RK = torch.rand(num_rows, 8, generator=rng).topk(num_slots).indices
    rows = Rows(torch.randn(num_rows, 16, generator=rng), ids_RK, torch.rand(num_rows, num_slots, generator=rng))
    return Forward(op_id, LAYER, 1, 0, time.monotonic() + 60, rows, **options)


def backward_of(rows, op_id="fuzz:1"):
    return Backward(op_id, LAYER, 1, 0, time.monotonic() + 60, torch.ones(5, 16), rows)


def frame_of(call, number=1):
    head, tensors = request(number, call)
    return bytes(head) + b"".join(t.contiguous().numpy().tobytes() for t in tensors)


def frames():
    """One of each kind of request."""
    forward = call_of()
    fetch = Fetch(forward.layer, 0, forward.version, forward.deadline_s)
    calls = (forward, replace(forward, keep=True), backward_of(None), backward_of(forward.rows, "fuzz:2"), fetch)
    return [frame_of(call) for call in calls]


def headed(frame, **fields):
    """The frame with other values in its header."""
    head = Header._make(HEADER.unpack(frame[: HEADER.size]))
    return HEADER.pack(*head._replace(**fields)) + frame[HEADER.size :]


class Port:
    """A real shard behind its sockets, and ways to get at them."""

    def __init__(self, host="127.0.0.1", **how):
        self.pool = local_pool(MODEL, Load(seed=5), optim=OptimConfig(), backend="torch")
        self.shard = self.pool.transport.shards["shard-0"]
        self.oracle = LocalTransport(self.pool.transport.shards)
        layers = self.shard.compute_natively()  # None without the extension
        self.server = DirectServer(Combiner(self.shard), LIMITS, SECRET, host, service=layers and layers.service, **how)
        self.address = self.server.address

    def stranger(self):
        """A socket that is connected and has said nothing."""
        sock = socket.create_connection((self.address.host, self.address.port), timeout=60)
        sock.settimeout(60)
        return sock

    def member(self):
        """A socket whose next byte is read as a frame's first."""
        sock = Connection(self.address, SECRET, time.monotonic() + 60).wire.sock
        sock.settimeout(60)
        return sock

    def is_well(self):
        """A proper caller is answered at once. This machine is shared: it may take a second try."""
        try:
            self.ask(AT_ONCE_S)
        except DeadlineExceeded:
            self.ask(AT_ONCE_S)

    def ask(self, within_s):
        deadline_s = time.monotonic() + within_s
        connection = Connection(self.address, SECRET, deadline_s)
        call = replace(call_of(op_id="proper:1"), deadline_s=deadline_s)
        got = connection.take(connection.send(call), deadline_s)
        connection.wire.close()
        # Merged with what still waits, it may be summed in another order.
        torch.testing.assert_close(got, self.oracle.send("shard-0", "infer", call).result())


def num_serving():
    return sum(thread.name == "trinity-rows" for thread in threading.enumerate())


def num_descriptors():
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def eventually(holds, within_s=60.0):
    end_s = time.monotonic() + within_s
    while not holds() and time.monotonic() < end_s:
        time.sleep(0.01)
    return holds()


def said(sock):
    """Everything until the shard ends the connection, as frames. Fails when it goes on for ever."""
    found = bytearray()
    with contextlib.suppress(ConnectionResetError):  # it has left with some of our words unread
        while piece := sock.recv(1 << 16):
            found += piece
    heads = []
    while found:
        heads.append(Header.unpack(bytes(found[: HEADER.size])))
        del found[: HEADER.size + heads[-1].payload_bytes]
    return heads


def tell(sock, data):
    """Send and say no more; -> the heads of the frames that come back."""
    with sock:
        with contextlib.suppress(OSError):  # refused in mid-sentence
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        return said(sock)
