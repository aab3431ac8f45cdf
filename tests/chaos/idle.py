"""`make idle`: what a server of `trinity serve` holds for streams that are open and get nothing, and whether all is given back.

    python -m tests.chaos.idle [--streams 10000] [--of-grpc 0.2] [--out runs/idle]

One sequence runs at a time, so that all others wait with their streams open: over HTTP a connection each, over gRPC many of one
connection. Fails where a stream is refused, where one costs more than MOST_KB of all the server's processes together, where a
request is not answered beside them, or where blocks or streams are left after the clients have gone. Clients are processes of
their own and not counted.
"""

import argparse
import asyncio
import json
import multiprocessing
import re
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from tests.chaos.meter import Meter
from tests.chaos.soak import made, served
from tests.chaos.unruly import COMPLETE, Target
from trinity.bench.report import Report, Table
from trinity.errors import TrinityError

MOST_KB, PER_CONNECTION = 50.0, 100  # gRPC streams of a connection
BODY = {"prompt": "a text that waits", "max_tokens": 100, "stream": True, "ignore_eos": True, "priority": 5}
GONE_S = 75.0
SHARE = 0.97  # of the streams: some are through before the last are there


class Held(NamedTuple):
    """Memory of all the server's processes, and what the server says that it has."""

    mib: float
    num_streams: int
    num_blocks: int  # that sequences hold
    by_process: dict[str, float]


def settings(num: int) -> list[str]:
    """Flags of a server that takes so many."""
    room = str(2 * num + 64)
    return [
        *("--serve.max_concurrent_requests", room, "--serve.max_connections", room),
        *("--serve.max_connections_per_peer", room, "--serve.request_timeout_s", "3600"),
        *("--engine.max_num_waiting", room, "--engine.max_num_seqs", "1"),
    ]


