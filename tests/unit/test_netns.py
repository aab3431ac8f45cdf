"""A shard and its caller on two hosts (network_hosts.py): the same bits over TCP, whatever happens to the cable."""

import contextlib
import time

import pytest
import torch

from actors.dataplane.connection import SILENCE_S, machine_id
from tests.chaos import switch
from tests.unit.network_hosts import (
    CALLER_HOST,
    LAYER,
    SHARD_HOST,
    TOO_SOON_S,
    Failed,
    Hosts,
    Process,
    batch,
    ip,
    namespaces,
    own_pool,
    why_not,
)
from tests.waiting import have_passed


@pytest.fixture(scope="module")
def both():
    if reason := why_not():
        pytest.skip(reason)
    with namespaces() as (one, two), Hosts(one, two) as made:
        yield made


@pytest.fixture
def hosts(both):
    yield both
    both.mend()
    both.shard("release")
    both.shard("gathered")


@pytest.fixture(scope="module")
def plugged():
    """Two other hosts, on a switch."""
    if reason := switch.why_not():
        pytest.skip(reason)
    with switch.switched(f"{SHARD_HOST}/24", f"{CALLER_HOST}/24") as (cable, (one, two)), Hosts(one, two) as made:
        yield made, cable.both(one, two)


@pytest.fixture
def switched(plugged):
    """-> hosts that have yet to connect, and the two ways between them, at which nothing is wrong yet."""
    made, ways = plugged
    made.caller("elsewhere", **made.address)
    for way in ways:
        vars(way).update(vars(switch.Way()))
    yield made, ways
    made.caller("impatient", silence_s=SILENCE_S)


def wanted(seed=0):
    """What one layer's call gives over the transport in process: values, and the gradients left on the experts."""
    pool = own_pool()
    x_TD, ids_TK, weights_TK = batch(seed)
    y_TD = pool.dispatcher()(LAYER, x_TD, ids_TK, weights_TK)
    dx_TD, dweights_TK = torch.autograd.grad(y_TD.square().sum(), [x_TD, weights_TK])
    grads = {name: grad.tolist() for name, grad in pool.transport.shards["shard-0"].gathered.sums().items()}
    return {"y": y_TD.tolist(), "dx": dx_TD.tolist(), "dweights": dweights_TK.tolist()}, grads


def gradients(answer):
    return {name: answer[name] for name in ("dx", "dweights")}


# -- what must hold


def test_another_host_gets_the_bits_of_the_transport_in_process(hosts):
    values, grads = wanted()
    assert hosts.caller("layer") == values
    assert hosts.shard("gathered") == {"num_ops": 1, "grads": grads}
    assert hosts.caller("families") == ["AF_INET"]


def test_namespaces_are_different_machines(hosts):
    """Their processes do not look for one another's Unix sockets, which may lie in other files."""
    machines = {machine_id(), hosts.address["machine"], hosts.caller("machine")}
    assert len(machines) == 3
    mistaken = {"machine": hosts.caller("machine"), "path": "/no/such/folder/socket"}
    hosts.caller("elsewhere", **{**hosts.address, **mistaken})
    with pytest.raises(Failed, match="cannot be reached") as failed:
        hosts.caller("forward", timeout_s=0.5)
    assert failed.value.kind == "Unavailable"
    hosts.caller("elsewhere", **hosts.address)
    assert hosts.caller("layer") == wanted()[0]


def test_a_shard_that_was_not_told_otherwise_is_reached_from_its_own_host_only(hosts):
    quiet = hosts.shard("loopback")
    assert quiet["host"] == "127.0.0.1"
    assert hosts.shard("reach", host=quiet["host"], port=quiet["port"]) == "reached"
    assert hosts.caller("reach", host=SHARD_HOST, port=hosts.address["port"]) == "reached"
    for host in (quiet["host"], SHARD_HOST):
        assert hosts.caller("reach", host=host, port=quiet["port"]) == "ConnectionRefusedError"
        hosts.caller("elsewhere", **{**quiet, "host": host})
        with pytest.raises(Failed, match="cannot be reached") as failed:
            hosts.caller("forward", timeout_s=0.5)
        assert failed.value.kind == "Unavailable"
    hosts.caller("elsewhere", **hosts.address)


def ends_in_time(caller):
    with pytest.raises(Failed) as failed:
        caller.finish()
    assert failed.value.kind in ("DeadlineExceeded", "Unavailable")
    assert failed.value.seconds < TOO_SOON_S + 10, "and not when the kernel gives the connection up"


def test_a_request_that_is_lost_is_sent_again_and_applied_once(hosts):
    """The kernel may still deliver the first one when the cable is mended."""
    values, grads = wanted()
    assert hosts.caller("forward") == values["y"]
    hosts.cut()
    hosts.caller.start("backward", timeout_s=TOO_SOON_S)
    ends_in_time(hosts.caller)
    hosts.mend()
    assert hosts.caller("again") == gradients(values)
    assert hosts.caller("again") == gradients(values)
    assert hosts.shard("gathered") == {"num_ops": 1, "grads": grads}


