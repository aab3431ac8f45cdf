"""An open-loop load: when requests leave, what became of each, and the figures of `vllm bench serve` over them.

Decisions: arrival times are drawn beforehand and a request leaves at its time whatever the server does, because a client
that waits for answers slows down with the server and hides what its users would feel. Names and definitions are vLLM's:
latencies count from the moment a request is handed to the client library; ITL is the gap between two chunks; TPOT is
(end to end - TTFT) / (tokens - 1); percentiles interpolate; failed requests count in no latency. Where there is nothing
to average the figure is None, never 0.
"""

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LATE_S = 0.05  # a request that the generator itself let go later than this was not sent on time
SHARES = (1, 5, 10, 25, 50, 75, 90, 95, 98, 99)  # percent, for a picture of one load
Mark = Callable[[str], None]  # of a chunk, with its text
Send = Callable[[int, Mark], Awaitable[tuple[int, int]]]


class RequestFailed(Exception):
    """One request got no whole answer. `kind` is what failures are counted by, `detail` the server's or library's words."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


@dataclass
class Timeline:
    """One request; times in seconds since the load began. `chunks_s` are the arrivals of its pieces of answer.

    planned_s -> due_s: the generator's own lag. due_s -> sent_s: waiting for `max_concurrency`. Token counts are the server's.
    """

    planned_s: float
    due_s: float = 0.0
    sent_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)
    num_input: int = 0
    num_output: int = 0
    failure: RequestFailed | None = None

    @property
    def lag_s(self) -> float:
        return self.due_s - self.planned_s

    @property
    def ttft_s(self) -> float:
        return self.chunks_s[0] - self.sent_s

    @property
    def e2el_s(self) -> float:
        return self.chunks_s[-1] - self.sent_s

    @property
    def itls_s(self) -> list[float]:
        return [float(gap) for gap in np.diff(self.chunks_s)]

    @property
    def tpot_s(self) -> float:
        """0 for an answer of one token, which is how goodput takes it; the TPOT statistics leave it out."""
        return (self.e2el_s - self.ttft_s) / (self.num_output - 1) if self.num_output > 1 else 0.0

    def meets(self, goals_ms: Mapping[str, float]) -> bool:
        """Are ttft, tpot and e2el, as far as `goals_ms` names them, within their bounds?"""
        return all(1000 * getattr(self, f"{name}_s") <= bound for name, bound in goals_ms.items())


def arrivals(num: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Seconds at which `num` requests leave, ascending. `rate` (1/s) inf: all at 0.

    Gaps are gamma with shape `burstiness` and mean 1 / rate: 1 is a Poisson process, less is burstier, more is steadier.
    All are scaled so that the last leaves at num / rate, as vLLM does: two seeds then offer the same mean rate.
    """
    if rate == float("inf"):
        return [0.0] * num
    times = np.cumsum(rng.gamma(burstiness, 1 / (rate * burstiness), num))
    return [float(time) for time in times * (num / rate / times[-1])]


def lengths(num: int, mean: int, range_ratio: float, rng: np.random.Generator) -> list[int]:
    """Uniform whole numbers from mean * (1 - range_ratio) to mean * (1 + range_ratio), at least 1."""
    low, high = bounds(mean, range_ratio)
    return [int(length) for length in rng.integers(low, high + 1, num)]


def bounds(mean: int, range_ratio: float) -> tuple[int, int]:
    """The least and the greatest that `lengths` gives."""
    return max(1, int(mean * (1 - range_ratio))), max(1, round(mean * (1 + range_ratio)))


