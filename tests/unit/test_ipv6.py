"""IPv6 as IPv4: rows travel over it, and limits by peer count the network that a host is given."""

import socket
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from actors.dataplane import door
from actors.dataplane.client import Connection
from actors.dataplane.connection import family_of
from tests.unit.fuzzed_port import SECRET, Port, call_of
from trinity.utils.origins import origin_of


def why_not():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        return f"no IPv6 loopback here: {error}"
    return ""


@pytest.mark.parametrize("is_sealed", [False, True])
def test_rows_travel_over_it(is_sealed):
    if reason := why_not():
        pytest.skip(reason)
    port = Port("::1", is_sealed=is_sealed)
    connection = Connection(replace(port.address, machine="elsewhere"), SECRET, time.monotonic() + 60)
    assert connection.wire.sock.family == socket.AF_INET6
    call = call_of()
    got = connection.take(connection.send(call), time.monotonic() + 60)
    torch.testing.assert_close(got, port.oracle.send("shard-0", "infer", call).result())
    connection.wire.close()
    port.server.close()


def test_a_crowd_over_it_sends_away_its_own(monkeypatch):
    if reason := why_not():
        pytest.skip(reason)
    monkeypatch.setattr(door, "MAX_GREETED", 4)
    port = Port("::1")
    with ExitStack() as stack:
        crowd = [stack.enter_context(port.stranger()) for _ in range(20)]
        port.is_well()
        assert len(crowd[-1].recv(100)) > 0
    port.server.close()


def test_families():
    assert family_of("127.0.0.1") == socket.AF_INET
    assert family_of("::1") == socket.AF_INET6
    assert family_of("localhost") in (socket.AF_INET, socket.AF_INET6)


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::1", "::/64"),
        ("2001:db8:0:1::5", "2001:db8:0:1::/64"),
        ("2001:db8:0:1:ffff::5", "2001:db8:0:1::/64"),
        ("2001:db8:0:2::5", "2001:db8:0:2::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fe80::1%lo", "fe80::/64"),
        ("", ""),
    ],
)
def test_origins(address, origin):
    assert origin_of(address) == origin
