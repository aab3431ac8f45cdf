"""Which running application a command may take over: what is compared, and what is decided in each of its states."""

import json
import signal
from types import SimpleNamespace

import pytest

from serving import adoption
from serving.addresses import Door
from serving.app import About, settings_of
from trinity.cli import main
from trinity.commands.serve import wait_for_signal
from trinity.config import Config, differences
from trinity.errors import ConfigError, Unavailable

BASE = {"model": "tiny", "placement": {"ready_timeout_s": 0.01}, "serve": {"clients": {"search": {"key": "found-out"}}}}
CONFIG = Config.from_tree(BASE)


def differing(**sections):
    mine = settings_of(CONFIG.replace(**sections), "/models/one")
    return differences(json.loads(settings_of(CONFIG, "/models/one")), json.loads(mine))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({}, []),
        ({"engine": {"max_num_seqs": 7}}, ["engine.max_num_seqs is 64, not 7"]),
        ({"model": {"dtype": "bfloat16"}}, ["model.dtype is 'float32', not 'bfloat16'"]),
        (
            {"serve": {"http_port": 1}, "engine": {"replicas": 2}},
            ["engine.replicas is 1, not 2", "serve.http_port is 8000, not 1"],
        ),
        ({"serve": {"api_key": "a"}}, ["serve.api_key is another"]),
        ({"serve": {"clients": {"search": {"key": "hidden"}}}}, ["serve.clients.search.key is another"]),
        ({"serve": {"clients": {"batch": {"key": "hidden"}}}}, ["serve.clients.batch is another"]),
        ({"placement": {"pool": "mine", "num_shards": 4}}, ["placement.pool is 'default', not 'mine'"]),
        ({"placement": {"keep": True}}, ["placement.keep is False, not True"]),
        ({"train": {"steps": 1}, "cluster": {"address": "auto"}}, []),
    ],
)
def test_settings_that_matter_are_compared_and_keys_not_shown(sections, told):
    assert differing(**sections) == told


def test_a_value_that_one_side_lacks_differs():
    assert differences({"a": {"b": 1}}, {"a": {"c": 1}}) == ["a.b is 1, not None", "a.c is None, not 1"]
    assert differences({"a": None}, {"a": {"key": "hidden"}}) == ["a is another"]


class Gateway:
    """What a handle answers; `calls` are those that change something."""

    def __init__(self, differs=()):
        self.differs, self.calls = list(differs), []

    def broadcast(self, method):
        self.calls.append(method)
        return SimpleNamespace(results=lambda timeout_s, return_exceptions: [None])

    def __getattr__(self, method):
        def remote(*arguments):
            self.calls.append(method)
            return SimpleNamespace(result=lambda timeout_s: self.differs)

        return SimpleNamespace(remote=remote)


def found(monkeypatch, status, state=None, differs=()):
    """One application in that status, whose gateway says that state."""
    gateway, deleted = Gateway(differs), []
    doors = [Door(f"http://here:{at}", f"here:{at + 1}", "here") for at in (1, 3)]
    states = [state] if isinstance(state, str) else state or []
    said = [About("/models/one", "one", door, "trinity", 30.0, each) for door, each in zip(doors, states, strict=False)]
    there = SimpleNamespace(status=adoption.ApplicationStatus(status), last_deployed_time_s=0.0)
    monkeypatch.setattr(adoption, "overview", lambda: None if deleted else there)
    monkeypatch.setattr(adoption, "_asked", lambda: (gateway, said))
    monkeypatch.setattr(adoption.pools, "exists", lambda *_: False)
    for module in ("adoption", "app"):
        monkeypatch.setattr(f"serving.{module}.remove", deleted.append)
    return gateway, deleted


@pytest.mark.parametrize("states", [("ready",), ("ready", "draining"), ("without an engine", "ready")])
def test_the_same_is_taken_over(monkeypatch, states):
    """One of its gateways may be about to end, with its node."""
    gateway, deleted = found(monkeypatch, "RUNNING", states)
    server = adoption.adopted(CONFIG, "/models/one")
    assert (server.http_url, server.grpc_address, server.gateway) == ("http://here:1", "here:2", gateway)
    assert len(server.doors) == len(states)
    assert not deleted


@pytest.mark.parametrize(
    ("status", "state", "calls"),
    [
        ("DEPLOY_FAILED", None, []),
        ("DEPLOY_FAILED", "ready", ["stop"]),
        ("RUNNING", "draining", ["stop"]),
        ("RUNNING", ("draining", "draining"), ["stop"]),
    ],
)
def test_what_failed_or_was_half_ended_is_ended(monkeypatch, status, state, calls):
    gateway, deleted = found(monkeypatch, status, state, ["all"])
    assert adoption.adopted(CONFIG, "/models/one") is None
    assert (gateway.calls, deleted) == (calls, ["trinity"])


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        ("DEPLOYING", None, "DEPLOYING, and its gateway does not answer; wait longer"),
        ("UNHEALTHY", None, "its gateway does not answer"),
        ("DELETING", "ready", "wait longer"),
        ("UNHEALTHY", "without an engine", "is without an engine; `trinity serve stop` ends it"),
    ],
)
def test_what_is_not_ready_in_time_is_left_with_the_reason(monkeypatch, status, state, reason):
    _, deleted = found(monkeypatch, status, state)
    with pytest.raises(Unavailable, match=reason):
        adoption.adopted(CONFIG, "/models/one")
    assert not deleted


def test_another_is_refused_with_the_first_differences(monkeypatch):
    found(monkeypatch, "RUNNING", "without an engine", [f"engine.x{i} is 1, not 2" for i in range(5)])
    with pytest.raises(
        ConfigError, match=r"x0 is 1, not 2, .*x2 is 1, not 2 and 2 more; adopt it with those that it has"
    ):
        adoption.adopted(CONFIG, "/models/one")


def test_the_end_by_another_is_noticed(monkeypatch):
    monkeypatch.setattr("trinity.commands.serve.LOOK_S", 0.01)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert not wait_for_signal(lambda: True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("arguments", [["serve", "stop", "--cluster.address", "local"]])
def test_a_private_ray_has_nothing_to_end(arguments, capsys):
    assert main(arguments) == 2
    assert "none to adopt or to stop; give --cluster.address auto" in capsys.readouterr().err


def test_stop_takes_a_clusters_settings(capsys):
    assert main(["serve", "stop", "--dry-run"]) == 0
    assert "address: auto" in capsys.readouterr().out
    assert main(["serve", "stop", "clusters/settings.yaml", "--dry-run", "--cluster.address", "10.0.0.1:6379"]) == 0
    assert "address: 10.0.0.1:6379" in capsys.readouterr().out