def test_an_answer_that_is_lost_is_asked_for_again_and_applied_once(hosts):
    values, grads = wanted()
    assert hosts.caller("forward") == values["y"]
    seen = hosts.shard("seen")
    hosts.shard("hold")
    hosts.caller.start("backward", timeout_s=TOO_SOON_S)
    end_s = time.monotonic() + 60
    while hosts.shard("seen") == seen and time.monotonic() < end_s:
        time.sleep(0.02)
    assert hosts.shard("seen") == seen + 1  # the shard has begun
    hosts.cut()
    hosts.shard("release")
    ends_in_time(hosts.caller)
    assert hosts.shard("seen") == seen + 1
    hosts.mend()
    assert hosts.caller("again") == gradients(values)
    assert hosts.shard("gathered") == {"num_ops": 1, "grads": grads}


def test_a_host_that_vanished_is_not_waited_for(hosts):
    """It loses power: no word of it arrives. Its shard is started again elsewhere; the kernel would wait for a quarter of an
    hour, the call's deadline is a minute away."""
    values, _ = wanted()
    assert hosts.caller("forward") == values["y"]
    hosts.caller("impatient")
    again = Process(hosts.caller_at, "shard", host="127.0.0.1")
    try:
        address = again("where")
        hosts.cut()
        hosts.caller.start("moved", **{**address, "machine": "another"})
        assert hosts.caller.finish() == values["y"]
        assert hosts.caller.seconds < 30
    finally:
        again.close()
        hosts.mend()
    hosts.caller("elsewhere", **hosts.address)
    assert hosts.caller("layer") == values


def test_a_host_that_computes_for_long_is_not_silent(hosts):
    """Its kernel says that it is there, for as long as its process says nothing and takes nothing."""
    values, grads = wanted()
    assert hosts.caller("forward") == values["y"]
    seen = hosts.shard("seen")
    hosts.shard("hold")
    hosts.caller("impatient")
    hosts.caller.start("backward", timeout_s=60.0)
    time.sleep(2.5)
    hosts.shard("release")
    assert hosts.caller.finish() == gradients(values)
    assert hosts.shard("gathered") == {"num_ops": 1, "grads": grads}
    assert hosts.shard("seen") == seen + 1, "it was not sent again"


@pytest.mark.parametrize("ways", ["answers", pytest.param("both", marks=pytest.mark.chaos)])
def test_after_a_silent_cut_a_call_goes_on_at_once(switched, ways):
    """TCP would try again 3 s after the mending."""
    hosts, (back, there) = switched
    hosts.caller("impatient")
    assert hosts.caller("forward") == wanted()[0]["y"]
    back.is_cut, there.is_cut = True, ways == "both"
    hosts.caller.start("forward", timeout_s=60.0)
    time.sleep(3.2)
    back.is_cut = there.is_cut = False
    mended_s = time.monotonic()
    assert hosts.caller.finish() == wanted()[0]["y"]
    assert not have_passed(2.8, mended_s)
    assert back.num_dropped > 0


def test_nobody_can_connect_while_the_cable_is_cut(hosts):
    hosts.caller("elsewhere", **hosts.address)
    hosts.cut()
    hosts.caller.start("forward", timeout_s=TOO_SOON_S)
    ends_in_time(hosts.caller)
    hosts.mend()
    assert hosts.caller("layer") == wanted()[0]


@pytest.mark.parametrize(
    "shape",
    [
        {"delay_s": 0.003, "jitter_s": 0.004, "loss": 0.02},
        {"bytes_per_s": 12.5e6, "queue_s": 0.001},  # 100 Mbit; what does not fit the queue is dropped
    ],
    ids=["late-lost-reordered", "narrow-and-dropping"],
)
def test_a_bad_cable_changes_no_answer(switched, shape):
    hosts, ways = switched
    for way in ways:
        vars(way).update(shape)
    assert hosts.caller("many", num=100) == [100, 100]
    assert sum(way.num_dropped for way in ways) > 0


def test_a_cable_that_comes_and_goes_changes_no_answer(hosts):
    hosts.caller.start("many", num=1, seconds=1.5)
    for _ in range(3):
        hosts.cut()
        time.sleep(0.1)
        hosts.mend()
        time.sleep(0.2)
    num, num_right = hosts.caller.finish()
    assert num == num_right > 1


def test_no_namespace_is_left_behind_when_a_test_fails():
    if reason := why_not():
        pytest.skip(reason)
    names = []
    with contextlib.suppress(ZeroDivisionError), namespaces() as made:
        names += made
        assert set(names) <= existing()
        raise ZeroDivisionError
    assert names
    assert not set(names) & existing()


def existing():
    return {line.split()[0] for line in ip("netns", "list").stdout.splitlines()}
