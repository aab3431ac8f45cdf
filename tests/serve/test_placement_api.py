"""trinity.v1.Placement and what else operators get: keys, snapshots, commands, metrics, a service that goes away."""

import asyncio
import logging
import threading
import time
from dataclasses import replace

import grpc
import httpx
import pytest
from operated import FakeOperator, moved, snapshot_of
from prometheus_client.parser import text_string_to_metric_families

from protos.trinity.v1 import placement_pb2 as pb
from protos.trinity.v1 import placement_pb2_grpc as rpc
from serving import pool_operator
from serving.access import check_access
from serving.grpc.operator_client import connect, to_snapshot
from serving.metrics import Exporter
from serving.pool_operator import Placement
from tests.waiting import WAIT_S, eventually
from trinity.config import Config, ServeConfig
from trinity.errors import ConfigError, Unauthenticated
from trinity.observability.prometheus import DISPATCH_S

API, ADMIN = "clients-key", "operators-key"
CALLS = {
    "GetPlacement": pb.GetPlacementRequest(),
    "WatchPlacement": pb.WatchPlacementRequest(),
    "Scale": pb.ScaleRequest(num_shards=4, reason="more users"),
    "Replicate": pb.ReplicateRequest(layer=3, expert=7, num_replicas=2),
    "Drain": pb.DrainRequest(shard="shard-1"),
    "Rebalance": pb.RebalanceRequest(),
}


def bearer(key):
    return {"authorization": f"Bearer {key}"} if key else {}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("serving.pool_operator.PERIOD_S", 0.1)


@pytest.fixture
def pool():
    return FakeOperator()


@pytest.fixture
async def operated(start, pool):
    async with start(operator=pool) as server:
        yield server


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


async def metrics_of(server, key=None):
    """{(sample name, *label values): value}"""
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        text = (await http.get("/metrics", headers=bearer(key))).text
    families = text_string_to_metric_families(text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


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


async def test_metrics_are_the_snapshots(operated, pool):
    shown = pool.snapshot()
    await eventually(lambda: pool.num_waits)
    found = await metrics_of(operated)
    assert found["trinity_placement_up",] == 1
    assert found["trinity_placement_epoch",] == 4
    assert found["trinity_placement_imbalance",] == pytest.approx(shown.imbalance)
    assert found["trinity_placement_replicas",] == shown.table.num_replicas_LE.sum() > 96
    assert found["trinity_placement_max_replicas",] == 2
    assert [found["trinity_placement_shards", s] for s in ("starting", "ready", "draining", "away")] == [0, 3, 0, 0]
    for shard in shown.shards:
        assert found["trinity_shard_rows_per_second", shard.name] == pytest.approx(shard.rows_per_s)
        assert found["trinity_shard_weight_bytes", shard.name] == shard.weight_bytes
    assert found["trinity_placement_change_seconds",] == 0.31
    assert found["trinity_placement_recoveries_total",] == 1


async def test_each_change_is_counted_once_when_it_has_ended(operated, pool):
    await eventually(lambda: pool.num_waits)
    before = pool.snapshot()
    after = moved(before)
    running = replace(after, changes=(replace(after.changes[0], phase="drain", seconds=0.1), *before.changes))
    lost = replace(after.changes[0], epoch=6, started_s=before.time_s + 5, phase="rolled back", copied_bytes=10)
    for shown in (running, after, after, replace(after, changes=(lost, *after.changes), num_recoveries=3)):
        pool.show(shown)
        await eventually(lambda: operated.front.placement.latest()[0] is shown)  # noqa: B023
    found = await metrics_of(operated)
    assert found["trinity_placement_changes_total", "done"] == 1
    assert found["trinity_placement_changes_total", "rolled_back"] == 1
    assert found["trinity_placement_copies_total",] == 2
    assert found["trinity_placement_copied_bytes_total",] == (25 << 20) + 10
    assert found["trinity_placement_recoveries_total",] == 3


async def test_shards_that_have_gone_leave_the_metrics(operated, pool):
    await eventually(lambda: pool.num_waits)
    pool.show(snapshot_of(num_shards=2, epoch=5))
    await eventually(lambda: operated.front.placement.latest()[0].table.epoch == 5)
    found = await metrics_of(operated)
    assert {key[1] for key in found if key[0] == "trinity_shard_rows_per_second"} == {"shard-0", "shard-1"}


def dispatch(scale=1):
    """As an engine counts: 3 rows in the second bucket, 1 beyond the last, in all phases that it has timed."""
    counts = [0, 3, *[0] * (len(DISPATCH_S) - 2), 1]
    return {phase: ([scale * count for count in counts], scale * 9.5) for phase in ("route", "wait")}


def test_dispatch_seconds_add_up_over_engines_and_restarts():
    exporter = Exporter()
    exporter.engine("a", 1, {})
    assert b'phase="' not in exporter.render()[0]
    for engine, scale in (("a", 1), ("a", 2), ("b", 1), ("a", 2)):
        exporter.engine(engine, 1, {"dispatch_seconds": dispatch(scale), "num_dispatch_retries": scale})
    families = text_string_to_metric_families(exporter.render()[0].decode())
    found = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    for phase in ("route", "wait"):
        assert found["trinity_dispatch_seconds_bucket", "0.0001", phase] == 0
        assert found["trinity_dispatch_seconds_bucket", "5.0", phase] == 9
        assert found["trinity_dispatch_seconds_bucket", "+Inf", phase] == 12
        assert found["trinity_dispatch_seconds_count", phase] == 12
        assert found["trinity_dispatch_seconds_sum", phase] == 3 * 9.5
    assert found["trinity_dispatch_retries_total",] == 3


# --- health ---


async def test_healthz_says_success_until_the_server_drains(server, http):
    answer = await http.get("/-/healthz")
    assert (answer.status_code, answer.text) == (200, "success")
    server.front.admission.draining = True
    assert (await http.get("/-/healthz")).status_code == 503


@pytest.mark.parametrize("path", ["/health", "/ready", "/-/healthz", "/dashboard", "/v1/models", "/metrics"])
async def test_head_is_get_without_its_body(server, http, path):
    head, get = await http.head(path), await http.get(path)
    assert head.status_code == get.status_code == 200
    assert (head.content, head.headers["content-type"]) == (b"", get.headers["content-type"])
    if path != "/metrics":  # which has grown by then
        assert head.headers["content-length"] == str(len(get.content))
