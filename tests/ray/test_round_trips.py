"""Round trips between nodes, where there is one: what `trinity doctor --address` says of a cluster."""

from actors import round_trips
from trinity import native
from trinity.errors import Unavailable


def test_a_node_measures_the_others_and_its_clock(ray_session):
    [(address, found)] = round_trips.measured().items()
    assert address == ray_session.util.get_node_ip_address()
    assert (found.to_s, found.ahead_s) == ({}, 0.0), "its own clock is this machine's"
    assert found.computes.startswith(native.described()["computes"])
    [node] = [node for node in ray_session.nodes() if node["Alive"]]
    assert 0 < round_trips._round_trip_s(address, node["NodeManagerPort"]) < 1
    assert round_trips._round_trip_s(address, 1) is None


def test_what_is_said_of_them(monkeypatch, capsys):
    from contextlib import nullcontext

    from trinity.cli import main
    from trinity.commands import doctor

    found = {
        "10.0.0.1": round_trips.Measured({"10.0.0.2": 0.002, "10.0.0.3": None}, 0.2),
        "10.0.0.2": round_trips.Measured({"10.0.0.1": 0.001}, -30.2),
        "10.0.0.3": Unavailable("node 3 is away"),
    }
    monkeypatch.setattr(round_trips, "measured", lambda: found)
    monkeypatch.setattr(doctor, "cluster_of", lambda arguments: nullcontext())
    assert main(["doctor", "--address", "auto"]) == 0
    said = capsys.readouterr().out
    assert "10.0.0.3 cannot be reached, 10.0.0.2 2.00 ms\n" in said
    assert "clock -30.2 s, 10.0.0.1 1.00 ms\n" in said
    assert "node 3 is away" in said
    assert "108.0 ms in nano, 60.0 ms in mini, 108.0 ms in large" in said
