"""`trinity bench dispatch`: a row's way to an expert and back, against a raw socket and against a Ray call.

Legend: T tokens, D model, K top-k.
A call is all that a caller does for one MoE layer: route, frame, wire there and back, combine. Its shard is in another
process and echoes the rows, so that nothing is computed; one row of the table has real experts in the same place.
Decisions: all paths take short turns in one run, and a ratio is the median of the turns' ratios of medians; p99 is over
all calls of a path; every path's answer is checked before it is timed.
"""

import argparse
import os
import secrets
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trinity.bench.report import Curve, Report, Table, percentile, ratio

if TYPE_CHECKING:
    from actors.dataplane.connection import Address
    from trinity.bench.process import Child
    from trinity.dispatch.transport import Transport

DIM, ROWS = 512, 16  # 32 KB of fp32
CURVE_DIM = 256  # so that one row is 1 KB
RAW, DIRECT, TWO, EXPERTS, RAY = "raw socket", "direct", "direct, 2 shards", "direct, experts compute", "Ray call"
SOCKETS, TWO_SOCKETS = "direct, over sockets", "direct, 2 shards, over sockets"  # as where there is no extension
RAW_TCP, TCP, TWO_TCP = "raw TCP", "frames in C++ over TCP", "frames in C++ over TCP, 2 shards"
PYTHON_TCP, TWO_PYTHON_TCP = "frames in Python over TCP", "frames in Python over TCP, 2 shards"
FREE, ONE_CORE, TWO_CORES = "as they are scheduled", "all on one core", "the caller on one core, all else on another"
LOCAL, WIRE = "route and combine alone", "frame and wire alone"
Calls = Mapping[str, Callable[[], Any]]
Blocks = dict[str, list[list[float]]]  # by path: the microseconds of each call, turn by turn


@dataclass(frozen=True)
class Schedule:
    """Extent of the measurements."""

    turns: int
    calls: int  # of each path in a turn
    kib: tuple[int, ...]
    counts: tuple[int, ...]  # of shards, and of callers
    seconds: float  # for which callers call


MANY = 8  # callers, that are held to a rate
FULL = Schedule(20, 200, (1, 4, 16, 32, 64, 256, 1024, 4096), (1, 2, 4, 8), 2.0)
QUICK = Schedule(2, 10, (1, 32), (1, 2), 0.1)


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-ray", action="store_true", help="leave out the Ray call, and do not start Ray")


def measure(arguments: argparse.Namespace) -> Report:
    import torch

    plan, report = QUICK if arguments.quick else FULL, Report("dispatch")
    torch.set_num_threads(1)
    with ExitStack() as stack, torch.inference_mode():
        ray = None if arguments.no_ray else stack.enter_context(_ray_transport())
        servers = stack.enter_context(_servers(max(plan.counts)))
        _round_trips(report, plan, servers, ray)
        report.curves.append(_by_bytes(report, plan, servers, ray))
        report.curves.append(_by_shards(report, plan, servers))
        report.curves.append(_by_callers(report, plan, servers))
    return report


@dataclass(frozen=True)
class Servers:
    """The processes that answer: one echoes bytes, one computes, one echoes rows of CURVE_DIM, the others rows of DIM."""

    secret: str
    raw_path: str
    raw_port: int
    experts: "Address"
    narrow: "Address"
    echoes: tuple["Address", ...]
    pids: tuple[int, ...]


@contextmanager
def _servers(num_echoes: int) -> Iterator[Servers]:
    from actors.dataplane.connection import Address
    from trinity.bench.process import children

    secret = secrets.token_hex(32)
    plain: dict[str, Any] = {"secret": secret, "dim": DIM}
    orders: list[dict[str, Any]] = [
        {"role": "raw"},
        {"role": "shard", **plain},
        {"role": "echo", **plain, "dim": CURVE_DIM},
    ]
    with children([*orders, *[{"role": "echo", **plain}] * num_echoes]) as started:
        path, *addresses = (child.hear() for child in started)
        experts, narrow, *echoes = (Address(**address) for address in addresses)
        pids = tuple(child.process.pid for child in started)
        yield Servers(secret, path["path"], path["port"], experts, narrow, tuple(echoes), pids)


