"""The load generator of `trinity bench serve`: when requests leave, what counts as what, and that nothing closes the loop."""

import argparse
import asyncio
import json
import re
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.bench import open_load, serve
from trinity.bench.clients import Ask, http_client
from trinity.bench.open_load import RequestFailed, Timeline
from trinity.bench.report import Report


def gaps(burstiness, num=20_000, rate=50.0, seed=0):
    return np.diff(open_load.arrivals(num, rate, burstiness, np.random.default_rng(seed)), prepend=0)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_of_a_gamma_distribution(burstiness):
    found = gaps(burstiness)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(20_000 / 50.0)
    assert found.std() / found.mean() == pytest.approx(burstiness**-0.5, rel=0.03)


def test_burstiness_1_is_a_poisson_process():
    """Gaps are memoryless and independent; counts in windows have their mean as variance."""
    found = gaps(1.0)
    for over in (0.5, 1, 2):
        assert (found > over * found.mean()).mean() == pytest.approx(np.exp(-over), abs=0.015)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03
    counts, _ = np.histogram(np.cumsum(found), bins=2000)
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.15)


def test_arrivals_are_a_function_of_the_seed():
    assert np.array_equal(gaps(1.0, seed=3), gaps(1.0, seed=3))
    assert not np.array_equal(gaps(1.0, seed=3), gaps(1.0, seed=4))
    assert open_load.arrivals(5, float("inf"), 1.0, np.random.default_rng(0)) == [0.0] * 5


@given(mean=st.integers(1, 2000), ratio=st.floats(0, 1), seed=st.integers(0, 99))
def test_lengths_stay_within_their_bounds(mean, ratio, seed):
    found = open_load.lengths(50, mean, ratio, np.random.default_rng(seed))
    low, high = open_load.bounds(mean, ratio)
    assert 1 <= low <= min(found)
    assert max(found) <= high <= 2 * mean
    assert ratio > 0 or set(found) == {mean}


def test_lengths_use_the_whole_range():
    assert set(open_load.lengths(500, 10, 0.2, np.random.default_rng(0))) == set(range(8, 13))


LINES = [  # times in seconds
    Timeline(0.0, 0.001, 0.001, [0.101, 0.111, 0.131], num_input=5, num_output=3),  # TTFT 100, ITL 10 and 20, TPOT 15
    Timeline(0.1, 0.1, 0.1, [0.4, 0.44], num_input=6, num_output=2),  # TTFT 300, ITL 40, TPOT 40
    Timeline(0.2, 0.3, 0.5, [0.7], num_input=7, num_output=1),  # TTFT 200, no ITL, no TPOT; 100 late, 200 in the queue
    Timeline(0.3, 0.3, 0.3, [0.9], failure=RequestFailed("HTTP 429", "full")),
    Timeline(0.4, 0.4, 0.4, failure=RequestFailed("HTTP 429", "full again")),
]


def test_figures_of_a_load_done_by_hand():
    found = open_load.summarize(LINES, 2.0, {"ttft": 250, "tpot": 20})
    want = {
        **{"completed": 3, "failed": 2, "duration": 2.0, "total_input_tokens": 18, "total_output_tokens": 6},
        **{"request_throughput": 1.5, "output_throughput": 3.0, "total_token_throughput": 12.0},
        **{"mean_ttft_ms": 200, "median_ttft_ms": 200, "p99_ttft_ms": 298, "std_ttft_ms": 20000**0.5 / 3**0.5},
        **{"mean_tpot_ms": 27.5, "median_tpot_ms": 27.5, "p99_tpot_ms": 39.75, "std_tpot_ms": 12.5},
        **{"mean_itl_ms": 70 / 3, "median_itl_ms": 20, "p99_itl_ms": 39.6},
        **{"mean_e2el_ms": (130 + 340 + 200) / 3, "median_e2el_ms": 200},
        **{"mean_lag_ms": 101 / 5, "num_late": 1, "mean_client_queue_ms": 40},
        **{"max_concurrent_requests": 2, "max_output_tokens_per_s": 6},
        "request_goodput": 1.0,  # the second is too slow in both; one token has no TPOT to miss
    }
    assert {name: found[name] for name in want} == pytest.approx(want)
    assert found["errors_by_kind"] == {"HTTP 429": 2}
    assert found["error_examples"] == {"HTTP 429": "full"}
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("goals", "good"), [({"ttft": 200}, 2), ({"e2el": 340}, 3), ({"tpot": 14}, 1), ({"ttft": 99}, 0)]
)
def test_goodput_counts_what_meets_every_bound(goals, good):
    close = {name: bound + 1e-6 for name, bound in goals.items()}  # sums of decimals are not exact
    assert open_load.summarize(LINES, 1.0, close)["request_goodput"] == good


