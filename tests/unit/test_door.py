"""The door of a shard and the address it is at: who is let in, who is believed, and what strangers cost."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from actors.dataplane import arithmetic, client, door, handshake, unix_socket
from actors.dataplane.arithmetic import own_words
from actors.dataplane.client import Connection
from actors.dataplane.connection import Address, machine_id
from actors.dataplane.door import Door
from actors.dataplane.frames import WELCOME, BadFrame, Header
from actors.dataplane.handshake import GREETING_BYTES, PROOF_BYTES, REPLY_BYTES
from tests.unit.fuzzed_port import SECRET, Port, num_descriptors, num_serving
from trinity.rpc.messages import PROTOCOL

NOBODY = 65534


@pytest.fixture
def port():
    made = Port()
    yield made
    made.server.close()


def soon():
    return time.monotonic() + 60


# -- who is believed


@pytest.fixture(params=["unix", "tcp"])
def impostor(request, tmp_path):
    """-> (its listener, the address where a shard was)."""
    if request.param == "tcp":
        listener = socket.create_server(("127.0.0.1", 0))
        address = Address("elsewhere", "", *listener.getsockname())
    else:
        listener, path = socket.socket(socket.AF_UNIX), str(tmp_path / "s")
        with unix_socket.reachable(path) as name:
            listener.bind(name)
        listener.listen()
        address = Address(machine_id(), path, "127.0.0.1", 1)
    with listener:
        yield listener, address


ANSWERS = {  # what somebody without the secret can say to a caller's reply
    "welcome": lambda reply: WELCOME,
    "any proof": lambda reply: WELCOME + own_words() + bytes(PROOF_BYTES),
    "the caller's own proof": lambda reply: WELCOME + reply[GREETING_BYTES:],
    "a shared buffer's offer": lambda reply: bytes(len(WELCOME)) + own_words() + bytes(PROOF_BYTES),
}


@pytest.mark.parametrize("said", ANSWERS)
def test_who_does_not_know_the_secret_gets_no_rows_and_is_not_believed(impostor, said):
    (listener, address), heard = impostor, []

    def pretend():
        sock, _ = listener.accept()
        with sock:
            sock.sendall(handshake.greeting())
            reply = sock.recv(REPLY_BYTES, socket.MSG_WAITALL)
            sock.sendall(ANSWERS[said](reply))
            sock.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                heard.append(sock.recv(1 << 16))

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises((BadFrame, EOFError)):
        Connection(address, SECRET, soon())
    thread.join()
    assert b"".join(heard) == b"", "nothing was sent after the caller's proof"


def test_a_proof_that_is_relayed_from_another_address_is_wrong(port):
    """Somebody sits where a shard was, and has each side prove itself to the other."""
    with socket.create_server(("127.0.0.1", 0)) as relay:
        address = Address("elsewhere", "", *relay.getsockname())

        def pass_on():
            here, _ = relay.accept()
            with here, port.stranger() as there:
                here.sendall(there.recv(GREETING_BYTES, socket.MSG_WAITALL))
                there.sendall(here.recv(REPLY_BYTES, socket.MSG_WAITALL))
                here.sendall(there.recv(1 << 16))

        thread = threading.Thread(target=pass_on)
        thread.start()
        with pytest.raises(BadFrame, match="another address than the caller meant"):
            Connection(address, SECRET, soon())
        thread.join()


def test_a_proof_is_of_one_role_one_address_and_one_pair_of_nonces():
    one, other = handshake.greeting(), handshake.greeting()
    asked = [
        (SECRET, "shard", ("tcp:a:1", one, other)),
        (SECRET, "caller", ("tcp:a:1", one, other)),
        (SECRET, "caller", ("tcp:a:11", one, other)),
        (SECRET, "caller", ("sealed:a:1", one, other)),
        (SECRET, "caller", ("tcp:a:1", other, one)),
        (SECRET, "caller", ("tcp:a:1", one, one)),
        (b"x" * 32, "caller", ("tcp:a:1", one, other)),
    ]
    proofs = {handshake.proof(secret, role, handshake.transcript(*known)) for secret, role, known in asked}
    proofs.add(handshake.proof(SECRET, "caller", handshake.transcript("tcp:a:1", one, other), b"2 python"))
    assert len(proofs) == len(asked) + 1


@pytest.mark.parametrize("side", ["a caller", "the shard"])
def test_who_would_give_other_bits_is_refused_by_name(port, monkeypatch, side):
    """Whoever of the two has the newer rules: it is the other that says so, or this one."""
    main, number = threading.main_thread(), arithmetic.native.BITS

    class Rules:
        computes = staticmethod(arithmetic.native.computes)

        @property
        def BITS(self):
            return number + ((threading.current_thread() is main) == (side == "a caller"))

    monkeypatch.setattr(arithmetic, "native", Rules())
    with pytest.raises(BadFrame, match=r"computes by rules for bits of number '.' \(.*float32.*answers would differ"):
        Connection(port.address, SECRET, soon())


def test_kernels_on_one_side_only_are_said_once(port, monkeypatch, caplog):
    """Of a process without the extension, by both sides; who is there is greeted as ever."""
    monkeypatch.setattr(arithmetic, "_told", set())
    monkeypatch.setattr(arithmetic.native, "computes", lambda: f"{threading.current_thread().name}: float32")
    threading.current_thread().name, before = "python", threading.current_thread().name
    try:
        for _ in range(3):
            port.is_well()
    finally:
        threading.current_thread().name = before
    said = [record.getMessage() for record in caplog.records if "plain path" in record.getMessage()]
    assert len(said) == 2
    assert any(line.startswith("the shard at") and "computes with trinity-door: float32" in line for line in said)
    assert any(line.startswith("a caller at") and "computes with python: float32" in line for line in said)


@pytest.mark.parametrize(("ahead_s", "said"), [(30, "30.0 s ahead of"), (-2, "2.0 s behind"), (0.5, ""), (0, "")])
def test_clocks_that_differ_are_named(port, monkeypatch, caplog, ahead_s, said):
    """And change nothing: the answer is the usual one."""
    shards = handshake.frames.welcome
    monkeypatch.setattr(handshake.frames, "welcome", lambda now_s: shards(now_s + ahead_s))
    port.is_well()
    found = [record.getMessage() for record in caplog.records if "clock" in record.getMessage()]
    assert len(found) == bool(said)
    assert said in "".join(found)


@pytest.mark.parametrize(
    ("said", "answer"),
    [(b"TRH\x01", f"speaks protocol 1, this process {PROTOCOL}".encode()), (b"HTTP", b"is it a shard?")],
)
def test_another_release_is_named(port, said, answer):
    with port.stranger() as sock:
        sock.recv(GREETING_BYTES, socket.MSG_WAITALL)
        sock.sendall(said.ljust(REPLY_BYTES, b"\0"))
        head = Header.unpack(sock.recv(len(WELCOME), socket.MSG_WAITALL))
        assert answer in sock.recv(head.payload_bytes, socket.MSG_WAITALL)


# -- what strangers cost


def test_a_crowd_of_strangers_takes_no_thread_and_holds_up_nobody(port):
    before = threading.active_count()
    with ExitStack() as stack:
        crowd = []
        for _ in range(4 * door.MAX_GREETED):
            crowd.append(stack.enter_context(port.stranger()))
            if len(crowd) % 50 == 0:
                port.is_well()
        port.is_well()
        assert threading.active_count() <= before + 1
        assert num_serving() <= 1
        for sock in crowd[: door.MAX_GREETED]:  # who came first was sent away first
            assert len(sock.recv(GREETING_BYTES + 1, socket.MSG_WAITALL)) <= GREETING_BYTES
        crowd[-1].sendall(b"x")  # the last one is still heard
        assert len(crowd[-1].recv(GREETING_BYTES, socket.MSG_WAITALL)) == GREETING_BYTES


def test_a_crowd_on_tcp_sends_nobody_away_from_the_unix_socket(port, monkeypatch):
    """However many come between a caller's greeting and its proof."""
    monkeypatch.setattr(door, "MAX_GREETED", 8)
    with ExitStack() as stack:

        def proof_in_a_crowd(*known):
            for _ in range(3 * door.MAX_GREETED * (threading.current_thread() is threading.main_thread())):
                crowd = stack.enter_context(port.stranger())
                assert len(crowd.recv(GREETING_BYTES, socket.MSG_WAITALL)) == GREETING_BYTES
            return proof(*known)

        proof = handshake.proof
        monkeypatch.setattr(handshake, "proof", proof_in_a_crowd)
        Connection(port.address, SECRET, soon()).wire.close()


