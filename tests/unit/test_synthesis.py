"""Synthetic data from a server that is scripted: every question once, whatever dies, with its provenance."""

# ruff: noqa: F811  # fixtures are imported, and are arguments

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest
import yaml

from tests.commands import ENV, command
from tests.unit.model_server import DROP, VERSIONS, ModelServer, backwards
from tests.unit.synthesis_runs import (  # noqa: F401  fixtures, some of them
    TEMPLATE,
    WORDS,
    _pauses,
    config_of,
    content,
    found_in,
    inputs,
    key_of,
    sources,
    synthesized,
    tokenizer,
    tree,
    wanted,
)
from tests.waiting import WAIT_S
from trinity.cli import main
from trinity.config import SynthesisConfig
from trinity.config.tree import section
from trinity.data.documents import documents
from trinity.errors import ConfigError, DataError, ModelNotFound, Unauthenticated, Unavailable
from trinity.synthesis import asking, journal
from trinity.synthesis.maker import OPEN_SHARDS, Maker, Planner, content_of
from trinity.synthesis.report import table
from trinity.synthesis.run import Run
from trinity.synthesis.styles import hash_of


def test_each_passage_has_one_row_with_its_provenance(inputs, tokenizer, tmp_path):
    with ModelServer() as server:
        config = config_of(inputs, tokenizer, server.url, tmp_path / "out")
        run = synthesized(config)
    found, want = found_in(run), wanted(inputs, tokenizer)
    assert Counter(map(key_of, found)) == Counter(want.keys())
    assert len(want) == len(server.asked) > 12
    asked = {body["messages"][-1]["content"].partition("Passage: ")[2]: body for body in server.asked}
    for row in found:
        made, passage = row["provenance"], want[key_of(row)]
        assert row["text"] == backwards(passage)
        body = asked[passage.strip("\n")]
        assert (made["seed"], made["temperature"]) == (body["seed"], body["temperature"])
        assert (made["template"], made["model"], made["weights_versions"]) == ("backwards", "backwards", VERSIONS)
        assert made["template_hash"] == hash_of(config.templates["backwards"])
        assert made["completion_tokens"] == len(row["text"].split())
    assert {(body["priority"], body["model"], body["max_tokens"]) for body in server.asked} == {(100, "backwards", 64)}
    assert len({body["seed"] for body in server.asked}) == len(want)
    assert {body["messages"][0]["content"].partition(".")[0] for body in server.asked} == {"Plainly", "Briefly"}
    assert set(server.keys) == {"Bearer secret"}


def test_what_is_made_is_a_source_like_any_other(inputs, tokenizer, tmp_path):
    """One shard for each input file; read as training reads it."""
    texts = []
    for packing in ("", ".gz", ".zst"):
        with ModelServer() as server:
            run = synthesized(
                config_of(inputs, tokenizer, server.url, tmp_path / f"out{packing}", output={"packing": packing})
            )
        names = sorted(file.name.partition("-")[0] for file in (run.folder / "data").iterdir())
        assert names == ["a", "b", "c"]
        texts.append(list(documents([str(run.folder / "data")])))
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == len(server.asked)