def test_nothing_answered_gives_no_latency_rather_than_none_at_all():
    found = open_load.summarize(LINES[3:], 1.0, {})
    assert (found["completed"], found["failed"], found["request_goodput"]) == (0, 2, None)
    assert {found[f"{key}_{name}_ms"] for key in ("mean", "p99") for name in ("ttft", "tpot", "itl", "e2el")} == {None}


def test_requests_that_touch_do_not_overlap():
    assert (
        open_load.most_at_once([Timeline(0, 0, 0, [1.0]), Timeline(1, 1, 1.0, [2.0]), Timeline(1, 1, 1.5, [2.0])]) == 2
    )


def test_tokens_of_a_chunk_count_in_its_second():
    lines = [Timeline(0, 0, 0.5, [0.6, 1.4, 1.6], num_output=6), Timeline(0, 0, 0.9, [1.7, 9.0], num_output=2)]
    assert open_load.busiest_second(lines) == 4  # 0.5 to 1.5 s: two chunks of two tokens


class FakeServer:
    """Takes completions over plain sockets. `answer(i, write)` answers the i-th request; `arrived_s` are their times."""

    def __init__(self, answer):
        self.answer, self.arrived_s, self.bodies, self.most, self.now = answer, [], [], 0, 0

    async def __call__(self, reader, writer):
        loop = asyncio.get_running_loop()
        while head := await reader.readuntil(b"\r\n\r\n"):
            size = int(re.search(rb"(?i)content-length: (\d+)", head).group(1))
            self.bodies.append(json.loads(await reader.readexactly(size)))
            self.arrived_s.append(loop.time())
            self.now += 1
            self.most = max(self.most, self.now)
            await self.answer(len(self.arrived_s) - 1, writer.write)
            self.now -= 1
            writer.close()
            return


def head(status=200):
    return f"HTTP/1.1 {status} x\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n".encode()


def event(**tree):
    return b"data: " + json.dumps(tree).encode() + b"\n\n"


TOKEN = event(choices=[{"text": ""}])
END = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2}) + b"data: [DONE]\n\n"
WHOLE = head() + TOKEN + TOKEN + END


