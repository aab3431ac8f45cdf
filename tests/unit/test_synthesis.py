"""Synthetic data from a server that is scripted: every question once, whatever dies, with its provenance."""

import errno
import fcntl
import gzip
import json
import os
import random
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.commands import ENV, command
from tests.unit.model_server import DROP, VERSIONS, ModelServer, backwards
from tests.waiting import WAIT_S
from trinity.cli import main
from trinity.config import SynthesisConfig
from trinity.config.tree import section
from trinity.data.documents import documents
from trinity.data.formats import rows
from trinity.errors import ConfigError, DataError, ModelNotFound, Unauthenticated, Unavailable
from trinity.synthesis import asking, journal
from trinity.synthesis.maker import OPEN_SHARDS, Maker, Planner, content_of
from trinity.synthesis.passages import passages
from trinity.synthesis.report import table
from trinity.synthesis.run import Run, made_here
from trinity.synthesis.styles import hash_of, templates_of
from trinity.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
WORDS = [
    "river", "stone", "light", "garden", "winter", "copper", "signal", "harbour",
    "meadow", "lantern", "orchard", "thunder", "velvet", "compass", "marble",
]  # fmt: skip
PROMPT = "{manner}. Passage: {text}"
TEMPLATE = {"prompt": PROMPT, "values": {"manner": ["Plainly", "Briefly"]}, "temperature": 0.6, "max_tokens": 64}
MOST = 20  # tokens of a passage


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(iter([" ".join(WORDS) * 20]), 400).save(folder)
    return folder


@pytest.fixture
def inputs(tmp_path):
    """Three files: rows, a text of several paragraphs, packed rows."""
    folder, chance = tmp_path / "in", random.Random(0)
    folder.mkdir()

    def text(num_paragraphs):
        return "\n\n".join(" ".join(chance.choices(WORDS, k=14)) for _ in range(num_paragraphs))

    def lines():
        return "".join(json.dumps({"text": text(2)}) + "\n" for _ in range(4))

    (folder / "a.jsonl").write_text(lines())
    (folder / "b.txt").write_text(text(5))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines().encode(), mtime=0))
    return folder