def test_a_connection_that_fails_leaves_no_socket(impostor):
    listener, address = impostor
    before = num_descriptors()
    for _ in range(3):

        def turn_away():
            listener.accept()[0].close()

        thread = threading.Thread(target=turn_away)
        thread.start()
        with pytest.raises(EOFError) as failed:
            Connection(address, SECRET, soon())
        thread.join()
        assert num_descriptors() <= before, "not even while its error is looked at"
        del failed


def greeted(path, user):
    """A process of that user connects; -> how many bytes it is greeted with, or its error."""
    back, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(user)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                os.write(there, str(len(sock.recv(100))).encode())
        except OSError as error:
            os.write(there, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(there)
    with open(back, "rb") as said:
        return said.read().decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_other_users_do_not_reach_the_socket_and_are_not_greeted(port):
    assert greeted(port.address.path, 0) == str(GREETING_BYTES)
    assert greeted(port.address.path, NOBODY) == "PermissionError"
    folder = tempfile.mkdtemp()
    try:
        os.chmod(folder, 0o755)
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(f"{folder}/s")
        os.chmod(f"{folder}/s", 0o777)
        unix.listen()
        opened = Door({"unix:s": unix}, SECRET, lambda *whom: None)
        assert greeted(f"{folder}/s", 0) == str(GREETING_BYTES)
        assert greeted(f"{folder}/s", NOBODY) == "0"
        opened.close()
    finally:
        shutil.rmtree(folder)


def test_a_caller_asks_whose_socket_it_is(port, monkeypatch):
    """As seen by another user's process; root's sockets are everybody's to believe."""
    monkeypatch.setattr(handshake.os, "geteuid", lambda: 4242)
    if os.getuid() == 0:
        Connection(port.address, SECRET, soon()).wire.close()
    else:
        with pytest.raises(BadFrame, match="belongs to user"):
            Connection(port.address, SECRET, soon())


# -- the socket's file


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A folder for temporary files whose name alone is longer than a socket's address may be."""
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def files(folder):
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def test_a_socket_lies_in_a_folder_of_its_user_and_goes_with_its_server(temporary):
    port = Port()
    (path,) = files(temporary)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert str(path) == port.address.path
    Connection(port.address, SECRET, soon()).wire.close()
    port.server.close()
    assert files(temporary) == []
    with pytest.raises(OSError, match="No such file"):
        Connection(port.address, SECRET, soon())


def test_what_a_killed_process_left_is_removed_by_the_next(temporary):
    script = "import os; from actors.dataplane import unix_socket; unix_socket.listen(1); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(temporary)})
    assert len(files(temporary)) == 1
    one, kept = unix_socket.listen(1)
    other, also = unix_socket.listen(1)
    assert files(temporary) == sorted([kept, also]), "the living one's stays"
    one.close()
    other.close()


@pytest.mark.parametrize(
    "spoil", [lambda folder: folder.chmod(0o755), lambda folder: folder.rename(folder.parent / "b")]
)
def test_a_folder_that_is_not_ours_alone_is_not_used(temporary, spoil):
    sock, path = unix_socket.listen(1)
    sock.close()
    folder = path.parent
    spoil(folder)
    if not folder.exists():
        folder.symlink_to(folder.parent / "b")
    sock, path = unix_socket.listen(1)
    sock.close()
    assert path.parent != folder
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_files_of_another_mount_namespace_are_not_looked_for(port, monkeypatch):
    """Containers that share a network have their own files: TCP, then."""
    assert str(Path("/proc/self/ns/mnt").readlink()) in machine_id()
    monkeypatch.setattr(client, "machine_id", lambda: "another container")
    connection = Connection(replace(port.address, path="/nowhere"), SECRET, soon())
    assert connection.ways[0] == "TCP"
    connection.wire.close()