def test_a_crash_at_any_write_costs_no_row_and_makes_none_twice(inputs, tokenizer, tmp_path, monkeypatch):
    """A second run goes on from whatever the first one has left, to the same bytes."""

    class Crash(BaseException):
        """What no code of ours catches."""

    writes = Counter()
    write, replace = journal.Journal._write, os.replace

    def counted(do, *args, half=False):
        writes["all"] += 1
        if writes["all"] == writes["crash"]:
            if half:  # a line that is cut
                args[0]._file.write(b'{"key": [0, 0')
            raise Crash
        return do(*args)

    monkeypatch.setattr(journal.Journal, "_write", lambda *args: counted(write, *args, half=True))
    monkeypatch.setattr("trinity.synthesis.files.os.replace", lambda *args: counted(replace, *args))
    with ModelServer() as server:
        first = content(synthesized(config_of(inputs, tokenizer, server.url, tmp_path / "first")))
        total, num_asked = writes["all"], len(server.asked)
        for at in sorted({*range(2, total, 4), total - 2, total - 1, total}):
            config = config_of(inputs, tokenizer, server.url, tmp_path / f"out{at}")
            writes.update(all=-writes["all"])
            writes["crash"] = at
            server.asked.clear()
            with pytest.raises(Crash):
                synthesized(config)
            writes["crash"] = -1
            assert not set(sources(tmp_path / f"out{at}")) - set(sources(tmp_path / "first"))
            assert content(synthesized(config)) == first
            assert len(server.asked) <= num_asked + config.server.concurrency * 4, (
                "an answer that was kept is asked again"
            )


def test_killed_and_stopped_commands_go_on(inputs, tokenizer, tmp_path):
    """SIGKILL and SIGTERM while questions are on their way: the same bytes as of a run that nobody disturbed. As jobs in the
    background: a shell has them ignore SIGINT."""
    with ModelServer() as server:
        want = content(synthesized(config_of(inputs, tokenizer, server.url, tmp_path / "want")))
        config = tree(inputs, tokenizer, server.url, tmp_path / "out")
        file = tmp_path / "synthesize.yaml"
        file.write_text(yaml.safe_dump(config))
        for number in (signal.SIGKILL, signal.SIGTERM):
            ended, at = [], len(server.asked) + 5
            # its answer is held until then, so that not all is done before the signal is seen
            server.is_met = lambda n, how=number, at=at, ended=ended: (
                n == at and (ended[0].send_signal(how), ended[0].wait())
            )
            job = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command("synthesize", file)]
            ended.append(subprocess.Popen(job, env=ENV, stderr=subprocess.PIPE, text=True))
            said = ended[0].communicate()[1]
            assert ended[0].returncode == (-9 if number == signal.SIGKILL else 130), said
        assert "the same command goes on" in said
        server.is_met = lambda n: None
        run = synthesized(section(SynthesisConfig, "", config))
    assert content(run) == want


UNWOKEN = """
import queue, signal, sys, threading
from trinity.synthesis.run import _until_none

main = threading.get_ident()

def send():
    while sys._current_frames()[main].f_code.co_name != "tried":
        pass
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
threading.Thread(target=send).start()
next(_until_none(queue.SimpleQueue()))
"""


def test_a_signal_that_does_not_wake_the_wait_ends_it_all_the_same():
    """As one does that comes right before the wait, or to another thread."""
    assert subprocess.run([sys.executable, "-c", UNWOKEN], timeout=WAIT_S).returncode == 7


def test_what_passes_is_asked_again_as_before(inputs, tokenizer, tmp_path, capsys):
    faults = {0: 429, 1: 503, 2: DROP, 3: 502, 7: 408, 8: DROP}
    with ModelServer(faults=faults) as server:
        run = synthesized(config_of(inputs, tokenizer, server.url, tmp_path / "out"))
    assert Counter(map(key_of, found_in(run))) == Counter(wanted(inputs, tokenizer).keys())
    again = Counter(json.dumps(body) for body in server.asked)
    assert again.total() - len(again) == len(faults), "a question that is asked again is the same, its seed included"
    said = capsys.readouterr().err
    assert "is away or full" in said
    assert "answers again" in said


def test_as_many_questions_at_a_time_as_are_allowed(inputs, tokenizer, tmp_path):
    """The first three wait for one another; there is never a fourth."""
    together = threading.Barrier(3)
    with ModelServer(is_met=lambda number: number < 3 and together.wait(WAIT_S)) as server:
        synthesized(config_of(inputs, tokenizer, server.url, tmp_path / "out"))
    assert server.most == 3


