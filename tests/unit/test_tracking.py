"""Trackers hear of each step once, under one name however often a run goes on, and cost a run nothing, whatever they do."""

import json
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fake_trackers import LIBRARIES, FakeWandb
from tests.waiting import until
from trinity.cli import main
from trinity.config import Config, TrackConfig
from trinity.errors import ConfigError, DataError
from trinity.observability.run_history import RunHistory, note_export, read_stages, stages_after, write_stages
from trinity.observability.tracking import feeder
from trinity.observability.tracking.base import TrackedRun
from trinity.observability.tracking.feeder import Feeder, close
from trinity.observability.tracking.run import _shown, told_of, tracked
from trinity.observability.train_log import _cut


def row(step, **changed):
    values = {"loss": 5.0 / step, "tokens": 1024, "seconds": 0.5, "lrs": {"muon": 1e-3}, "grad_norm": None}
    return {"step": step, **(values | changed)}


def write(folder, *rows):
    """Rows in a run's log, cut first as by a run that goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = _cut(folder / "metrics.jsonl", rows[0]["step"], "val_loss" in rows[0])
    for each in rows:
        lines.write(each)
    lines.close()


SETTINGS = {"seed": 3, "long": "x" * 1000, **{f"more.{n}": n for n in range(150)}}


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch):
    fake = LIBRARIES[request.param]()
    monkeypatch.setitem(sys.modules, request.param, fake)
    if request.param == "mlflow":
        monkeypatch.setitem(sys.modules, "mlflow.entities", fake.entities)
    return fake


def at(library, root, goes_on=False, **settings):
    found = {"project": "essays", "tags": ("toy", "first")} | settings
    return tracked(TrackConfig(to=(library.__name__,), **found), root, SETTINGS, goes_on)


def test_a_library_hears_of_a_run(library, tmp_path):
    with at(library, tmp_path / "mine"):
        write(
            tmp_path / "mine",
            row(1),
            row(2, retries={"deadline": 1}),
            {"step": 2, "val_loss": 4.5, "val_losses": {"web": 4.0}},
            row(3),
        )
    [run] = library.runs
    assert run.facts == ("essays", "mine", ["toy", "first"], 3)
    assert [step for step, _ in run.rows] == [1, 2, 2, 3]
    assert run.rows[0][1] == {
        "train/loss": 5, "train/tokens": 1024, "train/seconds": 0.5, "train/lrs/muon": 1e-3, "train/tokens_per_s": 2048
    }  # fmt: skip
    assert run.rows[1][1]["train/retries/deadline"] == 1
    assert run.rows[2][1] == {"val/loss": 4.5, "val/loss/web": 4.0}
    assert run.ends == 1


def test_a_run_that_goes_on_goes_on_there_and_replays_are_not_told(library, tmp_path):
    with at(library, tmp_path):
        write(tmp_path, *map(row, range(1, 7)))
    with at(library, tmp_path, goes_on=True):  # from a checkpoint at 3, and killed once more
        write(tmp_path, row(4), row(5))
    with at(library, tmp_path, goes_on=True):
        write(tmp_path, *map(row, range(4, 9)), {"step": 8, "val_loss": 1.0})
    [run] = library.runs
    assert [step for step, values in run.rows if "train/loss" in values] == list(range(1, 9))
    assert [step for step, values in run.rows if "val/loss" in values] == [8]
    assert run.ends == 2, "one time there was nothing to tell"
    with at(library, tmp_path):
        write(tmp_path, row(1))
    assert [step for step, _ in library.runs[1].rows] == [1], "one that begins anew is another"
    assert len(library.runs) == 2


def test_stages_are_one_run_with_marks(library, tmp_path):
    folders = [tmp_path / "1-pre", tmp_path / "2-anneal"]
    write_stages(tmp_path, [("pre", folders[0], 3, 64), ("anneal", folders[1], 2, 32)])
    with at(library, tmp_path):
        write(folders[0], *map(row, (1, 2, 3)), {"step": 3, "val_loss": 2.0})
        note_export(tmp_path, 3, "TrueBase")
        write(folders[1], row(1), row(2))
        note_export(tmp_path, 5, "Base")
        note_export(tmp_path, 5, "Base")
    [run] = library.runs
    assert [step for step, values in run.rows if "train/loss" in values] == [1, 2, 3, 4, 5]
    assert [values["stage"] for _, values in run.rows if "stage" in values] == [1, 1, 1, 2, 2]
    assert run.marks == {"stage/pre": 0, "export/TrueBase": 3, "stage/anneal": 3, "export/Base": 5}
    with at(library, tmp_path):  # all of it anew, where it was before
        write(folders[0], row(1))
        note_export(tmp_path, 3, "TrueBase", is_first=True)
    assert library.runs[1].marks == {"stage/pre": 0, "export/TrueBase": 3}


def test_scores_and_gates_are_told(library, tmp_path):
    """Those of the weights that a run begins with, too."""
    scores = [{"task": "niah", "mean": 0.25, "passes": False}, {"task": "arc,easy", "mean": 0.5}]
    arc = "score/arc_easy" if library.__name__ == "mlflow" else "score/arc,easy"  # which refuses the comma
    with at(library, tmp_path):
        write(tmp_path, {"step": 0, "scores": scores}, row(1), {"step": 1, "scores": scores[1:]})
    [run] = library.runs
    assert run.rows[0] == (0, {"score/niah": 0.25, arc: 0.5, "gate/niah": 0})
    assert run.rows[2] == (1, {arc: 0.5})


# -- what a tracker may do


class Recorder:
    """A tracker that may hang or fail: `gate` is waited for, `failures` errors are raised before a call succeeds."""

    def __init__(self, failures=0):
        self.calls, self.failures, self.gate = [], failures, threading.Event()
        self.gate.set()

    def _call(self, *call):
        self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise OSError("the server is away")
        self.calls.append(call)

    def begin(self, run, known_as):
        self._call("begin", known_as)
        return known_as or "first"

    def log(self, values, step):
        self._call("log", step)

    def mark(self, what, step):
        self._call("mark", what, step)

    def finish(self):
        self._call("finish")


def fed(recorder, root, goes_on=False):
    (root / "track").mkdir(exist_ok=True)
    run = TrackedRun(root / "track", "p", "n", (), {})
    found = Feeder("theirs", recorder, run, RunHistory(root, goes_on), goes_on)
    found.start()
    return found


def test_errors_are_said_once_and_counted_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feeder, "FIRST_PAUSE_S", 0.0)
    recorder = Recorder(failures=4)
    found = fed(recorder, tmp_path)
    write(tmp_path, row(1), row(2))
    close([found])
    assert recorder.calls == [("begin", None), ("log", 1), ("log", 2), ("finish",)]
    said = capsys.readouterr().err
    assert said.count("theirs was not told (OSError: the server is away)") == 1
    assert "theirs was told everything; 4 calls failed" in said


def test_one_that_hangs_holds_up_nobody_and_is_told_the_rest_later(tmp_path, capsys):
    hangs, works = Recorder(), Recorder()
    hangs.gate.clear()
    (tmp_path / "a").mkdir()
    both = [fed(hangs, tmp_path), fed(works, tmp_path)]
    write(tmp_path, *map(row, range(1, 40)))
    until(lambda: len(works.calls) == 40)
    close(both, within_s=0.2)
    assert works.calls[-1] == ("finish",)
    assert "theirs was told up to step 0; the command with --resume tells it the rest" in capsys.readouterr().err
    hangs.gate.set()  # it comes back too late, and is left alone
    both[0]._thread.join(10)
    later = Recorder()
    (tmp_path / "track" / "theirs.json").unlink()
    close([fed(later, tmp_path, goes_on=True)])
    assert [call[1] for call in later.calls if call[0] == "log"] == list(range(1, 40))


def test_a_killed_command_tells_the_rest_under_the_same_name(tmp_path):
    first = Recorder()
    found = fed(first, tmp_path)
    write(tmp_path, row(1), row(2))
    until(lambda: ("log", 2) in first.calls and json.loads((tmp_path / "track/theirs.json").read_text())["step"] == 2)
    found._given_up.set()  # as with a kill: no finish
    found.end()
    write(tmp_path, row(2), row(3))
    second = Recorder()
    close([fed(second, tmp_path, goes_on=True)])
    assert second.calls == [("begin", "first"), ("log", 3), ("finish",)]
    (tmp_path / "track" / "theirs.json").write_text('{"step": 1')
    third = Recorder()
    close([fed(third, tmp_path, goes_on=True)])
    assert third.calls[0] == ("begin", None), "a torn note is none"


def test_a_run_that_takes_no_step_leaves_no_trace(tmp_path):
    write(tmp_path, row(1))  # of a run before this one
    recorder = Recorder()
    close([fed(recorder, tmp_path)])
    assert recorder.calls == []


def test_a_file_is_a_tracker_too(tmp_path):
    config = TrackConfig(to="jsonl", tags="toy")
    for first, last in ((1, 3), (3, 5)):
        with tracked(config, tmp_path, SETTINGS, goes_on=first > 1):
            write(tmp_path, *map(row, range(first, last + 1)))
    lines = [json.loads(line) for line in (tmp_path / "track/jsonl.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4, 5]
    begun = [line for line in lines if "run" in line]
    assert len({line["run"] for line in begun}) == 1
    assert (begun[0]["settings"]["seed"], begun[0]["tags"], begun[0]["name"]) == (3, ["toy"], tmp_path.name)


# -- the history


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["step", "val", "read", "replay", "next"]), max_size=40))
def test_a_history_is_whole_and_in_order_however_it_is_written_and_read(tmp_path_factory, moves):
    root = tmp_path_factory.mktemp("run")
    folders = [root / f"{n}-s{n}" for n in range(4)]
    write_stages(root, [(f"s{n}", folder, 50, 8) for n, folder in enumerate(folders)])
    history, told, seen, stage, step = RunHistory(root, goes_on=False), [], (0, 0, 0), 0, 0

    def read():
        nonlocal seen
        for event in history.new():
            if event.place > seen:
                seen = event.place
                told.append((event.step, event.kind))

    want, has_val = [], False
    for move in moves:
        if move == "read":
            read()
        elif move == "step" or (move == "replay" and step):
            step, has_val = (step + 1, False) if move == "step" else (step, has_val)
            write(folders[stage], row(step), *([{"step": step, "val_loss": 1.0}] if has_val else []))
            place = (50 * stage + step, "step")
            want += [] if place in want else [(50 * stage, "stage"), place] if step == 1 else [place]
        elif move == "val" and step and not has_val:
            has_val = True
            with (folders[stage] / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "val_loss": 1.0}) + "\n")
            place = (50 * stage + step, "validation")
            want += [] if place in want else [place]
        elif move == "next" and step and stage < 3:
            note_export(root, 50 * (stage + 1), f"s{stage}")
            want.append((50 * (stage + 1), "export"))
            stage, step, has_val = stage + 1, 0, False
    read()
    assert told == want


def test_stages_know_what_comes_after_them(tmp_path):
    folders = [tmp_path / f"{n}-{name}" for n, name in enumerate("abc", 1)]
    write_stages(tmp_path, [(folder.name[2:], folder, 10 * n, 64) for n, folder in enumerate(folders, 1)])
    here, after = stages_after(folders[1])
    assert (here.words, here.first, [each.first for each in after]) == ("stage 2 of 3, b", 10, [30])
    alone, none = stages_after(tmp_path / "else")
    assert (alone.words, none) == ("", ())
    (tmp_path / "stages.json").write_text('[{"name": "a"}]')
    with pytest.raises(DataError, match=r"stages\.json is no list of stages"):
        read_stages(tmp_path)


# -- before a step is spent


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_is_not_installed_is_named_before_a_step(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.entities", None)
    monkeypatch.setattr("trinity.commands.train._trained", lambda *_: pytest.fail("a step was spent"))
    flags = ["--train.out_dir", str(tmp_path), "--track.to", name]
    assert main(["train", "tiny", *flags]) == 2
    assert f"pip install 'trinity-moe[{name}]'" in capsys.readouterr().err


def test_wandb_without_a_key_is_named_but_not_one_without_a_network(tmp_path, monkeypatch):
    for mode, key in (("offline", None), ("online", "unreachable"), ("online", "k")):
        monkeypatch.setitem(sys.modules, "wandb", FakeWandb(mode, key))
        with tracked(TrackConfig(to="wandb"), tmp_path, {}, False):
            pass
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("online", None))
    with (
        pytest.raises(ConfigError, match="wandb, which has no key here: `wandb login`, or WANDB_MODE=offline"),
        tracked(TrackConfig(to="wandb"), tmp_path, {}, False),
    ):
        pass


@pytest.mark.parametrize(
    ("flag", "says"),
    [("[wandb, wandb]", "named twice"), ("tensorboard", r"track\.to"), ("[mlflow, wand]", r"track\.to")],
)
def test_trackers_that_are_not_there_are_refused(flag, says):
    with pytest.raises(ConfigError, match=says):
        Config.load(None, ["--track.to", flag], model="tiny")


def test_settings_are_told_without_keys():
    one = Config.from_tree(
        {
            "model": "tiny",
            "serve": {"api_key": "s3cret-key-of-clients", "admin_key": "an0ther-one-for-admins"},
            "data": {"train": ["https://me:passw0rd@host/x.jsonl"]},
        }
    )
    assert _shown("data", [{"secret": "s3cret", "token": None, "tokens": 3}]) == [
        {"secret": "(set)", "token": None, "tokens": 3}
    ]
    other = one.replace(train={"steps": 7}, data={"train": ["y.jsonl"]})
    told = told_of([("a", one), ("b", other)])
    assert told["data.train"] == ["https://(set)@host/x.jsonl"]
    assert (told["train.steps"], told["stages.b.train.steps"], told["stages.b.data.train"]) == (200, 7, ["y.jsonl"])
    assert {key for key in told if key.startswith("stages.")} == {"stages.b.train.steps", "stages.b.data.train"}
    text = json.dumps(told)
    assert not [word for word in ("s3cret", "an0ther", "passw0rd", "admin_key") if word in text]
    assert told["model.hidden_size"] == one.model.hidden_size
