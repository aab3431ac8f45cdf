"""A shard and its caller on two hosts of their own (tests/chaos/hosts.py): cut off, without power, at another time of day."""

import time

import pytest

from tests.chaos import hosts as machines
from tests.chaos.hosts import cut
from tests.unit.network_hosts import Process
from tests.unit.test_netns import wanted
from tests.waiting import until


@pytest.fixture(scope="module")
def hosts():
    if reason := machines.why_not():
        pytest.skip(reason)
    with machines.hosts("shard", "caller") as made:
        yield made


@pytest.fixture(scope="module")
def shard(hosts):
    return Process(hosts["shard"], "shard", host=hosts["shard"].address)


@pytest.fixture(scope="module")
def caller(hosts, shard):
    return Process(hosts["caller"], "caller", **shard("where"))


def test_a_host_has_processes_files_and_memory_of_its_own(hosts):
    host = hosts["shard"]
    assert host.run("hostname").strip() == host.name
    assert host.run("sh", "-c", "echo $$").strip() != str(host.start("true").pid)
    host.run("sh", "-c", "echo 1 > /tmp/ray/own; echo 1 > /dev/shm/own")
    assert hosts["caller"].run("sh", "-c", "ls /tmp/ray /dev/shm").split() == ["/dev/shm:", "/tmp/ray:", "tmp"]


@pytest.mark.parametrize("ways", ["ways", "ways_from"])
def test_a_cut_is_silent_and_the_same_bits_come_after_it(hosts, caller, ways):
    """One way: what the shard says is lost, what it hears is not."""
    assert caller("layer") == wanted()[0]
    found = getattr(hosts, ways)("shard")
    before = sum(way.num_dropped for way in found)
    with cut(found):
        caller.start("forward")
        until(lambda: sum(way.num_dropped for way in found) > before, 20)
    assert caller.finish() == wanted()[0]["y"]


def test_clocks_jump_both_ways_and_nobody_minds(hosts, caller):
    if not hosts.can_shift_clocks:
        pytest.skip("no C compiler here to make a clock with")
    caller.start("many", num=60)
    for ahead_s in (3600, -3600):
        hosts["caller"].set_clock(ahead_s)
        hosts["shard"].set_clock(-ahead_s)
        far_s = float(hosts["caller"].run("date", "+%s")) - time.time()
        assert abs(far_s - ahead_s) < 60
    assert caller.finish() == [60, 60]


def test_power_is_lost_and_back_at_another_address(hosts, caller):
    """The connection that the caller has is never closed. What was in memory is gone, what was on the disk is not."""
    host = hosts["shard"]
    caller("impatient")
    host.run("sh", "-c", "echo 1 > /tmp/ray/kept; echo 1 > /dev/shm/lost")
    host.power_off()
    assert not host.is_on
    host.power_on(hosts.new_address())
    again = Process(host, "shard", host=host.address)
    assert caller("moved", **again("where")) == wanted()[0]["y"]
    host.run("sh", "-c", "test -e /tmp/ray/kept && ! test -e /dev/shm/lost")
    again.close()
    caller.close()