def test_a_server_that_is_gone_is_named_and_nothing_is_lost(inputs, tokenizer, tmp_path, capsys):
    with ModelServer() as server:
        config = config_of(inputs, tokenizer, server.url, tmp_path / "out", server={"patience_s": 0, "concurrency": 1})
        file = tmp_path / "synthesize.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        server.faults = dict.fromkeys(range(8, 1000), DROP)
        assert main(["synthesize", str(file)]) == 2
        said = capsys.readouterr()
        assert f"the server at {server.url} has answered nothing" in said.err
        assert "start the same command again" in said.err
        assert "asked" in said.out
        server.faults = {}
        num_asked = len(server.asked)
        assert main(["synthesize", str(file)]) == 0
        assert len(server.asked) == num_asked + len(wanted(inputs, tokenizer)) - 8
    assert len(found_in(Run(config))) == len(wanted(inputs, tokenizer))


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (401, Unauthenticated, "refuses the key"),
        (404, ModelNotFound, "has no 'backwards'"),
        (400, ConfigError, "refuses every question: 400 fault 400"),
    ],
)
def test_settings_that_the_server_refuses_end_the_run(inputs, tokenizer, tmp_path, fault, error, says):
    with ModelServer(faults={"all": fault}) as server:
        config = config_of(inputs, tokenizer, server.url, tmp_path / "out", server={"concurrency": 1})
        with pytest.raises(error, match=says):
            synthesized(config)
        assert len(server.asked) <= asking.FIRST_REFUSALS + OPEN_SHARDS
        num_refused, server.faults = len(server.asked), {}
        assert len(found_in(synthesized(config))) >= len(wanted(inputs, tokenizer)) - num_refused


def test_rows_that_fail_are_set_aside_with_their_reason(inputs, tokenizer, tmp_path):
    faults = {4: 400, 5: 500, 6: 500, 7: 500, 9: {"choices": []}, 10: "no object", 11: {}}
    with ModelServer(faults=faults) as server:
        config = config_of(inputs, tokenizer, server.url, tmp_path / "out", server={"concurrency": 1})
        run = synthesized(config)
    left = found_in(run, "left_out")
    assert [row["reason"] for row in left] == ["failed"] * 3
    assert [row["said"].partition(":")[0] for row in left] == ["refused", "failed", "failed"]
    assert Counter(map(key_of, [*left, *found_in(run)])) == Counter(wanted(inputs, tokenizer).keys())
    [line] = [line.split() for line in table(run.records()).splitlines() if line.startswith("all")]
    assert list(map(int, line[1:4])) == [len(wanted(inputs, tokenizer)), len(found_in(run)), 3]


def test_a_full_disk_is_named_and_the_run_goes_on(inputs, tokenizer, tmp_path, monkeypatch):
    fsync, num = os.fsync, Counter()

    def full(handle):
        num["synced"] += 1
        if num["synced"] == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(handle)

    with ModelServer() as server:
        config = config_of(inputs, tokenizer, server.url, tmp_path / "out")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(
            Unavailable, match=r"out/.* cannot be written: No space left on device; what is made is kept"
        ):
            synthesized(config)
        num_asked = len(server.asked)
        run = synthesized(config)
    assert len(found_in(run)) == len(wanted(inputs, tokenizer))
    assert len(server.asked) <= num_asked + config.server.concurrency * 4


def test_an_added_file_alone_is_made(inputs, tokenizer, tmp_path):
    with ModelServer() as server:
        config = config_of(inputs, tokenizer, server.url, tmp_path / "out")
        before = content(synthesized(config))
        (inputs / "aa.txt").write_text(added := " ".join(WORDS))
        server.asked.clear()
        run = synthesized(config)
    assert content(run).items() > before.items()
    assert [body["messages"][-1]["content"].partition("Passage: ")[2] for body in server.asked] == [added]


