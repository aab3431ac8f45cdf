"""Whatever is said to a shard's port: the shard lives, its next caller is answered at once, and nothing of it is left.

A stranger does not know the pool's secret, a member does. Frames are made and broken with the public names of
frames.py. After every test a proper caller must get the right answer, and no thread and no descriptor may be left.
"""

import random
import resource
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.dataplane import door, handshake, server
from actors.dataplane.arithmetic import own_words
from actors.dataplane.client import Connection, DirectTransport
from actors.dataplane.connection import Address
from actors.dataplane.frames import ANSWER, FAILURE, HEADER, WELCOME, BadFrame, Header, answer
from tests.unit.fuzzed_port import (
    COUNTS,
    LIMITS,
    SECRET,
    Port,
    call_of,
    eventually,
    frame_of,
    frames,
    headed,
    num_descriptors,
    num_serving,
    said,
    tell,
)
from trinity.errors import DeadlineExceeded, TrinityError


@pytest.fixture(scope="module")
def one_port():
    made = Port()
    yield made
    made.server.close()


@pytest.fixture
def port(one_port, monkeypatch):
    """The shard's port; whatever the test does to it, the shard is well afterwards, nothing crashed and nothing is left."""
    assert eventually(lambda: num_serving() == 0)
    before, crashed = num_descriptors(), []
    monkeypatch.setattr(threading, "excepthook", lambda crash: crashed.append(repr(crash.exc_value)))
    yield one_port
    one_port.is_well()
    assert eventually(lambda: num_serving() == 0), f"{num_serving()} threads still serve nobody"
    assert eventually(lambda: num_descriptors() <= before), f"{before} descriptors became {num_descriptors()}"
    assert not crashed


# -- noise


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes(port, seed):
    rng = random.Random(seed)
    for _ in range(25):
        noise = rng.randbytes(rng.choice([0, 1, 31, 32, 33, HEADER.size, 4096]))
        with port.stranger() as sock:
            sock.sendall(noise)
        assert all(head.kind == FAILURE for head in tell(port.member(), noise))


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_under_a_header_that_is_right(port, seed):
    """Rows may be any numbers; what is no expert is refused, and nobody else notices."""
    rng = random.Random(seed)
    for frame in frames():
        noise = rng.randbytes(len(frame) - HEADER.size)
        kinds = [head.kind for head in tell(port.member(), frame[: HEADER.size] + noise)]
        assert len(kinds) == 1
        assert kinds[0] in (ANSWER, FAILURE)


@pytest.mark.parametrize("kind", range(5))
def test_a_frame_that_ends_anywhere(port, kind):
    frame = frames()[kind]
    for cut in sorted({*range(0, HEADER.size, 7), *range(HEADER.size, len(frame), 61), len(frame) - 1}):
        assert tell(port.member(), frame[:cut]) == []


@pytest.mark.parametrize("kind", range(5))
def test_a_flipped_bit_in_each_byte_of_the_header(port, kind):
    """An answer, a named error or the end of the connection; never silence. After fewer rows than were sent, what is left
    is no frame. In the first bytes, which say what all others mean, every bit."""
    rng, frame = random.Random(kind), frames()[kind]
    flips = [(at, bit) for at in range(HEADER.size) for bit in (range(8) if at < 12 else [rng.randrange(8)])]
    for at, bit in flips:
        broken = bytearray(frame)
        broken[at] ^= 1 << bit
        heads = tell(port.member(), bytes(broken))
        assert len(heads) <= 1 or (len(heads) == 2 and heads[1].kind == FAILURE)


def test_a_flipped_bit_anywhere_in_the_rows(port):
    rng, frame = random.Random(0), frames()[0]
    for _ in range(60):
        broken = bytearray(frame)
        broken[rng.randrange(HEADER.size, len(frame))] ^= 1 << rng.randrange(8)
        assert len(tell(port.member(), bytes(broken))) == 1


# -- counts


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
def test_counts_that_are_not_those_of_the_rows(port, field, value):
    for frame in frames():
        tell(port.member(), headed(frame, **{field: value}))


def test_all_counts_at_once(port):
    heads = tell(port.member(), headed(frames()[0], **dict.fromkeys(COUNTS, 2**32 - 1)))
    assert [head.kind for head in heads] == [FAILURE]