def held(meter: Meter, url: str) -> Held:
    """Look at the server now."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    meter.samples.clear()
    meter.sample()
    mib = Counter[str]()
    for samples in meter.samples.values():
        mib[samples[-1].name] += samples[-1].rss_mib
    names = ("vllm:num_requests_waiting", "trinity_kv_blocks", "trinity_kv_blocks_free")
    waiting, total, free = (int(_number(text, name)) for name in names)
    return Held(mib.total(), waiting, total - free, dict(mib))


def _number(text: str, name: str) -> float:
    found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    if found is None:
        raise TrinityError(f"the server's /metrics have no {name}")
    return float(found[1])


def http_streams(target: Target, num: int, ready, over) -> None:
    """A process that has `num` streams open until it is told."""
    asyncio.run(_http_streams(target, num, ready, over))


async def _http_streams(target: Target, num: int, ready, over) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gate, payload = asyncio.Semaphore(64), json.dumps(BODY).encode()
    head = (
        f"POST {COMPLETE} HTTP/1.1\r\nHost: {target.http_port[0]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )

    async def one():
        async with gate:
            reader, writer = await asyncio.open_connection(*target.http_port, limit=1 << 12)
            writer.write(head.encode() + payload)
            await writer.drain()
        return reader, writer

    opened = await asyncio.gather(*(one() for _ in range(num)))
    ready.put(len(opened))
    await asyncio.to_thread(over.wait)
    ready.put(Counter(head for reader, _ in opened if (head := _begins(reader)) not in ("", "HTTP/1.1 200")))
    for _, writer in opened:
        writer.transport.abort()


def _begins(reader: asyncio.StreamReader) -> str:
    """What has been answered, without reading on: its status."""
    return bytes(reader._buffer[:12]).decode(errors="replace")


def grpc_streams(target: Target, num: int, ready, over) -> None:
    """The same over gRPC."""
    import grpc

    from protos.trinity.v1 import inference_pb2 as pb
    from protos.trinity.v1 import inference_pb2_grpc as rpc

    calls, channels = [], []
    for first in range(0, num, PER_CONNECTION):
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels.append(grpc.insecure_channel(target.grpc_address, options=options))
        stub = rpc.InferenceStub(channels[-1])
        for _ in range(first, min(num, first + PER_CONNECTION)):
            sampling = pb.SamplingParams(max_tokens=BODY["max_tokens"], ignore_eos=True)
            request = pb.GenerateRequest(text=BODY["prompt"], sampling=sampling, priority=BODY["priority"])
            calls.append(stub.Generate(request, timeout=3600))
    ready.put(len(calls))
    over.wait()
    ready.put(Counter(f"{call.code()} {call.details()}" for call in calls if call.done()))
    for call in calls:
        call.cancel()
    for channel in channels:
        channel.close()


def measured(process, target: Target, num: int, of_grpc: float) -> tuple[Held, Held, Held, float]:
    """-> what is held before, beside the streams and after them, and seconds of a request beside them."""
    meter = Meter(process.pid)
    with httpx.Client(base_url=target.url, timeout=600) as http:
        for _ in range(8):  # whatever is made at the first request
            _ask(http)
        before = _until(lambda: held(meter, target.url), _is_idle)
        with streams(target, num, of_grpc):
            beside = _until(lambda: held(meter, target.url), lambda now: now.num_streams >= SHARE * num)
            began_s = time.perf_counter()
            _ask(http)
            asked_s = time.perf_counter() - began_s
        after = _until(lambda: held(meter, target.url), _is_idle)
    return before, beside, after, asked_s


@contextmanager
def streams(target: Target, num: int, of_grpc: float) -> Iterator[None]:
    """So many are open inside the block, in processes of their own. Raises TrinityError after it where some did not stay so."""
    spawn = multiprocessing.get_context("spawn")
    ready, over, num_grpc = spawn.Queue(), spawn.Event(), int(num * of_grpc)
    kinds = [(http_streams, num - num_grpc), (grpc_streams, num_grpc)]
    clients = [spawn.Process(target=kind, args=(target, part, ready, over)) for kind, part in kinds if part]
    for client in clients:
        client.start()
    ended = Counter[str]()
    try:
        for _ in clients:
            ready.get(timeout=600)
        yield
    finally:
        over.set()
        for _ in clients:
            ended.update(ready.get(timeout=600))
        for client in clients:
            client.join()
        if ended:
            raise TrinityError(f"of {num} streams some ended by themselves: {dict(ended)}")


def _ask(http: httpx.Client) -> None:
    http.post(COMPLETE, json=BODY | {"stream": False, "max_tokens": 4, "priority": 0}).raise_for_status()


def _is_idle(now: Held) -> bool:
    return now.num_streams == now.num_blocks == 0


def _until(look, is_so):
    until_s = time.monotonic() + GONE_S
    while not is_so(found := look()):
        if time.monotonic() > until_s:
            raise TrinityError(f"after {GONE_S:.0f} s the server still has {found}")
        time.sleep(0.5)
    return found


def report(num: int, before: Held, beside: Held, after: Held, asked_s: float) -> Report:
    kb = 1024 * (beside.mib - before.mib) / num
    named = (("before", before), ("beside", beside), ("after", after))
    rows = tuple((what, each.mib, each.num_streams) for what, each in named)
    found = Report("idle", [Table(f"{num} streams", ("", "MiB of all processes", "waiting"), rows)])
    found.tables.append(Table("Of one", ("", "value"), (("KB", kb), ("s of an urgent request beside them", asked_s))))
    more = {name: mib - before.by_process.get(name, 0.0) for name, mib in beside.by_process.items()}
    found.tables.append(Table("More beside them", ("process", "MiB"), tuple((n, m) for n, m in more.items() if m >= 1)))
    found.results = [each._asdict() for each in (before, beside, after)]
    found.target("KB of a stream", kb, at_most=MOST_KB)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--of-grpc", type=float, default=0.2, help="share of them (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/idle"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trinity-idle-") as name:
        folder = Path(name)
        with served(made(folder / "model"), folder, settings(given.streams)) as (process, target):
            found = measured(process, target, given.streams, given.of_grpc)
    report(given.streams, *found).write(given.out)


if __name__ == "__main__":
    try:
        main()
    except TrinityError as error:
        raise SystemExit(f"idle: {error.message}") from None
