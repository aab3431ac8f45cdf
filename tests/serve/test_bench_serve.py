"""`trinity bench serve` as a user calls it, against a gateway over the fake engine, on both of its ports."""

import asyncio
import json

import pytest
from fake import FakeEngine, fake_tokenizer

from serving.engine import LocalClient
from trinity.bench import roles
from trinity.bench.clients import CLIENTS, Ask
from trinity.cli import main
from trinity.errors import Unavailable

STATISTICS = [
    f"{key}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for key in ("mean", "median", "std", "p99")
]
COUNTS = {"completed": 6, "failed": 0, "total_input_tokens": 48, "total_output_tokens": 24, "num_other_output_len": 0}
RATES = ("request_throughput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s")


async def bench(out, url, *words):
    """-> exit code and the JSON that was written, None without any. In a thread: the server needs this loop."""
    usual = ["--quick", "--vocab-size", str(fake_tokenizer().vocab_size), "--out", str(out)]
    code = await asyncio.to_thread(main, ["bench", "serve", url, *usual, *words])
    path = out / "serve.json"
    return code, json.loads(path.read_text()) if path.is_file() else None


def address(server, endpoint):
    return server.url if endpoint == "completions" else f"http://{server.grpc_address}"


@pytest.mark.parametrize("endpoint", ["completions", "grpc"])
async def test_a_quick_sweep_leaves_figures_and_a_picture(start, endpoint, tmp_path, capsys):
    async with start(FakeEngine(delay_s=0.02)) as server:
        words = ("--endpoint", endpoint, "--goodput", "ttft:5000", "tpot:5")
        code, report = await bench(tmp_path, address(server, endpoint), *words)
    assert code == 0
    assert [result["request_rate"] for result in report["results"]] == [40, 80]
    for result in report["results"]:
        assert {name: result[name] for name in COUNTS} == COUNTS
        assert all(result[name] > 0 for name in (*STATISTICS, *RATES, "duration", "max_concurrent_requests"))
        assert result["median_itl_ms"] > 10, "a token takes 20 ms there"
        assert result["request_goodput"] == 0, "and none keeps to 5 ms"
    assert {"machine", "versions", "commit"} <= report.keys()
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")
    assert "p99_ttft_ms" in capsys.readouterr().out


@pytest.mark.parametrize("endpoint", ["completions", "grpc"])
async def test_the_server_tells_what_prompts_it_takes(server, endpoint):
    async with CLIENTS[endpoint](Ask(address(server, endpoint))) as client:
        card = await client.card()
    assert (card.model, card.vocab_size, card.max_model_len) == ("fake", fake_tokenizer().vocab_size, 128)
    assert "7" in card.version


@pytest.mark.parametrize("endpoint", ["completions", "grpc"])
async def test_what_is_sent_is_what_was_asked_for(start, endpoint, tmp_path):
    engine = FakeEngine()
    words = ("--input-len", "12", "--output-len", "6", "--random-range-ratio", "0.5", "--request-rate", "inf")
    async with start(engine) as server:
        code, report = await bench(tmp_path, address(server, endpoint), "--endpoint", endpoint, *words)
    (result,) = report["results"]
    lengths = [params.max_tokens for params in engine.seen[1:]]  # the first is the trial
    assert (code, result["request_rate"], result["total_output_tokens"]) == (0, "inf", sum(lengths))
    assert len(lengths) == 6
    assert set(lengths) <= set(range(3, 10))
    assert all(params.ignore_eos and params.greedy for params in engine.seen)
    assert 6 * 6 <= result["total_input_tokens"] <= 6 * 18


class Tired(FakeEngine):
    """Answers so many requests, then none."""

    def __init__(self, num):
        super().__init__()
        self.num = num

    async def generate(self, *arguments, **more):
        self.num -= 1
        if self.num < 0:
            raise Unavailable("a shard is gone")
        async for delta in super().generate(*arguments, **more):
            yield delta


