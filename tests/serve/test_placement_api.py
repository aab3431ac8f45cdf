"""trinity.v1.Placement and what else operators get: keys, snapshots, commands, metrics, a service that goes away."""

import asyncio
import logging
import threading
import time
from dataclasses import replace

import grpc
import httpx
import pytest
from operated import FakeOperator, bearer, metrics_of, moved, snapshot_of

from protos.trinity.v1 import placement_pb2 as pb
from protos.trinity.v1 import placement_pb2_grpc as rpc
from serving import pool_operator
from serving.access import check_access
from serving.grpc.operator_client import connect, to_snapshot
from serving.pool_operator import Placement
from tests.waiting import WAIT_S, eventually
from trinity.config import Config, ServeConfig
from trinity.errors import ConfigError, Unauthenticated

API, ADMIN = "clients-key", "operators-key"
CALLS = {
    "GetPlacement": pb.GetPlacementRequest(),
    "WatchPlacement": pb.WatchPlacementRequest(),
    "Scale": pb.ScaleRequest(num_shards=4, reason="more users"),
    "Replicate": pb.ReplicateRequest(layer=3, expert=7, num_replicas=2),
    "Drain": pb.DrainRequest(shard="shard-1"),
    "Rebalance": pb.RebalanceRequest(),
}


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
async def stub(operated):
    async with grpc.aio.insecure_channel(operated.grpc_address) as channel:
        yield rpc.PlacementStub(channel)


async def status_of(stub, name, request=None, **options):
    """The status of a call, after its first message."""
    call = getattr(stub, name)(request or CALLS[name], timeout=WAIT_S, **options)
    try:
        await (call.read() if hasattr(call, "read") else call)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def end_of(call):
    """The error that a stream ends with."""
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(call)
    return caught.value


async def read_all(call):
    while await call.read() is not grpc.aio.EOF:
        pass


# --- keys ---


@pytest.mark.parametrize(
    ("keys", "opened_by"),
    [
        ({}, {None, API, ADMIN}),  # loopback only: whoever is on this machine
        ({"api_key": API}, set()),
        ({"admin_key": ADMIN}, {ADMIN}),
        ({"api_key": API, "admin_key": ADMIN}, {ADMIN}),
    ],
)
async def test_who_may_see_and_move_experts(start, pool, keys, opened_by):
    async with start(operator=pool, **keys) as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        await eventually(lambda: pool.num_waits)
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            stub = rpc.PlacementStub(channel)
            for sent in (None, API, ADMIN):
                answer = await http.get("/dashboard/data", headers=bearer(sent))
                assert answer.status_code == (200 if sent in opened_by else 401), sent
                for name in CALLS:
                    found = await status_of(stub, name, metadata=tuple(bearer(sent).items()))
                    assert found == ("OK" if sent in opened_by else "UNAUTHENTICATED"), (sent, name)
    assert bool(pool.asked) == bool(opened_by)


async def test_the_clients_routes_take_either_key_and_only_where_they_need_one(start):
    for keys, opened_by in ({"api_key": API, "admin_key": ADMIN}, {API, ADMIN}), ({"admin_key": ADMIN}, {None, API}):
        async with start(**keys) as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
            for sent in (None, API, ADMIN, ADMIN + "x"):
                status = (await http.get("/v1/models", headers=bearer(sent))).status_code
                assert (status == 200) == (sent in opened_by or None in opened_by), (keys, sent)


def test_calls_declares_every_rpc():
    assert set(CALLS) == {method.name for method in pb.DESCRIPTOR.services_by_name["Placement"].methods}


async def test_a_refusal_says_what_to_do(start, pool):
    for keys, advice in ({"api_key": API}, "TRINITY_ADMIN_KEY"), ({"admin_key": ADMIN}, "send the server's admin key"):
        async with (
            start(operator=pool, **keys) as server,
            httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
        ):
            answer = await http.get("/dashboard/data", headers=bearer(API))
            assert advice in answer.json()["error"]["message"]
            assert answer.headers["www-authenticate"] == "Bearer"


def test_a_host_that_others_reach_needs_the_admin_key_too():
    with pytest.raises(Unauthenticated, match="TRINITY_ADMIN_KEY"):
        check_access("admin", f"Bearer {API}", ServeConfig(host="0.0.0.0", allow_remote=True, api_key=API))


def test_the_admin_key_comes_from_the_environment_and_is_not_shown(monkeypatch):
    monkeypatch.setenv("TRINITY_ADMIN_KEY", ADMIN)
    config = Config.from_tree({"model": "tiny"})
    assert config.serve.admin_key == ADMIN
    assert ADMIN not in repr(config)
    with pytest.raises(ConfigError, match="choose two") as caught:
        Config.from_tree({"model": "tiny", "serve": {"api_key": ADMIN}})
    assert ADMIN not in str(caught.value)
    with pytest.raises(ConfigError, match="admin_key"):
        Config.from_tree({"model": "tiny", "serve": {"admin_key": ""}})


