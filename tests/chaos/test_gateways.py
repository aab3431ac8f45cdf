"""F23: gateways die under streams, and nobody else's notice; with `every_node` they follow the nodes of a cluster.

`pytest -s -m chaos tests/chaos/test_gateways.py`; a smoke of the first with a few streams is in tests/serve/test_app.py.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.chaos.served import serving
from tests.chaos.test_engines import Killer, counted, stream
from tests.serve.balancer import INTERVAL_S, Balancer
from tests.serve.processes import gateway_pids
from tests.sockets import free_ports, listening
from tests.waiting import WAIT_S

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
NUM, KILLS = 100, int(os.environ.get("TRINITY_CHAOS_KILLS", "4"))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def served(ray_session, tmp_path_factory):
    ports = dict(zip(("http_port", "grpc_port"), free_ports(2), strict=True))
    with serving(tmp_path_factory.mktemp("f23"), {**ports, "gateways": 2}) as server:
        yield server


def pid_of(url):
    """The gateway that listens there."""
    port = int(url.rpartition(":")[2])
    return next(pid for pid in gateway_pids() if ("127.0.0.1", port) in listening(pid))


def joined(events):
    """What one choice says, however it is cut into events."""
    choices = [choice for [choice] in events]
    calls = [call for each in choices for call in each.get("delta", {}).get("tool_calls", ())]
    return {
        "text": "".join(each.get("text") or each.get("delta", {}).get("content") or "" for each in choices),
        "token_ids": [i for each in choices for i in each.get("token_ids") or ()],
        "logprobs": [p for each in choices if each.get("logprobs") for p in each["logprobs"]["token_logprobs"]],
        "calls": "".join(str(call["function"].get("name") or "") + call["function"]["arguments"] for call in calls),
        "end": choices[-1]["finish_reason"],
    }


async def asked(http, number, nobody):
    """-> what a stream said and how often it broke and was asked anew."""
    for again in range(20):
        try:
            said, _ = await stream(http, number, nobody)
            [usage] = said.pop("usage")  # what of a prompt was cached differs
            return {key: joined(events) for key, events in said.items()} | {"num": usage["completion_tokens"]}, again
        except httpx.TransportError:
            pass
    raise AssertionError("no gateway serves it")


async def killed(server, balancer, http, undisturbed, url):
    """Kill the gateway at `url` in the middle of all streams; -> how many broke."""
    nobody = Killer(0, 0)
    async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as direct:
        began = await counted(direct, "trinity_generated_tokens_total")
        streams = [asyncio.create_task(asked(http, number, nobody)) for number in range(NUM)]
        while await counted(direct, "trinity_generated_tokens_total") < began + 1000:
            await asyncio.sleep(0.02)
    os.kill(pid_of(url), signal.SIGKILL)
    await balancer.notices(url, False)
    clock = asyncio.get_running_loop().time
    noticed_s = clock()
    new, again = await asked(http, 0, nobody)
    assert (new, again) == (undisturbed[0], 0), "what comes after a check has noticed goes to the other"
    found = await asyncio.gather(*streams)
    assert [said for said, _ in found] == undisturbed
    await balancer.notices(url, True)
    return sum(again > 0 for _, again in found), clock() - noticed_s


async def test_f23_100_streams_of_two_gateways_outlive_their_deaths(served):
    urls, drawn, broke = [door.http_url for door in served.doors], random.Random(0), []
    async with (
        Balancer(urls) as balancer,
        httpx.AsyncClient(
            base_url=balancer.url, timeout=600, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        ) as http,
    ):
        found = await asyncio.gather(*(asked(http, number, Killer(0, 0)) for number in range(NUM)))
        undisturbed = [said for said, again in found if not again]
        assert len(undisturbed) == NUM
        for _ in range(KILLS):
            broke.append(await killed(served, balancer, http, undisturbed, drawn.choice(urls)))
            assert 0 < broke[-1][0] <= NUM / 2
    print(f"\n{NUM} streams at a time, {KILLS} gateways killed: {[num for num, _ in broke]} broke and were asked anew, none of "
          f"the other's; back there after {[round(s, 1) for _, s in broke]} s; a check every {INTERVAL_S} s")  # fmt: skip


def test_gateways_follow_the_nodes_of_a_cluster(tmp_path):
    """In a process of its own, which has a cluster of its own."""
    (tmp_path / "fake-model").mkdir()
    words = [sys.executable, ROOT / "tests/chaos/gateways_driver.py", tmp_path / "fake-model", *map(str, free_ports(5))]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"what"')]
    assert [(each["what"], len(each["urls"])) for each in told] == [
        ("two nodes", 2),
        ("a third came", 3),
        ("one died", 2),
        ("one is drained", 1),
        ("another came", 2),
    ]