@contextmanager
def _ray_transport() -> Iterator["Transport"]:
    """Transport to an actor that answers as the shard actors do, around the same echo."""
    from trinity.config import ClusterConfig, setup_environment

    cluster = ClusterConfig()
    setup_environment(cluster.auth)
    from actors.cluster import joined

    with joined(cluster):
        import ray

        from actors.dataplane.ray_transport import RayTransport
        from trinity.bench.echo import TIMEOUT_S, EchoActor
        from trinity.pool.local import shard_names

        actor = ray.remote(num_cpus=0)(EchoActor).remote()
        yield RayTransport({shard_names(1)[0]: actor}, TIMEOUT_S, TIMEOUT_S)
        ray.kill(actor)


# -- calls, and how they are timed


def _raw(path: str | tuple[str, int], num_rows: int, dim: int, stack: ExitStack) -> Callable[[], Any]:
    from trinity.bench.echo import batch
    from trinity.bench.process import raw_caller

    payload = memoryview(batch(num_rows, dim)[0].numpy().tobytes())
    sock, call = raw_caller(path, payload)
    stack.callback(sock.close)
    assert call() == payload
    return call


def _dispatch(
    transport: "Transport", num_shards: int, num_rows: int, dim: int, echoes: bool = True
) -> Callable[[], Any]:
    """A layer's call, checked: every shard echoes the rows it gets."""
    import torch

    from trinity.bench.echo import LAYER, NUM_EXPERTS, batch, dispatcher_of

    dispatcher, (x_TD, ids_TK, weights_TK) = dispatcher_of(transport, num_shards), batch(num_rows, dim)
    y_TD = dispatcher(LAYER, x_TD, ids_TK, weights_TK)
    if echoes:
        shard_TK = ids_TK * num_shards // NUM_EXPERTS
        times_T = torch.tensor([len(set(row)) for row in shard_TK.tolist()])
        torch.testing.assert_close(y_TD, x_TD * times_T[:, None])
    return lambda: dispatcher(LAYER, x_TD, ids_TK, weights_TK)


def _direct(addresses: Sequence["Address"], secret: str, stack: ExitStack) -> "Transport":
    from trinity.bench.echo import direct_to

    transport = direct_to(addresses, bytes.fromhex(secret))
    stack.callback(transport.close)
    return transport


def _wire_alone(transport: "Transport") -> Callable[[], Any]:
    """The same message sent over and over: what is left when nothing is routed and combined."""
    from trinity.bench.echo import LAYER, Echo, Recorder, batch, dispatcher_of

    recorder = Recorder(Echo())
    dispatcher_of(recorder, 1)(LAYER, *batch(ROWS, DIM))
    return lambda: transport.send(*recorder.sent).result()


def _turns(calls: Calls, plan: Schedule, num_calls: int | None = None) -> Blocks:
    """All paths in turns; the first turn warms up and is not counted."""
    from trinity.bench.process import timed

    found: Blocks = {path: [] for path in calls}
    for _ in range(plan.turns + 1):
        for path, call in calls.items():
            found[path].append(timed(call, num_calls or plan.calls))
    return {path: blocks[1:] for path, blocks in found.items()}


def _p(blocks: Sequence[Sequence[float]], share: float) -> float:
    return percentile([us for block in blocks for us in block], share)


def _over(blocks: Blocks, path: str, other: str) -> float:
    return ratio(list(map(statistics.median, blocks[path])), list(map(statistics.median, blocks[other])))


# -- what is measured