def test_rows_that_are_announced_and_never_sent_take_no_memory(port):
    """The largest frame that is not refused, from several members at once."""
    frame = frames()[2]  # without slots: rows only
    most = (2**31 - 1) // (LIMITS.hidden_size * 4)
    before = resident_bytes()
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(port.member()).sendall(headed(frame, num_rows=most)[: HEADER.size + 1000])
        assert eventually(lambda: num_serving() == 8)
        port.is_well()
        assert resident_bytes() - before < 64 << 20


def resident_bytes():
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.is_file() else 0


# -- order


def test_frames_before_the_handshake(port):
    for early in (*frames(), WELCOME):
        assert all(head.kind == FAILURE for head in tell_stranger(port, bytes(early)))
    for proven in (SECRET, b"\0" * 32):
        assert [head.kind for head in tell_stranger(port, handshake.greeting() + own_words() + proven)] == [FAILURE]


def greeted(sock):
    """The shard's greeting."""
    return sock.recv(handshake.GREETING_BYTES, socket.MSG_WAITALL)


def tell_stranger(port, data):
    """As `tell`, after the shard's greeting."""
    sock = port.stranger()
    assert greeted(sock).startswith(handshake.HELLO)
    return tell(sock, data)


def test_a_proof_is_good_for_one_connection(port):
    with port.stranger() as one, port.stranger() as other:
        first, second, mine = greeted(one), greeted(other), handshake.greeting()
        assert first != second
        meant = handshake.meant(port.address, near=False)
        known = handshake.transcript(meant, first, mine)
        other.sendall(mine + own_words() + handshake.proof(SECRET, "caller", known, own_words()))
        assert [head.kind for head in said(other)] == [FAILURE]


def test_what_only_a_shard_says(port):
    for head, tensors in (answer(1, torch.zeros(2, 16)), answer(0, TrinityError("I am the shard now"))):
        frame = bytes(head) + b"".join(t.numpy().tobytes() for t in tensors)
        assert [head.kind for head in tell(port.member(), frame)] == [FAILURE]