async def offer(
    plan: Sequence[float], send: Send, max_concurrency: int | None = None, timeout_s: float = 600
) -> tuple[list[Timeline], float]:
    """Send request i at plan[i] seconds from now; -> all timelines, and the seconds until the last one ended.

    `send(i, mark)` calls `mark(text)` for each chunk, returns (input tokens, output tokens), or raises RequestFailed.
    """
    clock = asyncio.get_running_loop().time
    began = clock()
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    lines = [Timeline(planned_s) for planned_s in plan]

    async def one(i: int, line: Timeline) -> None:
        line.due_s = clock() - began
        async with gate:
            line.sent_s = clock() - began
            await _settle(line, timeout_s, send(i, lambda _: line.chunks_s.append(clock() - began)))

    async with asyncio.TaskGroup() as tasks:
        for i, line in enumerate(lines):
            if (early_s := line.planned_s - (clock() - began)) > 0:
                await asyncio.sleep(early_s)
            tasks.create_task(one(i, line))
    return lines, clock() - began


async def _settle(line: Timeline, timeout_s: float, answer: Awaitable[tuple[int, int]]) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            line.num_input, line.num_output = await answer
        if not line.chunks_s:
            raise RequestFailed("empty answer", "the stream ended without a token")
    except RequestFailed as failure:
        line.failure = failure
    except TimeoutError:
        line.failure = RequestFailed("timeout", f"not finished within {timeout_s:g} s")


def summarize(lines: Sequence[Timeline], duration_s: float, goals_ms: Mapping[str, float]) -> dict[str, Any]:
    """The result of one load, as JSON takes it. Besides vLLM's fields: lag and client queue, failures by kind."""
    done = [line for line in lines if line.failure is None]
    num_input, num_output = sum(line.num_input for line in done), sum(line.num_output for line in done)
    failures = [line.failure for line in lines if line.failure is not None]
    return {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(failures),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration_s,
        "request_goodput": sum(line.meets(goals_ms) for line in done) / duration_s if goals_ms else None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_output_tokens_per_s": busiest_second(done),
        "max_concurrent_requests": most_at_once(done),
        **_statistics("ttft", [line.ttft_s for line in done]),
        **_statistics("tpot", [line.tpot_s for line in done if line.num_output > 1]),
        **_statistics("itl", [gap for line in done for gap in line.itls_s]),
        **_statistics("e2el", [line.e2el_s for line in done]),
        **_statistics("lag", [line.lag_s for line in lines]),
        **_statistics("client_queue", [line.sent_s - line.due_s for line in lines]),
        "num_late": sum(line.lag_s > LATE_S for line in lines),
        "errors_by_kind": dict(Counter(failure.kind for failure in failures)),
        "error_examples": {failure.kind: failure.detail for failure in reversed(failures)},
    }


def busiest_second(done: Sequence[Timeline]) -> float:
    """Output tokens in the fullest of the whole seconds since the first request; a request's chunks share its tokens evenly."""
    if not done:
        return 0.0
    first_s = min(line.sent_s for line in done)
    seconds = [int(at - first_s) for line in done for at in line.chunks_s]
    weights = [line.num_output / len(line.chunks_s) for line in done for _ in line.chunks_s]
    return float(np.bincount(seconds, weights).max())


def most_at_once(done: Sequence[Timeline]) -> int:
    """Requests under way at the same time, at most. One that ends as another begins does not overlap it."""
    changes = sorted([(line.sent_s, 1) for line in done] + [(line.chunks_s[-1], -1) for line in done])
    return max(itertools.accumulate(change for _, change in changes), default=0)


def _statistics(name: str, values_s: Sequence[float]) -> dict[str, Any]:
    """`percentiles_NAME_ms` are those of SHARES."""
    if not values_s:
        return dict.fromkeys([f"{key}_{name}_ms" for key in ("mean", "median", "std", "p99", "percentiles")])
    values_ms = 1000 * np.asarray(values_s)
    return {
        f"mean_{name}_ms": float(values_ms.mean()),
        f"median_{name}_ms": float(np.median(values_ms)),
        f"std_{name}_ms": float(values_ms.std()),
        f"p99_{name}_ms": float(np.percentile(values_ms, 99)),
        f"percentiles_{name}_ms": np.percentile(values_ms, SHARES).tolist(),
    }