def test_duplicates_are_told_across_shards_and_runs(inputs, tokenizer, tmp_path):
    """The first in the order of the files stays; what an earlier run kept counts."""
    copy = (inputs / "b.txt").read_text()
    (inputs / "d.txt").write_text("\n" + copy)
    with ModelServer() as server:
        config = config_of(inputs, tokenizer, server.url, tmp_path / "out")
        run = synthesized(config)
        left = found_in(run, "left_out")
        (inputs / "e.txt").write_text(copy + "\n")
        later = found_in(synthesized(config), "left_out")
    assert {row["provenance"]["source"] for row in left} == {str(inputs / "d.txt")}
    assert {row["reason"] for row in left} <= {"duplicate", "near duplicate"}
    assert {row["provenance"]["source"] for row in later} == {str(inputs / "d.txt"), str(inputs / "e.txt")}


def test_chats_are_made_of_answers_with_turns(inputs, tokenizer, tmp_path):
    def answer(text):
        return (
            f"Question: what of {text.split()[0]}?\nAnswer: {backwards(text)}" if "river" in text else backwards(text)
        )

    chat = {**TEMPLATE, "has_turns": True}
    with ModelServer(answer) as server:
        config = config_of(
            inputs, tokenizer, server.url, tmp_path / "out", output={"rows": "messages"}, templates={"backwards": chat}
        )
        run = synthesized(config)
    made = found_in(run)
    assert made
    assert all([each["role"] for each in row["messages"]] == ["user", "assistant"] for row in made)
    assert {row["reason"] for row in found_in(run, "left_out")} == {"no turns"}


def test_a_folder_is_of_one_run_and_one_set_of_settings(inputs, tokenizer, tmp_path):
    with ModelServer() as server:
        run = synthesized(config_of(inputs, tokenizer, server.url, tmp_path / "out"))
        with pytest.raises(ConfigError, match=r"begun with other settings: seed is 0, not 1\."):
            synthesized(config_of(inputs, tokenizer, server.url, tmp_path / "out", seed=1))
        with pytest.raises(ConfigError, match=r"server\.model is 'backwards', not 'other'"):
            synthesized(run.config, "other")
        with (run.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(ConfigError, match="another run writes to"):
                synthesized(run.config)
        os.utime(inputs / "b.txt", (0, 0))
        synthesized(run.config)
        (inputs / "b.txt").write_text("another text")
        with pytest.raises(DataError, match=r"b\.txt has changed since .*data/b-"):
            synthesized(run.config)


def test_a_file_that_changed_under_its_journal_is_begun_anew(inputs, tokenizer, tmp_path):
    """An old answer to other words is no answer."""
    with ModelServer(faults=dict.fromkeys(range(3, 99), DROP)) as server:
        config = config_of(inputs, tokenizer, server.url, tmp_path / "out", server={"patience_s": 0, "concurrency": 1})
        with pytest.raises(Unavailable):
            synthesized(config)
        (inputs / "a.jsonl").write_text(json.dumps({"text": " ".join(WORDS)}) + "\n")
        server.faults = {}
        run = synthesized(config)
    [row] = [row for row in found_in(run) if row["provenance"]["source"].endswith("a.jsonl")]
    assert row["text"] == backwards(" ".join(WORDS))
    assert Maker(config, server.url, None, "m", 1).head(run.shards[0])["sha256"] == content_of(str(inputs / "a.jsonl"))


def test_questions_do_not_depend_on_what_is_around_a_passage(inputs, tokenizer, tmp_path):
    """The same passage in another file, at another place, is asked with the same seed, and other seeds give others."""
    plan = [Planner(config_of(inputs, tokenizer, "http://x", tmp_path / "out", seed=seed)) for seed in (0, 0, 1)]
    run = Run(plan[0].config)
    asked = [
        {each.passage: (each.seed, each.prompt) for shard in run.shards for each in planner.questions(shard, Counter())}
        for planner in plan
    ]
    assert asked[0] == asked[1]
    assert all(asked[0][passage][0] != asked[2][passage][0] for passage in asked[0])
