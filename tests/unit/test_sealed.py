"""Rows between hosts that are sealed: the same bits arrive, and a cable in somebody's hands shows and changes nothing."""

import socket
import threading
import time
from dataclasses import replace

import pytest
import torch

from actors.dataplane import client, handshake, sealed
from actors.dataplane.client import Connection, DirectTransport
from actors.dataplane.connection import Wire
from actors.dataplane.frames import HEADER, BadFrame
from actors.dataplane.sealed import PIECE_BYTES, TAG_BYTES, SealedWire
from tests.unit.fuzzed_port import LAYER, SECRET, Port, backward_of, call_of
from trinity.errors import ConfigError, TrinityError
from trinity.rpc.messages import Fetch


@pytest.fixture
def port():
    made = Port(is_sealed=True)
    yield made
    made.server.close()


def far(port):
    """Its address as from another host."""
    return replace(port.address, machine="elsewhere")


@pytest.mark.parametrize("num_rows", [0, 1, 5, 20_000])
def test_every_verb_gives_what_it_gives_in_this_process(port, num_rows):
    transport = DirectTransport(port.oracle, lambda shard, deadline_s: far(port), SECRET)
    call = call_of(num_rows)
    for _ in range(2):
        got = transport.send("shard-0", "infer", call).result()
        assert torch.equal(got, port.oracle.send("shard-0", "infer", call).result())
    assert transport._connections["shard-0"].ways == ("TCP, sealed", "TCP, sealed")
    if num_rows == 5:
        for verb, one in (
            ("backward", backward_of(call.rows, "a:1")),
            ("fetch", Fetch(LAYER, 0, 0, time.monotonic() + 60)),
        ):
            got, want = (where.send("shard-0", verb, one).result() for where in (transport, port.oracle))
            pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
            assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(TrinityError, match="the caller wants 7"):
        transport.send("shard-0", "infer", replace(call, version=7)).result()
    transport.close()


def test_on_one_host_rows_go_as_they_are(port):
    connection = Connection(port.address, SECRET, time.monotonic() + 60)
    assert not isinstance(connection.wire, SealedWire)
    connection.wire.close()


class Cable:
    """Between a caller and a shard, in the hands of somebody who knows no secret. `tamper(direction, bytes)` -> bytes."""

    def __init__(self, port, tamper):
        self.port, self.tamper, self.passed = port, tamper, {"there": b"", "back": b""}
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = replace(far(port), port=self.listener.getsockname()[1])
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        here, _ = self.listener.accept()
        there = self.port.stranger()
        for source, target, way in ((here, there, "there"), (there, here, "back")):
            threading.Thread(target=self._pass, args=(source, target, way), daemon=True).start()

    def _pass(self, source, target, way):
        try:
            while piece := source.recv(1 << 16):
                self.passed[way] += piece
                target.sendall(self.tamper(way, piece))
        except OSError:
            pass
        for sock in (source, target):
            sock.close()


@pytest.fixture
def on_the_cable(port, monkeypatch):
    """-> make(tamper): a connection through a cable that passes for the shard's own address, as one on the way does."""
    meant = handshake.meant(far(port), near=False)
    monkeypatch.setattr(client, "meant", lambda address, near: meant)

    def make(tamper=lambda way, piece: piece):
        cable = Cable(port, tamper)
        return cable, Connection(cable.address, SECRET, time.monotonic() + 60)

    return make


def test_nothing_of_the_rows_can_be_read_on_the_way(on_the_cable, port):
    cable, connection = on_the_cable()
    call = call_of(50)
    got = connection.take(connection.send(call), time.monotonic() + 60)
    assert torch.equal(got, port.oracle.send("shard-0", "infer", call).result())
    for tensor in (call.rows.x_RD, call.rows.weights_RK, got):
        for row in tensor:
            assert row.numpy().tobytes()[:8] not in cable.passed["there"] + cable.passed["back"]
    assert call.op_id.encode() not in cable.passed["there"]


@pytest.mark.parametrize("way", ["there", "back"])
@pytest.mark.parametrize(
    ("num_rows", "at"), [(5, 0), (5, 60), (5, HEADER.size), (5, HEADER.size + TAG_BYTES + 5), (5, -1), (20_000, "late")]
)
def test_a_bit_that_is_changed_ends_the_connection(on_the_cable, way, num_rows, at):
    armed = threading.Event()

    def tamper(direction, piece):
        if direction != way or not armed.is_set() or (at == "late" and len(cable.passed[way]) < PIECE_BYTES + 9999):
            return piece
        changed = bytearray(piece)
        changed[-1 if at == "late" else at] ^= 1
        return bytes(changed)

    cable, connection = on_the_cable(tamper)
    armed.set()
    with pytest.raises((BadFrame, EOFError, OSError)):
        connection.take(connection.send(call_of(num_rows)), time.monotonic() + 60)


def test_what_was_sent_before_is_not_believed_again(on_the_cable):
    """Of two equal requests the second is replaced by the first's bytes."""
    armed, first = threading.Event(), []

    def tamper(direction, piece):
        if direction == "there" and armed.is_set():
            first.append(piece)
            return first[0]
        return piece

    _, connection = on_the_cable(tamper)
    armed.set()
    call = call_of(5)
    connection.take(connection.send(call), time.monotonic() + 60)
    with pytest.raises((BadFrame, EOFError, OSError)):
        connection.take(connection.send(call), time.monotonic() + 60)


def test_either_direction_and_every_connection_has_a_key_of_its_own():
    sock, _ = socket.socketpair()
    with sock:
        sides = [SealedWire(Wire(sock), SECRET, known, shard) for known in (b"a", b"b") for shard in (True, False)]
        words, opened = [bytes(side._mine.close(b"the same words")) for side in sides], bytearray(14)
        assert len(set(words)) == len(words)
        sides[1]._theirs.open(words[0], opened)
        assert opened == b"the same words"
        with pytest.raises(BadFrame, match="was changed"):
            sides[3]._theirs.open(words[0], opened)


def test_without_the_package_the_remedy_is_named(port, monkeypatch):
    for name, value in (("version", "46.0.7"), ("find_spec", None)):
        monkeypatch.setattr(sealed, name, lambda package, value=value: value)
        for needs in (lambda: Port(is_sealed=True), lambda: Connection(far(port), SECRET, time.monotonic() + 60)):
            with pytest.raises(ConfigError, match="pip install 'cryptography>=47'"):
                needs()