def test_dry_runs_do_not_print_the_admin_key(monkeypatch, capsys):
    from trinity.cli import main

    monkeypatch.setenv("TRINITY_ADMIN_KEY", ADMIN)
    assert main(["train", "tiny", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert ADMIN not in out
    assert "admin_key: (set)" in out


async def test_what_is_asked_is_logged_and_the_key_is_not(start, pool, caplog):
    caplog.set_level(logging.INFO)
    async with (
        start(operator=pool, admin_key=ADMIN) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        await status_of(rpc.PlacementStub(channel), "Scale", metadata=tuple(bearer(ADMIN).items()))
    assert "scale to 4 shards: more users" in caplog.text
    assert ADMIN not in caplog.text


# --- snapshots ---


def rounded(snapshot):
    """Loads as the wire has them, in 32 bits."""
    return replace(snapshot, load_LE=tuple(tuple(float(f"{x:.5g}") for x in row) for row in snapshot.load_LE))


async def test_get_placement_says_all_that_the_service_said(stub, pool):
    pool.show(snapshot_of(num_layers=5, num_experts=13, num_shards=4))
    answer = await stub.GetPlacement(pb.GetPlacementRequest())
    assert rounded(to_snapshot(answer.snapshot)) == rounded(pool.snapshot())


async def test_a_watcher_sees_the_state_at_once_and_each_epoch_as_it_comes(stub, pool):
    call = stub.WatchPlacement(pb.WatchPlacementRequest(every_s=60))
    assert (await call.read()).snapshot.epoch == 4
    for epoch in (5, 6):
        pool.show(moved(pool.snapshot(), expert=epoch))
        async with asyncio.timeout(30):  # half of every_s
            found = (await call.read()).snapshot
        assert (found.epoch, found.changes[0].reason) == (epoch, "scale")


async def test_a_watcher_sees_new_loads_between_epochs(stub, pool):
    started = time.perf_counter()
    call = stub.WatchPlacement(pb.WatchPlacementRequest(every_s=1))
    await call.read()
    pool.show(replace(pool.snapshot(), imbalance=7.5))
    async with asyncio.timeout(WAIT_S):
        assert (await call.read()).snapshot.imbalance == 7.5
    assert time.perf_counter() - started > 0.8


async def test_many_watchers_cost_the_service_one_call_a_period(stub, pool):
    calls = [stub.WatchPlacement(pb.WatchPlacementRequest()) for _ in range(20)]
    await asyncio.gather(*(call.read() for call in calls))
    before, started = pool.num_waits, time.perf_counter()
    await eventually(lambda: pool.num_waits >= before + 4)
    num_periods = (time.perf_counter() - started) / pool_operator.PERIOD_S
    assert pool.num_waits - before <= num_periods + 2


async def test_watchers_end_when_the_service_goes_and_may_come_back_with_it(stub, operated, pool):
    call = stub.WatchPlacement(pb.WatchPlacementRequest())
    await call.read()
    pool.down = True
    error = await end_of(call)
    assert (error.code().name, error.details()) == ("UNAVAILABLE", "the placement service is restarting")
    assert await status_of(stub, "GetPlacement") == await status_of(stub, "WatchPlacement") == "UNAVAILABLE"
    assert (await metrics_of(operated))["trinity_placement_up",] == 0
    pool.down = False
    pool.show(moved(pool.snapshot()))
    await eventually(lambda: operated.front.placement.latest()[0].table.epoch == 5)
    assert (await stub.WatchPlacement(pb.WatchPlacementRequest()).read()).snapshot.epoch == 5


async def test_watchers_end_when_the_server_stops(start, pool):
    """They are no requests that draining waits for."""
    async with (
        start(operator=pool, drain_timeout_s=600) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
        asyncio.timeout(WAIT_S),
    ):
        call = rpc.PlacementStub(channel).WatchPlacement(pb.WatchPlacementRequest())
        await call.read()
        await server.gateway.stop()
        assert (await end_of(call)).code().name == "UNAVAILABLE"


async def test_a_watcher_that_leaves_is_let_go(operated, stub):
    call = stub.WatchPlacement(pb.WatchPlacementRequest())
    await call.read()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.read()
    assert await status_of(stub, "GetPlacement") == "OK"


# --- commands ---


async def test_each_command_reaches_the_service(stub, pool):
    answers = [await getattr(stub, name)(CALLS[name]) for name in ("Scale", "Replicate", "Drain", "Rebalance")]
    assert [answer.epoch for answer in answers] == [4] * 4
    assert pool.asked == [("scale", 4, "more users"), ("replicate", 3, 7, 2), ("drain", "shard-1"), ("rebalance",)]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("Scale", pb.ScaleRequest()),
        ("Scale", pb.ScaleRequest(num_shards=2, reason="x" * 201)),
        ("Scale", pb.ScaleRequest(num_shards=2, reason="two\nlines")),
        ("Replicate", pb.ReplicateRequest(layer=3, expert=1)),
        ("Replicate", pb.ReplicateRequest(layer=99, expert=1, num_replicas=1)),  # what the service itself refuses
        ("Drain", pb.DrainRequest()),
        ("WatchPlacement", pb.WatchPlacementRequest(every_s=0.01)),
        ("WatchPlacement", pb.WatchPlacementRequest(every_s=float("nan"))),
    ],
)
async def test_wrong_commands_are_refused(stub, pool, name, wrong):
    assert await status_of(stub, name, wrong) == "INVALID_ARGUMENT"
    assert not pool.asked


async def test_a_server_without_a_pool_says_so(server):
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        assert {await status_of(rpc.PlacementStub(channel), name) for name in CALLS} == {"UNIMPLEMENTED"}
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        answer = await http.get("/dashboard/data")
        assert (answer.status_code, "no pool" in answer.json()["error"]["message"]) == (404, True)
        assert "trinity_placement" not in (await http.get("/metrics")).text


class Stuck(FakeOperator):
    """Hangs until it is let go, as calls into a cluster whose head is gone do."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def snapshot(self):
        self.go.wait(600)
        return super().snapshot()


async def read_one(stub):
    return await status_of(stub, "GetPlacement")


async def test_a_stuck_service_keeps_nobody_else_waiting(start, monkeypatch):
    monkeypatch.setattr("serving.pool_operator.ANSWER_S", 600)
    pool = Stuck()
    async with start(operator=pool) as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        try:
            async with grpc.aio.insecure_channel(server.grpc_address) as channel:
                stub, seen = rpc.PlacementStub(channel), server.front.placement
                with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
                    await stub.GetPlacement(pb.GetPlacementRequest(), timeout=1)
                await eventually(lambda: seen._waiting == 1)  # the loop that follows the service; the call was let go
                stuck = [asyncio.ensure_future(read_one(stub)) for _ in range(60)]
                await eventually(lambda: sum(call.done() for call in stuck) == 60 + 1 - pool_operator.MAX_WAITING)
                assert {call.result() for call in stuck if call.done()} == {"RESOURCE_EXHAUSTED"}
                text = "the lazy dog " * 400  # long enough to be tokenised in a thread
                assert (await http.post("/tokenize", json={"prompt": text})).status_code == 200
                assert (await http.get("/dashboard/data")).status_code == 503
                pool.go.set()
                await eventually(lambda: pool.num_waits)
                assert set(await asyncio.gather(*stuck)) == {"RESOURCE_EXHAUSTED", "OK"}
                assert await status_of(stub, "GetPlacement") == "OK"
        finally:
            pool.go.set()


async def test_a_pool_that_is_not_there_yet_is_found_later(pool):
    """The gateway may start before the placement service does."""
    tries = []

    def late():
        tries.append(1)
        if len(tries) < 3:
            raise RuntimeError("no such actor at /secret/path")
        return pool

    seen = []
    placement = Placement(late, seen.append)
    placement.start()
    await eventually(lambda: pool.num_waits)
    assert seen[:2] == [None, None]
    assert placement.latest()[0] is pool.snapshot()
    placement.stop()


# --- the same operator, far away ---


async def test_the_command_line_operates_a_server_like_a_cluster(start, pool, monkeypatch):
    monkeypatch.setenv("TRINITY_ADMIN_KEY", ADMIN)

    def operate(address):
        with connect(address) as operator:
            assert rounded(operator.snapshot()) == rounded(pool.snapshot())
            epochs = [
                operator.scale(5, "cli"),
                operator.replicate(2, 1, 2),
                operator.drain("shard-0"),
                operator.rebalance(),
            ]
            assert epochs == [4] * 4
            started = time.perf_counter()
            assert operator.wait(4, 0.5).table.epoch == 4
            assert time.perf_counter() - started > 0.4
            pool.show(moved(pool.snapshot()))
            assert operator.wait(4, WAIT_S).table.epoch == 5
        with connect(address, "wrong") as operator, pytest.raises(Unauthenticated, match="admin key"):
            operator.rebalance()

    async with start(operator=pool, admin_key=ADMIN) as server:
        await asyncio.to_thread(operate, server.grpc_address)
    assert len(pool.asked) == 4


# --- metrics ---


async def test_healthz_says_success_until_the_server_drains(server, http):
    answer = await http.get("/-/healthz")
    assert (answer.status_code, answer.text) == (200, "success")
    server.front.admission.draining = True
    assert (await http.get("/-/healthz")).status_code == 503


@pytest.mark.parametrize("path", ["/health", "/ready", "/-/healthz", "/", "/dashboard", "/v1/models", "/metrics"])
async def test_head_is_get_without_its_body(server, http, path):
    head, get = await http.head(path), await http.get(path)
    assert head.status_code == get.status_code == 200
    assert (head.content, head.headers["content-type"]) == (b"", get.headers["content-type"])
    if path != "/metrics":  # which has grown by then
        assert head.headers["content-length"] == str(len(get.content))
