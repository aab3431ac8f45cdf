"""`make soak`: a server of `trinity serve` under mixed traffic, some of it unruly, and what its processes hold over the time.

    python -m tests.chaos.soak [--minutes 60] [--warm-up 10] [--rate 4] [--unruly 2] [--out runs/soak]

Fails where an answer is another than the same prompt's alone, where one fails, or where after the warm-up a process grows by
more than MOST_MIB an hour, or by threads or descriptors. Of Ray's own processes on the head (`gcs_server`, agents, dashboard,
logs) memory is shown and not judged: they keep a history of the cluster's events, up to bounds that are Ray's.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.chaos.meter import Growth, Meter
from tests.chaos.unruly import COMPLETE, Target, misbehave
from trinity.bench.report import Report, Table
from trinity.errors import TrinityError

MOST_MIB, MOST_MORE = 2.0, 3  # an hour; threads or descriptors
PROMPTS = [f"word {n} and then some more of it {n * n}" for n in range(16)]
OURS = ("ray::Shard", "ray::PlacementService", "ray::ServeReplica", "trinity.cli")
EVERY_S = 5.0


@contextmanager
def served(checkpoint: Path, folder: Path, more: Sequence[str] = ()) -> Iterator[tuple[subprocess.Popen, Target]]:
    """The command, once it is ready; ends it with SIGTERM."""
    ports = ["--serve.http_port", "0", "--serve.grpc_port", "0", "--placement.num_shards", "2"]
    with (folder / "serve.out").open("w+") as out, (folder / "serve.err").open("w") as err:
        command = [sys.executable, "-m", "trinity.cli", "serve", str(checkpoint), *ports, *more]
        process = subprocess.Popen(command, stdout=out, stderr=err)
        try:
            yield process, Target(*_addresses(process, folder / "serve.out"))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _addresses(process: subprocess.Popen, said: Path) -> tuple[str, str]:
    while process.poll() is None:
        if "ready" in (text := said.read_text()):
            return re.search(r"HTTP (\S+)", text)[1], re.search(r"gRPC (\S+)", text)[1]
        time.sleep(0.2)
    raise SystemExit(f"the server ended with {process.returncode}; see {said.parent}")


class Traffic:
    """Clients of a server for some time, in an open loop; what went wrong is in `failures`."""

    def __init__(self, target: Target, rng: random.Random):
        self.target, self.rng = target, rng
        self.num_answers, self.failures, self.unruly = 0, Counter(), Counter()

    async def run(self, seconds: float, rate: float, unruly_rate: float) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.target.url, timeout=60, limits=limits) as self.http:
            self.alone = [await self._text(prompt, False) for prompt in PROMPTS]
            async with asyncio.TaskGroup() as group:
                group.create_task(self._arrivals(group, seconds, rate, self._ask))
                group.create_task(self._arrivals(group, seconds, unruly_rate, self._misbehave))

    async def _arrivals(self, group, seconds, rate, what) -> None:
        end_s = time.monotonic() + seconds
        while rate and time.monotonic() < end_s:
            await asyncio.sleep(self.rng.expovariate(rate))
            group.create_task(what())

    async def _misbehave(self) -> None:
        await misbehave(self.target, self.rng, self.unruly)

    async def _ask(self) -> None:
        at = self.rng.randrange(len(PROMPTS))
        try:
            text = await self._text(PROMPTS[at], self.rng.random() < 0.5)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self.failures[f"{type(error).__name__}: {str(error)[:100]}"] += 1
            return
        self.num_answers += 1
        self.failures["another text"] += text != self.alone[at]

    async def _text(self, prompt: str, stream: bool) -> str:
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stream": stream}
        answer = await self.http.post(COMPLETE, json=body)
        answer.raise_for_status()
        if not stream:
            return answer.json()["choices"][0]["text"]
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


def wrongs(growth: list[Growth]) -> list[str]:
    """What grew by more than it may."""
    found = []
    for each in growth:
        if each.name.startswith(OURS) and each.mib_per_hour > MOST_MIB:
            found.append(f"{each.name} ({each.pid}) grew by {each.mib_per_hour:.1f} MiB an hour")
        for what, (before, after) in (("threads", each.num_threads), ("descriptors", each.num_descriptors)):
            if after > before + MOST_MORE:
                found.append(f"{each.name} ({each.pid}) had {before} {what}, then {after}")
    return found


def report(traffic: Traffic, meter: Meter, warm_s: float, minutes: float) -> Report:
    growth = meter.growth(warm_s)
    rows = tuple(
        (g.name, g.rss_mib, g.mib_per_hour, "{} -> {}".format(*g.num_threads), "{} -> {}".format(*g.num_descriptors))
        for g in growth
    )
    columns = ("process", "RSS, MiB", "MiB an hour", "threads", "descriptors")
    did = (("minutes", minutes), ("answers", traffic.num_answers), ("failed", traffic.failures.total()))
    found = Report("soak", [Table("What processes hold", columns, rows), Table("Traffic", ("", "value"), did)])
    found.results = [
        {"growth": [g._asdict() for g in growth], "unruly": traffic.unruly, "failures": traffic.failures},
        *({"pid": pid, "samples": samples} for pid, samples in meter.samples.items()),
    ]
    found.failure = "; ".join([*(f"{num} x {what}" for what, num in (+traffic.failures).items()), *wrongs(growth)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="(default: a small one that is made)")
    for flag, default in (("minutes", 60.0), ("warm-up", 10.0), ("rate", 4.0), ("unruly", 2.0)):
        parser.add_argument(f"--{flag}", type=float, default=default, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trinity-soak-") as name:
        folder = Path(name)
        checkpoint = given.checkpoint or made(folder / "model")
        with served(checkpoint, folder) as (process, target):
            meter, traffic = Meter(process.pid), Traffic(target, random.Random(given.seed))
            warm_s = time.monotonic() + 60 * given.warm_up
            with meter.running(EVERY_S):
                asyncio.run(traffic.run(60 * given.minutes, given.rate, given.unruly))
    report(traffic, meter, warm_s, given.minutes).write(given.out)


def made(folder: Path) -> Path:
    from tests.serve.test_real import write_checkpoint

    return write_checkpoint(folder)


if __name__ == "__main__":
    try:
        main()
    except TrinityError as error:
        raise SystemExit(f"soak: {error.message}") from None