@pytest.fixture(autouse=True)
def _pauses(monkeypatch):
    monkeypatch.setattr(asking, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(asking, "SAY_AFTER_S", 0)


def tree(inputs, tokenizer, url, out, **more):
    given = {
        "input": {"paths": [str(inputs)], "tokenizer": str(tokenizer), "chunk_tokens": MOST, "min_chunk_tokens": 4},
        "server": {"url": url, "concurrency": 3},
        "styles": ["backwards"],
        "templates": {"backwards": TEMPLATE},
        "output": {"dir": str(out), "packing": ".zst"},
    }
    for name, values in more.items():
        given[name] = {**given[name], **values} if name in given and isinstance(values, dict) else values
    return given


def config_of(*args, **more):
    return section(SynthesisConfig, "", tree(*args, **more))


def synthesized(config, model="backwards"):
    """Run to the end; -> the run."""
    run = Run(config)
    with run.owned(model):
        maker = Maker(config, config.server.url, "secret", model, config.server.concurrency)
        run.synthesize(lambda shards: made_here(maker, shards))
    return run


def found_in(run, what="data"):
    """Every row in that folder."""
    return [row for file in sorted((run.folder / what).iterdir()) for _, row in rows(file)]


def content(run):
    """The bytes of everything that a finished run has, but for when its files were looked at."""
    return {
        file.relative_to(run.folder): file.read_bytes()
        for name in ("data", "left_out", "partial")
        for file in sorted((run.folder / name).rglob("*"))
        if file.is_file()
    }


def sources(out):
    """The documents that a training would read of a run so far."""
    return list(documents([str(out / "data")])) if list(out.glob("data/[!.]*")) else []


def wanted(inputs, tokenizer):
    """(file, document, passage) -> the passage."""
    core = Tokenizer.load(tokenizer)
    return {
        (str(file), n, m): passage
        for file in sorted(inputs.iterdir())
        for n, text in enumerate(documents([str(file)]))
        for m, passage in enumerate(passages(text, core, MOST))
    }


def key_of(row):
    made = row["provenance"]
    return made["source"], made["document"], made["passage"]


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
    """SIGKILL and SIGTERM while questions are on their way: the same bytes as of a run that nobody disturbed."""
    with ModelServer() as server:
        want = content(synthesized(config_of(inputs, tokenizer, server.url, tmp_path / "want")))
        config = tree(inputs, tokenizer, server.url, tmp_path / "out")
        file = tmp_path / "synthesize.yaml"
        file.write_text(yaml.safe_dump(config))
        for number in (signal.SIGKILL, signal.SIGTERM):
            ended, at = [], len(server.asked) + 5
            server.is_met = lambda n, number=number, at=at, ended=ended: n == at and (ended[0].send_signal(number))
            ended.append(subprocess.Popen(command("synthesize", file), env=ENV, stderr=subprocess.PIPE, text=True))
            said = ended[0].communicate()[1]
            assert ended[0].returncode == (-9 if number == signal.SIGKILL else 130), said
        assert "the same command goes on" in said
        server.is_met = lambda n: None
        run = synthesized(section(SynthesisConfig, "", config))
    assert content(run) == want


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


def test_the_example_in_the_documents_is_whole():
    """All but the tokenizer of a run that the reader has."""
    config = SynthesisConfig.load(ROOT / "docs" / "synthesize.yaml")
    assert list(templates_of(config)) == ["rephrase", "qa", "plain"]
    assert SynthesisConfig.model_validate(config.model_dump()) == config


def test_a_dry_run_shows_prompts_and_asks_nobody(inputs, tokenizer, tmp_path, capsys):
    file = tmp_path / "synthesize.yaml"
    file.write_text(yaml.safe_dump(tree(inputs, tokenizer, "http://127.0.0.1:9", tmp_path / "out")))
    assert main(["synthesize", str(file), "--dry-run", "--styles", "[backwards, rephrase]"]) == 0
    said = capsys.readouterr().out
    assert "=== backwards:" in said
    assert "Rewrite the following text" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"styles": ["poem"]}, "styles has 'poem'; there are rephrase, qa, table"),
        ({"styles": ["qa"]}, "templates has 'backwards', which styles does not name"),
        ({"styles": []}, "styles: should name one style or more"),
        ({"styles_per_passage": 2}, "styles_per_passage is 2; there are 1 styles"),
        ({"output": {"rows": "messages"}}, "style 'backwards' has no turns of a chat"),
        ({"templates": {"backwards": {"prompt": "no place"}}}, "the prompt has no {text}"),
        ({"templates": {"backwards": {"prompt": "{text} {tone}"}}}, "placeholder {tone} is not known, only text"),
        ({"templates": {"backwards": {"prompt": "{text.__class__}"}}}, "{text.__class__} is no placeholder"),
        ({"templates": {"backwards": {"prompt": "{text!r}"}}}, "is no placeholder; give a plain name"),
        ({"templates": {"backwards": {"prompt": "{text} {"}}}, "templates.backwards: "),
        ({"templates": {"backwards": {"prompt": "{text}", "values": {"tone": ["dry"]}}}}, "values has tone, which no"),
        ({"templates": {"backwards": {"prompt": "{text} {a}", "values": {"a": []}}}}, "values has nothing for a"),
        ({"templates": {"backwards": {"prompt": "{text}", "promptt": "x"}}}, "templates.backwards.promptt: Extra inputs"),
        ({"templates": {"backwards": {"prompt": "{text}", "length_ratio": [2, 1]}}}, "length_ratio [2.0, 1.0]"),
        ({"server": {"url": None}}, "give either url, a server's address, or checkpoint"),
        ({"server": {"url": "127.0.0.1:8000"}}, "server.url: should begin with http://"),
        (
            {"server": {"url": None, "checkpoint": "x"}, "workers": 2, "cluster": {"address": "auto"}},
            "a checkpoint is served on this machine's loopback only",
        ),
        ({"server": {"urll": "x"}}, "unknown setting 'server.urll'; did you mean 'server.url'?"),
        ({"input": {"tokenizer": None}}, "input.tokenizer must say by which tokens"),
        ({"input": {"tokenizer": "/nowhere"}}, "tokenizer /nowhere does not exist"),
        ({"input": {"paths": ["/nowhere/*.txt"]}}, "no text file matches '/nowhere/*.txt'"),
        ({"input": {"min_chunk_tokens": 99}}, "min_chunk_tokens 99 is more than chunk_tokens 20"),
        ({"checks": {"benchmarks": ["/nowhere"]}}, "no text file matches '/nowhere'"),
        ({"checks": {"refusals": [" "]}}, "a phrase is empty"),
        ({"checks": {"max_copied": 1.5}}, "checks.max_copied: Input should be less than or equal to 1"),
        ({"server": {"model": "other"}}, "model 'other' is not served at"),
        ({"input": {"chunk_tokens": 5000}}, "backwards takes 4,096: lower input.chunk_tokens"),
        ({"server": {"api_key_file": "/nowhere"}}, "key file /nowhere does not exist"),
        ({"input": {"text_field": "body"}}, "a.jsonl has no text in 'body', only text"),
        ({"server": {"url": "http://127.0.0.1:9"}}, "no server at http://127.0.0.1:9"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_named_before_anybody_is_asked(inputs, tokenizer, tmp_path, capsys, more, says):
    file = tmp_path / "synthesize.yaml"
    with ModelServer() as server:
        file.write_text(yaml.safe_dump(tree(inputs, tokenizer, server.url, tmp_path / "out", **more)))
        assert main(["synthesize", str(file)]) == 2
    assert says in capsys.readouterr().err
    assert not server.asked


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