def _round_trips(report: Report, plan: Schedule, servers: Servers, ray: "Transport | None") -> None:
    from trinity.bench.echo import Echo, OverSockets, Recorder

    with ExitStack() as stack:
        one, two, experts = (
            _direct(addresses, servers.secret, stack)
            for addresses in (servers.echoes[:1], servers.echoes[:2], [servers.experts])
        )
        calls = {
            RAW: _raw(servers.raw_path, ROWS, DIM, stack),
            DIRECT: _dispatch(one, 1, ROWS, DIM),
            TWO: _dispatch(two, 2, ROWS, DIM),
            SOCKETS: _dispatch(OverSockets(one), 1, ROWS, DIM),
            TWO_SOCKETS: _dispatch(OverSockets(two), 2, ROWS, DIM),
            LOCAL: _dispatch(Recorder(Echo()), 1, ROWS, DIM),
            WIRE: _wire_alone(one),
        }
        _by_cores(report, {path: calls[path] for path in (RAW, DIRECT, TWO)}, plan, servers.pids)
        if ray is not None:
            calls[RAY] = _dispatch(ray, 1, ROWS, DIM)
        _over_tcp(report, plan, servers)
        blocks = _turns(calls, plan)
        compute = {EXPERTS: _dispatch(experts, 1, ROWS, DIM, echoes=False)}
        blocks |= _turns(compute, plan, max(1, plan.calls // 20))  # apart: their weights would sweep the others' caches
    half, most = ({path: _p(b, share) for path, b in blocks.items()} for share in (0.5, 0.99))
    rows = tuple((path, half[path], most[path], most[path] / half[path], _over(blocks, path, RAW)) for path in blocks)
    title = f"Dispatch and combine, {ROWS} rows of {DIM} fp32 there and back"
    report.tables.append(Table(title, ("path", "p50 us", "p99 us", "p99 / p50", "x raw socket"), rows))
    report.target("direct, p99 / p50", most[DIRECT] / half[DIRECT], at_most=3.0)
    if ray is not None:
        report.target("Ray call / direct, p50 of 32 KB", _over(blocks, RAY, DIRECT), at_least=50.0)


def _by_cores(report: Report, calls: Calls, plan: Schedule, pids: Sequence[int]) -> None:
    """The same by where the two ends run: a wake on the same core costs little, and the raw echo gains most by it."""
    found = {where: _turns_on(cores, calls, plan, pids) for where, cores in _cores().items()}
    columns = ("ends", *(f"{path}, p50 us" for path in calls), *(f"{path} / {RAW}" for path in (DIRECT, TWO)))
    ratios = {where: [_over(blocks, path, RAW) for path in (DIRECT, TWO)] for where, blocks in found.items()}
    rows = tuple((where, *(_p(b, 0.5) for b in found[where].values()), *ratios[where]) for where in found)
    report.tables.append(Table("By the cores that both ends run on", columns, rows))
    one, two = (max(ratios[where][i] for where in ratios if where != FREE or len(ratios) == 1) for i in (0, 1))
    report.results.append({"direct_over_raw_socket": one, "direct_2_shards_over_raw_socket": two, "by_cores": ratios})
    report.target("direct / raw socket, p50 of 32 KB, the worse of both", one, at_most=1.3)
    report.target("direct to 2 shards / raw socket, the worse of both", two, at_most=2.0)


def _over_tcp(report: Report, plan: Schedule, servers: Servers) -> None:
    """The same to shards that are taken for another host's, over the loopback: frames in C++, and in Python."""
    from trinity.bench.echo import HOST, OverSockets

    far = [replace(address, machine="elsewhere") for address in servers.echoes[:2]]
    with ExitStack() as stack:
        one, two = (_direct(far[:n], servers.secret, stack) for n in (1, 2))
        calls = {
            RAW_TCP: _raw((HOST, servers.raw_port), ROWS, DIM, stack),
            TCP: _dispatch(one, 1, ROWS, DIM),
            TWO_TCP: _dispatch(two, 2, ROWS, DIM),
            PYTHON_TCP: _dispatch(OverSockets(one), 1, ROWS, DIM),
            TWO_PYTHON_TCP: _dispatch(OverSockets(two), 2, ROWS, DIM),
        }
        found = {where: _turns_on(cores, calls, plan, servers.pids) for where, cores in _cores().items()}
    over = {where: {path: _over(blocks, path, RAW_TCP) for path in calls} for where, blocks in found.items()}
    rows = tuple(
        (where, path, _p(blocks[path], 0.5), _p(blocks[path], 0.99), over[where][path])
        for where, blocks in found.items()
        for path in calls
    )
    columns = ("ends", "path", "p50 us", "p99 us", f"x {RAW_TCP}")
    report.tables.append(Table("Over TCP on the loopback", columns, rows))
    report.results.append({"over_raw_tcp": over})


def _cores() -> dict[str, tuple[set[int], set[int]]]:
    """Cores of the caller, and of everybody else."""
    here = os.sched_getaffinity(0)
    first, *others = sorted(here)
    pinned = {ONE_CORE: ({first}, {first}), TWO_CORES: ({first}, {others[0]})} if others else {}
    return {FREE: (here, here), **pinned}


def _turns_on(cores: tuple[set[int], set[int]], calls: Calls, plan: Schedule, pids: Sequence[int]) -> Blocks:
    from trinity.bench.process import pinned

    with pinned(pids, cores[1]), pinned([os.getpid()], cores[0]):
        return _turns(calls, plan)


def _by_bytes(report: Report, plan: Schedule, servers: Servers, ray: "Transport | None") -> Curve:
    found: dict[str, list[float]] = {}
    for kib in plan.kib:
        num_rows = kib * 1024 // (4 * CURVE_DIM)
        with ExitStack() as stack:
            calls = {
                RAW: _raw(servers.raw_path, num_rows, CURVE_DIM, stack),
                DIRECT: _dispatch(_direct([servers.narrow], servers.secret, stack), 1, num_rows, CURVE_DIM),
            }
            if ray is not None:
                calls[RAY] = _dispatch(ray, 1, num_rows, CURVE_DIM)
            for path, blocks in _turns(calls, plan, max(3, min(plan.calls // 4, 4096 // kib))).items():
                found.setdefault(path, []).append(_p(blocks, 0.5))
    cells = tuple(zip(plan.kib, *found.values(), strict=True))
    report.tables.append(Table("Round trip by size, p50 us", ("KiB each way", *found), cells))
    x = tuple(1024.0 * kib for kib in plan.kib)
    return Curve("Round trip by size", "bytes each way", "us (p50)", x, {path: tuple(y) for path, y in found.items()})


def _by_shards(report: Report, plan: Schedule, servers: Servers) -> Curve:
    """The same rows over more and more shards: a row goes to each shard that holds one of its experts."""
    with ExitStack() as stack:
        calls = {
            str(n): _dispatch(_direct(servers.echoes[:n], servers.secret, stack), n, ROWS, DIM) for n in plan.counts
        }
        blocks = _turns(calls, plan, max(10, plan.calls // 2))
        cpu = [_processor_us(calls[str(n)], plan, servers.pids) / n for n in plan.counts]
    y = tuple(_p(blocks[str(n)], 0.5) for n in plan.counts)
    sent, each = [_rows_sent(n) for n in plan.counts], [us / n for us, n in zip(y, plan.counts, strict=True)]
    rows = tuple(zip(plan.counts, sent, y, each, cpu, strict=True))
    title = f"Dispatch of {ROWS} rows over several shards"
    columns = ("shards", "rows sent", "p50 us", "us per message", "CPU us per message, caller and shards")
    report.tables.append(Table(title, columns, rows))
    lines = {"a dispatch": y, "per message": tuple(each), "processor time per message": tuple(cpu)}
    return Curve(title, "shards", "us (p50)", tuple(map(float, plan.counts)), lines)


def _processor_us(call: Callable[[], Any], plan: Schedule, pids: Sequence[int]) -> float:
    """Processor time of a call here and on all servers, the median of turns."""
    from trinity.bench.process import processor_us, timed

    found, everybody = [], (os.getpid(), *pids)
    for _ in range(plan.turns):
        before = processor_us(everybody)
        timed(call, plan.calls)
        found.append((processor_us(everybody) - before) / plan.calls)
    return statistics.median(found)


def _rows_sent(num_shards: int) -> int:
    from trinity.bench.echo import NUM_EXPERTS, batch

    shard_TK = batch(ROWS, DIM)[1] * num_shards // NUM_EXPERTS
    return sum(len(set(row)) for row in shard_TK.tolist())


def _by_callers(report: Report, plan: Schedule, servers: Servers) -> Curve:
    """Callers of one shard, each a process that calls as fast as it can."""
    from dataclasses import asdict

    from trinity.bench.process import children

    order = {"role": "caller", "secret": servers.secret, "dim": DIM, "num_rows": ROWS}
    with children([{**order, "address": asdict(servers.echoes[0])}] * max(plan.counts)) as callers:
        for caller in callers:
            caller.hear()
        found = [_callers(callers[:n], plan.seconds) for n in plan.counts]
    rows = tuple((n, *figures) for n, figures in zip(plan.counts, found, strict=True))
    title = f"Callers of one shard, {ROWS} rows each"
    report.tables.append(Table(title, ("callers", "p50 us", "p99 us", "calls/s of all", "us per call of all"), rows))
    for num, (_, _, rate, _) in zip(plan.counts, found, strict=True):
        if num == MANY:
            report.target(f"calls/s of {num} callers of one shard", rate, at_least=100_000)
    lines = {"a call (p50)": tuple(f[0] for f in found), "per call of all": tuple(f[3] for f in found)}
    return Curve(title, "callers", "us", tuple(map(float, plan.counts)), lines)


def _callers(callers: Sequence["Child"], seconds: float) -> tuple[float, float, float, float]:
    """-> median of their p50, worst p99, calls/s of all together, and its inverse in microseconds."""
    for caller in callers:
        caller.tell(seconds=seconds)
    said = [caller.hear() for caller in callers]
    rate = sum(answer["calls"] / answer["seconds"] for answer in said)
    return statistics.median(a["p50"] for a in said), max(a["p99"] for a in said), rate, 1e6 / rate