@pytest.mark.parametrize(("endpoint", "kind"), [("completions", "HTTP 503"), ("grpc", "UNAVAILABLE")])
async def test_failures_are_shown_and_only_all_of_them_fail_the_bench(start, endpoint, kind, tmp_path, capsys):
    for answered, code in ((3, 0), (1, 2)):  # the trial is one of them
        async with start(Tired(answered)) as server:
            found, report = await bench(tmp_path, address(server, endpoint), "--endpoint", endpoint)
        assert found == code
        assert sum(result["completed"] for result in report["results"]) == answered - 1
        assert sum(result["errors_by_kind"].get(kind, 0) for result in report["results"]) == 13 - answered
        said = capsys.readouterr()
        assert "a shard is gone" in said.out
        assert ("all requests failed" in said.err) == (code == 2)
        assert (tmp_path / "serve.png").is_file() == (code == 0), "no picture of another run stays beside the figures"


@pytest.mark.parametrize("endpoint", ["completions", "grpc"])
async def test_the_key_comes_from_a_file_and_stays_out_of_the_report(start, endpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRINITY_API_KEY", raising=False)
    key = tmp_path / "key"
    key.write_text("a-secret-key\n")
    async with start(api_key="a-secret-key") as server:
        url = address(server, endpoint)
        code, report = await bench(tmp_path, url, "--endpoint", endpoint)
        assert (code, report) == (2, None)
        assert "authorization" in capsys.readouterr().err.lower()
        code, report = await bench(tmp_path, url, "--endpoint", endpoint, "--api-key-file", str(key))
    assert code == 0
    assert "a-secret-key" not in json.dumps(report) + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--input-len", "120", "--output-len", "20"], "140 tokens"),
        (["--model", "other"], "lists no model other"),
        (["--endpoint", "grpc", "--model", "other"], "lists no model other"),
        (["--vocab-size", "100000"], "token id"),
    ],
)
async def test_what_cannot_work_ends_before_the_load(server, words, says, tmp_path, capsys):
    url = address(server, "grpc" if "grpc" in words else "completions")
    assert await bench(tmp_path, url, *words) == (2, None)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("endpoint", ["completions", "grpc"])
async def test_nobody_there_is_said_in_a_sentence(endpoint, tmp_path, capsys):
    assert await bench(tmp_path, "http://127.0.0.1:9", "--endpoint", endpoint) == (2, None)
    assert "127.0.0.1:9" in capsys.readouterr().err


async def test_urgent_requests_beside_a_flood(start, tmp_path, capsys):
    engine = FakeEngine(delay_s=0.01)
    words = ["bench", "priority", "--quick", "--vocab-size", str(fake_tokenizer().vocab_size), "--out", str(tmp_path)]
    async with start(engine) as server:
        assert await asyncio.to_thread(main, [*words, server.url]) == 0
    report = json.loads((tmp_path / "priority.json").read_text())
    (found,) = report["results"]
    assert [len(found[arm]) for arm in ("idle", "beside the flood", "passes")] == [3, 3, 1]
    assert found["others"][0] > 0
    assert {params.priority for params in engine.seen} == {0, 5}
    assert "p99 beside the flood / what it may be" in capsys.readouterr().out


async def test_short_requests_beside_long_ones_while_roles_change(start, tmp_path, capsys, monkeypatch):
    told = []

    async def note(client, names):
        told.append(names)

    monkeypatch.setattr(LocalClient, "set_roles", note)
    monkeypatch.setattr(roles, "SETTLE_S", 0.0)
    engine = FakeEngine(max_model_len=512, delay_s=0.01)
    words = ["bench", "serve", "--roles", "--quick", "--long-len", "300", "--out", str(tmp_path)]
    async with start(engine) as server:
        assert await asyncio.to_thread(main, [*words, "--vocab-size", "260", server.url]) == 0
    assert told == [["prefill", "decode"], ["both"], ["prefill", "decode"]]
    (found,) = json.loads((tmp_path / "serve-roles.json").read_text())["results"]
    assert [len(each["itl"]) for each in found.values()] == [4 * 3] * 3
    assert [min(each["long"]) > 0 for each in found.values()] == [False, True, True]
    assert sorted({len(prompt) for prompt in engine.prompts}) == [10, 300]
    assert "p99 ITL of short requests, apart / alone" in capsys.readouterr().out