def test_requests_in_any_order_are_each_answered(port):
    """Backwards before their forward, twice, and under numbers that repeat: an answer for each, in the order of asking."""
    rng = random.Random(0)
    sent = [frame for frame in frames() for _ in range(3)]
    rng.shuffle(sent)
    heads = tell(port.member(), b"".join(headed(frame, request=1 + i // 2) for i, frame in enumerate(sent)))
    assert [head.request for head in heads] == [1 + i // 2 for i in range(len(sent))]


def test_a_good_frame_after_a_bad_one_is_not_believed(port):
    """Nobody knows where it starts."""
    frame = frames()[0]
    heads = tell(port.member(), headed(frame, dim=15) + frame)
    assert [head.kind for head in heads] == [FAILURE]


# -- patience


def test_hundreds_of_idle_connections(port):
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(port.stranger())
        for _ in range(100):
            stack.enter_context(port.member())
        port.is_well()


def test_strangers_are_shown_out(port, monkeypatch):
    monkeypatch.setattr(door, "HANDSHAKE_S", 0.1)
    with ExitStack() as stack:
        silent = [stack.enter_context(port.stranger()) for _ in range(20)]
        assert all(said_nothing_more(sock) for sock in silent)


def said_nothing_more(sock):
    return len(greeted(sock)) == handshake.GREETING_BYTES and said(sock) == []


@contextmanager
def dripping(socks, data, pause_s):
    """Every socket says `data`, a byte at a time; -> the thread that does. Stops with the block."""
    stop = threading.Event()

    def drip():
        alive = list(socks)
        for byte in data:
            for sock in list(alive):
                try:
                    sock.sendall(bytes([byte]))
                except OSError:
                    alive.remove(sock)
            if stop.wait(pause_s) or not alive:
                return

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()


def test_a_byte_at_a_time(port):
    """Slow frames are frames; they hold up nobody else."""
    with ExitStack() as stack:
        slow = [stack.enter_context(port.member()) for _ in range(20)]
        frame = frames()[0]
        with dripping(slow, frame[:100], 0.005) as drip:
            port.is_well()
            drip.join()
        for sock in slow:
            sock.sendall(frame[100:])
        for sock in slow:
            assert Header.unpack(sock.recv(HEADER.size, socket.MSG_WAITALL)).kind == ANSWER


def test_a_stranger_who_drips_is_shown_out_as_well(port, monkeypatch):
    monkeypatch.setattr(door, "HANDSHAKE_S", 0.4)
    with port.stranger() as sock, dripping([sock], handshake.greeting(), 0.2):
        began_s = time.monotonic()
        assert said_nothing_more(sock)
        assert time.monotonic() - began_s < handshake.GREETING_BYTES * 0.2, "long before it had said all"


def test_nobody_waits_past_the_deadline_for_an_answer_that_drips():
    """A shard, or a cable, that says a byte now and then."""
    server, client = socket.socketpair()
    connection = Connection.__new__(Connection)  # past its handshake
    connection.wire, connection._expected, connection._arrived = port_wire(client), {1}, {}
    with server, client, dripping([server], answer(1, torch.zeros(5, 16))[0], 0.015), pytest.raises(DeadlineExceeded):
        connection.take(1, time.monotonic() + 0.3)  # the whole answer would be there in some 6 s


def port_wire(sock):
    from actors.dataplane.connection import Wire

    return Wire(sock)


def test_a_peer_that_never_reads(port, monkeypatch):
    """Its answers fill its own socket; then its thread waits alone, and not for ever."""
    monkeypatch.setattr(server, "PAYLOAD_S", 0.5)
    frame = frame_of(replace(call_of(20_000), deadline_s=time.monotonic() + 0.5))
    with port.member() as sock:
        sock.settimeout(0.3)
        with pytest.raises(OSError):  # noqa: PT011  (a timeout, or the shard has had enough)
            sock.sendall(frame * 40)
        port.is_well()
        assert eventually(lambda: num_serving() == 0)


def test_a_peer_that_leaves_while_its_rows_are_computed(port):
    with port.server.combiner.inference.lock:
        for _ in range(10):
            with port.member() as sock:
                sock.sendall(frame_of(call_of(50)))


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_a_large_frame_is_refused_by_name(port, family):
    """Also when the shard leaves while its caller still sends: Unavailable would be tried again until the deadline."""
    address = port.address if family == "unix" else replace(port.address, machine="elsewhere")
    transport = DirectTransport(port.oracle, lambda shard, deadline_s: address, SECRET)
    wrong = call_of(20_000)
    wrong = replace(wrong, rows=replace(wrong.rows, x_RD=torch.zeros(20_000, 15)))
    for _ in range(5):
        with pytest.raises(BadFrame, match="rows have 15 columns"):
            transport.send("shard-0", "infer", wrong).result()
    transport.close()


# -- neighbours and limits


def test_no_descriptors_left_is_no_reason_to_stop_listening():
    """A shard that is out of descriptors for a moment is reachable when it has some again."""
    port = Port()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(4)]
        unix = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(4)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            for sock in socks:
                sock.connect((port.address.host, port.address.port))
            for sock in unix:
                sock.connect(port.address.path)  # without `reachable`, which needs a descriptor
            time.sleep(0.2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        port.is_well()
    finally:
        port.server.close()


@pytest.mark.parametrize(
    "strange",
    [
        dict(num_slots=2),
        dict(num_slots=0),
        dict(num_rows=0),
    ],
    ids=["two-slots", "no-slots", "no-rows"],
)
def test_calls_that_wait_together_do_not_suffer_from_one_another(port, strange, monkeypatch):
    """Two members' inference of one layer is merged; a frame may have any number of slots and rows."""
    monkeypatch.setattr(port.server, "service", None)  # by Python, where one can see what waits
    calls = [replace(call_of(op_id="a:1")), replace(call_of(**{"op_id": "b:1", **strange}))]
    wanted = [port.oracle.send("shard-0", "infer", call).result() for call in calls]
    with ExitStack() as stack:
        connections = [Connection(port.address, SECRET, time.monotonic() + 60) for _ in calls]
        for connection in connections:
            stack.callback(connection.wire.close)
        with port.server.combiner.inference.lock:
            numbers = [connection.send(call) for connection, call in zip(connections, calls, strict=True)]
            assert eventually(lambda: len(port.server.combiner.inference._waiting) == 2)
        for connection, number, want in zip(connections, numbers, wanted, strict=True):
            torch.testing.assert_close(connection.take(number, time.monotonic() + 60), want)


def test_an_address_that_speaks_something_else():
    """The caller's side: an error that says so, not a crash or a wait."""
    for greeting, error in ((b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4, BadFrame), (b"", (EOFError, OSError))):
        with socket.create_server(("127.0.0.1", 0)) as other:
            threading.Thread(target=greet, args=(other, greeting), daemon=True).start()
            host, number = other.getsockname()
            with pytest.raises(error):
                Connection(Address("elsewhere", "", host, number), SECRET, time.monotonic() + 60)


def greet(other, greeting):
    sock, _ = other.accept()
    with sock:
        sock.sendall(greeting)