@asynccontextmanager
async def offered(answer):
    """`send` for open_load.offer towards a FakeServer, and that server."""
    fake = FakeServer(answer)
    server = await asyncio.start_server(fake, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, http_client(Ask(url)) as client:
        yield lambda i, mark: client.generate("m", [i, 1, 2], 2, mark), fake


async def bare_sleeper(plan):
    """How late one is who only sleeps until each of these times."""
    began_s, late_s = asyncio.get_running_loop().time(), []
    for at_s in plan:
        await asyncio.sleep(began_s + at_s - asyncio.get_running_loop().time())
        late_s.append(asyncio.get_running_loop().time() - began_s - at_s)
    return np.array(late_s)


async def test_a_server_that_stalls_delays_no_later_request():
    """It answers nobody before everybody has asked: a client that waits for an answer would wait for ever."""
    plan, all_asked = open_load.arrivals(24, 80, 1.0, np.random.default_rng(1)), asyncio.Event()

    async def stall(i, write):
        if i + 1 == len(plan):
            all_asked.set()
        await all_asked.wait()
        write(WHOLE)

    async with offered(stall) as (send, fake):
        began_s = asyncio.get_running_loop().time()
        pace = asyncio.create_task(bare_sleeper(plan))
        lines, duration_s = await open_load.offer(plan, send, timeout_s=60)
    assert [line.failure for line in lines] == [None] * 24
    assert sorted(body["prompt"][0] for body in fake.bodies) == list(range(24))
    late_s = np.sort(fake.arrived_s) - began_s - plan
    assert late_s.min() >= -0.002, "nothing leaves before its time"
    assert np.median(late_s - await pace) < 0.25, "and as soon after it as this machine lets anybody"
    assert all(line.chunks_s[0] >= plan[-1] for line in lines)
    assert duration_s >= plan[-1]


async def test_a_cap_is_kept_and_its_waiting_is_told_apart_from_lag():
    async def slow(i, write):
        await asyncio.sleep(0.1)
        write(WHOLE)

    async with offered(slow) as (send, fake):
        lines, _ = await open_load.offer([0.0] * 6, send, max_concurrency=2)
    found = open_load.summarize(lines, 1.0, {})
    assert (found["completed"], fake.most) == (6, 2)
    assert max(line.sent_s - line.due_s for line in lines) > 0.15
    assert found["mean_lag_ms"] < 500 * max(line.sent_s - line.planned_s for line in lines)


async def test_token_times_and_counts_are_the_servers():
    async def paced(i, write):
        write(head())
        await asyncio.sleep(0.15)
        write(TOKEN)
        await asyncio.sleep(0.05)
        write(TOKEN + END)

    async with offered(paced) as (send, _):
        (line,), _ = await open_load.offer([0.0], send)
    assert (line.num_input, line.num_output, len(line.chunks_s)) == (3, 2, 2)
    assert line.ttft_s >= 0.15
    assert line.itls_s == [pytest.approx(line.tpot_s)]
    assert line.tpot_s > 0.02


ANSWERS = {  # what a server does -> how it is counted
    "HTTP 429": head(429) + b'{"error": {"message": "full"}}',
    "HTTP 502": head(502) + b"<html>",
    "error event: lost": head() + TOKEN + event(error={"code": "lost", "message": "gone"}) + b"data: [DONE]\n\n",
    "broken stream": head() + TOKEN,
    "no usage": head() + TOKEN + b"data: [DONE]\n\n",
    "empty answer": head() + END,
    "not JSON": head() + b"data: {oh\n\n",
    "RemoteProtocolError": b"",
}


async def test_each_failure_is_counted_under_its_kind_and_spoils_no_figure():
    async def one_of_each(i, write):
        write([*ANSWERS.values(), WHOLE][i])

    async with offered(one_of_each) as (send, _):
        lines = [(await open_load.offer([0.0], send))[0][0] for _ in range(len(ANSWERS) + 1)]
    found = open_load.summarize(lines, 1.0, {})
    assert found["errors_by_kind"] == dict.fromkeys(ANSWERS, 1)
    assert found["error_examples"]["HTTP 429"] == "full"
    assert (found["completed"], found["total_output_tokens"]) == (1, 2)


async def test_silence_ends_in_a_timeout():
    async with offered(lambda i, write: asyncio.sleep(0.5)) as (send, _):
        (line,), _ = await open_load.offer([0.0], send, timeout_s=0.1)
    assert line.failure.kind == "timeout"


async def test_a_server_that_is_gone_fails_each_request_by_itself():
    closed = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{closed.sockets[0].getsockname()[1]}"
    closed.close()
    async with http_client(Ask(url)) as client:
        lines, _ = await open_load.offer([0.0, 0.01], lambda i, mark: client.generate("m", [1], 2, mark))
    assert [line.failure.kind for line in lines] == ["ConnectError"] * 2


def parsed(*words):
    parser = argparse.ArgumentParser()
    serve.flags(parser)
    return parser.parse_args(["http://127.0.0.1:1", *words])


def test_flags_are_read_as_vllm_reads_them():
    found = parsed("--request-rate", "2", "--request-rate", "inf", "--goodput", "ttft:200", "tpot:50")
    assert found.request_rate == [2.0, float("inf")]
    assert found.goodput == [("ttft", 200.0), ("tpot", 50.0)]


@pytest.mark.parametrize(
    "words",
    [
        *(["--request-rate", "0"], ["--request-rate", "nan"], ["--burstiness", "inf"], ["--num-prompts", "0"]),
        *(["--goodput", "itl:5"], ["--goodput", "ttft"], ["--goodput", "ttft:x"], ["--random-range-ratio", "1.5"]),
    ],
)
def test_flags_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parsed(*words)
    assert words[0] in capsys.readouterr().err


def result(rate, lines=LINES):
    found = open_load.summarize(lines, 2.0, {})
    own = {"model": "m", "endpoint": "grpc", "num_prompts": 5, "max_concurrency": None, "request_rate": rate}
    return {**own, **found, "generator_cpu_share": 0.9, "num_other_output_len": 1}


def test_a_sweep_is_drawn_against_its_rates_and_one_rate_as_a_distribution(tmp_path):
    swept = serve._curves([result(8.0), result("inf"), result(2.0), result(4.0, LINES[3:])])
    assert [curve.x for curve in swept] == [(2.0, 8.0)] * 4
    assert [set(curve.lines) for curve in swept[:2]] == [{"p50", "p99"}] * 2
    alone = serve._curves([result("inf")])
    assert [set(curve.lines) for curve in alone] == [{"inf/s"}] * 2
    assert all(len(curve.x) == len(curve.lines["inf/s"]) for curve in alone)
    Report("serve", curves=swept).write(tmp_path)
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_reader_must_know_is_said(capsys):
    serve._comment(result(2.0))
    said = capsys.readouterr().err
    for words in (
        "1 of 5 requests left over 50 ms late",
        "90% of a core",
        "2 of 5 requests failed",
        "1 answers did not",
    ):
        assert words in said
