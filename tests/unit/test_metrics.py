"""The training log has each step once whatever happened, says what it should on screen, and draws readable pictures."""

import errno
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import prometheus_client
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trinity.errors import DataError
from trinity.models.common.losses import max_vio
from trinity.observability.follow import Follower
from trinity.observability.prometheus import ALL_METRICS
from trinity.observability.registry import registered
from trinity.observability.run_history import write_stages
from trinity.observability.train_log import Lines, StepMetrics, TrainLog, _cut, main_lr, read_rows
from trinity.train.plots import _relative, expert_load_png, loss_curve_png, reward_curves_png, run_png
from trinity.train.progress import Progress


def metrics(step, loss=None, **changed):
    loss = 5.0 / step if loss is None else loss
    values = {"z_loss": 0.0, "balance_loss": 0.0, "grad_norm": 0.83, "lrs": {"muon": 1.2e-3, "adamw": 3e-4}}
    values |= {"tokens": 1024, "seconds": 0.2, "max_vio": 0.41, "counts_LE": [[step, 2, 3], [4, 5, 6]]}
    return StepMetrics(step=step, loss=loss, **(values | changed))


def record(out_dir, first, last, evals=()):
    """Log steps first..last; no `close`, as in a crash, so this also tests that lines reach the file at once."""
    log = TrainLog(out_dir, 20)
    for step in range(first, last + 1):
        log.step(metrics(step))
        if step in evals:
            log.validation(step, 1.0 / step)
    return log


def test_a_step_that_died_before_it_was_logged_is_logged_once(tmp_path):
    record(tmp_path, 1, 7, evals=(7,))
    for again in (7, 8, 8):
        log = TrainLog(tmp_path, 20)
        log.catch_up(metrics(again))
        log.close()
    record(tmp_path, 9, 10)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["step"] for row in rows if "val_loss" in row] == [7]


class Screen(io.StringIO):
    """A terminal, or not."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


# --- the log --------------------------------------------------------------------------------------------------------


def test_a_resumed_log_is_that_of_an_uninterrupted_run(tmp_path):
    record(tmp_path / "whole", 1, 20, evals=(5, 10, 20))
    record(tmp_path / "resumed", 1, 7, evals=(5,))
    record(tmp_path / "resumed", 6, 12, evals=(10,))  # the checkpoint was at 5
    record(tmp_path / "resumed", 11, 20, evals=(20,))  # and then at 10, whose validation stays
    for name in ("metrics.jsonl", "expert_load.jsonl"):
        assert (tmp_path / "resumed" / name).read_text() == (tmp_path / "whole" / name).read_text()
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10, 20]
    assert rows[2] == row(3)
    assert rows[2]["lrs"] == {"muon": 1.2e-3, "adamw": 3e-4}
    assert not rows[2].keys() & {"counts_LE", "retries", "phases_s", "checkpoint_s"}, "nothing to say: left out"
    loads = read_rows(tmp_path / "whole" / "expert_load.jsonl")
    assert loads[-1] == {"step": 20, "counts_LE": [[20, 2, 3], [4, 5, 6]]}


@settings(deadline=None)  # files on a busy machine
@given(
    st.lists(st.integers(1, 30)), st.integers(0, 31), st.text(max_size=20).filter(lambda text: not text[:1].isdigit())
)
def test_what_is_cut_is_what_comes_again(tmp_path_factory, steps, first, torn):
    file = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + '{"step": 1, "lo' + torn, "utf-8")
    _cut(file, first).close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [s for s in steps if s < first]


def test_a_validation_that_comes_first_leaves_the_step_before_it(tmp_path):
    """A worker that died after its last step has only the validation left to do, maybe again."""
    record(tmp_path, 1, 4, evals=(2, 4))
    log = TrainLog(tmp_path, 4)
    log.validation(4, 0.25)
    log.close()
    found = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2, 2, 3, 4, 4]
    assert [row["val_loss"] for row in found if "val_loss" in row] == [0.5, 0.25]


def test_a_new_run_starts_a_new_log(tmp_path):
    record(tmp_path, 1, 9)
    record(tmp_path, 1, 2)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2
    assert read_rows(tmp_path / "missing.jsonl") == []


def test_numbers_that_are_not_finite_are_null(tmp_path):
    log = TrainLog(tmp_path, 3)
    log.step(metrics(1, math.nan, grad_norm=math.inf, skipped=1))
    log.validation(1, math.nan)
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open())
    assert (first["loss"], first["grad_norm"], first["skipped"], second["val_loss"]) == (None, None, 1, None)


def test_loads_of_a_long_run_are_thinned(tmp_path):
    log = TrainLog(tmp_path, 1001)
    for step in range(991, 1002):
        log.step(metrics(step))
    assert [row["step"] for row in read_rows(tmp_path / "expert_load.jsonl")] == [995, 1000, 1001]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    for first, last in ((1, 6), (4, 9)):
        record(tmp_path, first, last, evals=(9,)).close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 10))
    assert board.Scalars("train/grad_norm")[-1].value == pytest.approx(0.83)
    assert [(event.step, event.value) for event in board.Scalars("val/loss")] == [(9, pytest.approx(1 / 9))]


def test_retries_rates_and_phases_are_scalars_of_their_own(tmp_path):
    log = TrainLog(tmp_path, 3)
    log.step(metrics(1))
    log.step(metrics(2, retries={"unavailable": 2, "deadline": 1}, phases_s={"prepare": 0.25}, checkpoint_s=1.5))
    log.close()
    first, second = read_rows(tmp_path / "metrics.jsonl")
    assert "retries" not in first
    assert (second["retries"], second["checkpoint_s"]) == ({"unavailable": 2, "deadline": 1}, 1.5)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert shown["train/retries/unavailable"] == [(2, 2.0)]
    assert shown["train/retries/deadline"] == [(2, 1.0)]
    assert shown["train/phases_s/prepare"] == [(2, 0.25)]
    assert shown["train/checkpoint_s"] == [(2, 1.5)]
    assert shown["train/lrs/muon"] == [(step, pytest.approx(1.2e-3)) for step in (1, 2)]


def test_rows_are_read_back_and_those_of_before_too(tmp_path):
    want = metrics(3, retries={"deadline": 1}, lrs={"adamw": 1e-3}, counts_LE=None)
    assert StepMetrics.of_row(json.loads(json.dumps(want.row()))) == want
    old = {key: value for key, value in row(3).items() if key != "lrs"} | {"muon_lr": 2e-2, "adamw_lr": 3e-3}
    assert StepMetrics.of_row(old) == metrics(3, lrs={"muon": 2e-2, "adamw": 3e-3}, counts_LE=None)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    log = TrainLog(tmp_path, 20)
    log.step(metrics(4))
    log.close()
    found = read_rows(tmp_path / "metrics.jsonl")
    assert found[0] == old, "a run of before goes on with its rows as they were"
    assert [main_lr(each) for each in found] == [2e-2, 1.2e-3]
    assert loss_curve_png(tmp_path / "metrics.jsonl", tmp_path / "loss.png").stat().st_size > 10_000
    screen = Screen(False)
    Progress(5, 1024, screen).row(old)
    assert "lr 2.0e-02" in screen.getvalue()


def test_one_picture_shows_all_stages(tmp_path):
    """Each part is drawn where the logs have something of it, and nothing else changes the picture's height."""
    folders = [tmp_path / "1-pre", tmp_path / "2-anneal"]
    write_stages(tmp_path, [("pre", folders[0], 20, 64), ("anneal", folders[1], 10, 64)])
    with pytest.raises(DataError, match="hold no training step"):
        run_png(tmp_path, tmp_path / "run.png")
    heights = []
    for changed in ({}, {"batch_het": 0.3}, {"batch_het": 0.3, "source_tokens": {"web": 48, r"_$\no{math$": 16}}):
        for folder, last in zip(folders, (20, 10), strict=True):
            folder.mkdir(exist_ok=True)
            rows = [metrics(step, counts_LE=[]).row() | changed for step in range(1, last + 1)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        heights.append(imread(run_png(tmp_path, tmp_path / "run.png")).shape[0])
    load = [{"step": step, "counts_LE": [[step, 2, 3], [4, 5, 6]]} for step in (5, 10)]
    (folders[1] / "expert_load.jsonl").write_text("".join(json.dumps(each) + "\n" for each in load))
    heights.append(imread(run_png(tmp_path, tmp_path / "run.png")).shape[0])
    assert heights == sorted(set(heights)), heights


# --- what a person sees ---------------------------------------------------------------------------------------------


def row(step, **changed):
    return metrics(step, **changed).row()


def test_plain_lines_come_every_few_seconds():
    screen, times = Screen(False), iter([10, 11, 12, 16, 17, 22, 23])
    progress = Progress(7, 1024, screen, clock_s=lambda: next(times))
    for step in range(1, 8):
        progress.row(row(step, skipped=step // 4))
    progress.row({"step": 7, "val_loss": 2.0})
    progress.close()
    head, *lines, val = screen.getvalue().splitlines()
    assert head == "7 steps of 1,024 tokens, 7,168 in all"
    assert [line.split()[1] for line in lines] == ["1/7", "4/7", "6/7", "7/7"]
    assert lines[0] == "step 1/7  loss 5.000  grad 0.83  lr 1.2e-03  tok/s 5,120  maxvio 0.41  eta 0:01"
    assert lines[1].endswith("maxvio 0.41  skipped 1  eta 0:01")
    assert val == "step 7/7  val loss 2.0000  perplexity 7.4"


def test_lines_of_a_batch_that_grows():
    """Steps of 512 tokens and then of 1,024, at 5,120 a second: those that are left take longer."""
    screen = Screen(False)
    progress = Progress(40, 512, screen, num_before=lambda step: step + max(0, step - 20))
    progress.row(row(1, tokens=512, seconds=0.1, global_batch_size=8))
    head, line = screen.getvalue().splitlines()
    assert head == "40 steps of 512 to 1,024 tokens, 30,720 in all"
    assert line.endswith("batch 8  eta 0:06")


@pytest.mark.parametrize(("left", "shown"), [(35, "0:35"), (605, "10:05"), (7205, "2:00:05")])
def test_time_left(left, shown):
    screen = Screen(False)
    Progress(1 + left, 1024, screen).row(row(1, seconds=1.0))
    assert screen.getvalue().endswith(f"eta {shown}\n")


def test_lines_and_bars_name_the_stage_and_say_when_all_are_done():
    """A stage of 10 steps of 0.2 s, and 51,200 tokens in stages after it at 5,120 a second."""
    several = {"stage": "stage 2 of 4, anneal", "tokens_after": 51_200}
    plain, terminal = Screen(False), Screen(True)
    for screen in (plain, terminal):
        progress = Progress(10, 1024, screen, **several)
        progress.row(row(1, mfu=0.4321))
        progress.row({"step": 1, "val_loss": 2.0})
        progress.close()
    head, line, val = plain.getvalue().splitlines()
    assert head == "stage 2 of 4, anneal: 10 steps of 1,024 tokens, 10,240 in all"
    assert line.startswith("stage 2 of 4, anneal: step 1/10  loss 5.000")
    assert line.endswith("maxvio 0.41  mfu 43.2 %  eta 0:02, of all stages 0:12")
    assert val.startswith("stage 2 of 4, anneal: step 1/10  val loss")
    assert "stage 2 of 4, anneal:  10%" in terminal.getvalue()
    assert "all in 0:12" in terminal.getvalue()


def test_a_terminal_gets_one_bar():
    screen = Screen(True)
    progress = Progress(10, 1024, screen)
    for step in [*range(1, 8), *range(5, 11)]:  # started again from a checkpoint at 4
        progress.row(row(step))
    progress.row(row(10, grad_norm=None))
    progress.close()
    progress.close()
    assert "10/10" in screen.getvalue().split("\r")[-1]
    assert "step 5/10" not in screen.getvalue()


def test_a_log_is_followed_while_it_grows_and_when_it_is_cut(tmp_path):
    follower = Follower(tmp_path / "metrics.jsonl")
    assert list(follower.new_rows()) == []
    record(tmp_path, 1, 3)
    assert [r["step"] for r in follower.new_rows()] == [1, 2, 3]
    assert list(follower.new_rows()) == []
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert list(follower.new_rows()) == []
    log = record(tmp_path, 3, 3)
    assert [r["step"] for r in follower.new_rows()] == [1, 2, 3]
    log.step(metrics(4))
    assert [r["step"] for r in follower.new_rows()] == [4]
    assert list(Follower(tmp_path / "metrics.jsonl").new_rows()) == []


# --- what the servers export ----------------------------------------------------------------------------------------


def test_all_metrics_are_legal_and_distinct():
    registry = prometheus_client.CollectorRegistry()
    for metric in ALL_METRICS:
        registered(metric, registry)
        assert metric.name.startswith("trinity_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.buckets) == (metric.kind == "histogram")
    exported = prometheus_client.generate_latest(registry).decode()
    assert all(f"# TYPE {metric.name} {metric.kind}" in exported for metric in ALL_METRICS)


# --- pictures -------------------------------------------------------------------------------------------------------


def columns_with(picture, colour):
    """How many columns of pixels hold a colour, given as #rrggbb."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(picture[..., :3] - wanted) < 0.02).all(-1).any(0).sum())


def test_the_loss_curve_shows_both_losses(tmp_path):
    record(tmp_path, 1, 20)
    without = imread(loss_curve_png(tmp_path / "metrics.jsonl", tmp_path / "a.png"))
    record(tmp_path / "b", 1, 20, evals=(5, 20))
    picture = imread(loss_curve_png(tmp_path / "b" / "metrics.jsonl", tmp_path / "deep" / "b.png"))
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1000
    assert columns_with(picture, "#2b6cb0") > 500, "training, from side to side"
    assert columns_with(picture, "#dd6b20") > columns_with(without, "#dd6b20") == 0


def test_the_reward_curve_goes_from_side_to_side(tmp_path):
    for num_runs, num_steps in ((1, 1), (3, 40)):
        rewards_RS = np.linspace(0, 1, num_runs * num_steps).reshape(num_runs, num_steps)
        picture = imread(reward_curves_png(rewards_RS, tmp_path / "reward.png"))
    assert columns_with(picture, "#2b6cb0") > 500


@pytest.mark.parametrize("shape", [(1, 1, 2), (30, 3, 8), (4, 54, 256)])
def test_expert_loads_of_any_size(tmp_path, shape):
    counts_SLE = np.random.default_rng(0).poisson(50, shape)
    counts_SLE[:, 0, 0] = 0
    picture = imread(expert_load_png(counts_SLE, tmp_path / "load.png"))
    assert min(picture.shape[:2]) > 500


def test_an_even_load_is_white_and_a_dead_expert_is_not(tmp_path):
    even = np.full((3, 2, 4), 7)
    dead = even.copy()
    dead[:, 0, 0] = 0
    blue = "#053061"  # the end of the scale, which the colour bar shows too
    counts = [columns_with(imread(expert_load_png(c, tmp_path / "x.png")), blue) for c in (even, dead)]
    assert counts[1] > counts[0] + 100


def test_violation_agrees_with_the_models():
    counts_LE = torch.randint(0, 50, (5, 16))
    assert _relative(counts_LE.double().numpy()).max(-1) - 1 == pytest.approx(max_vio(counts_LE).numpy(), rel=1e-5)


def test_pictures_of_a_log_and_of_nothing(tmp_path):
    record(tmp_path, 1, 20)
    assert expert_load_png(tmp_path / "expert_load.jsonl", tmp_path / "load.png").stat().st_size > 10_000
    with pytest.raises(DataError, match="holds no training step"):
        loss_curve_png(tmp_path / "missing.jsonl", tmp_path / "x.png")
    for empty in (tmp_path / "missing.jsonl", np.zeros((0, 2, 4))):
        with pytest.raises(DataError, match="holds no expert loads"):
            expert_load_png(empty, tmp_path / "x.png")


def test_rows_that_a_full_disk_does_not_take_come_when_there_is_room(tmp_path, caplog):
    """A part of a line was taken before the disk was full: it is finished, not repeated."""
    lines = Lines(tmp_path / "rows.jsonl")
    lines.write({"step": 1})
    whole, room = lines._file, [5]

    def write(data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, room[0] = whole.write(data[: room[0]]), 0
        return taken

    lines._file = SimpleNamespace(write=write, close=whole.close)
    for step in (2, 3, 4):
        lines.write({"step": step})
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot write {tmp_path / 'rows.jsonl'}: No space left on device; rows wait until there is room"
    ]
    lines._file = whole
    lines.write({"step": 5})
    lines.close()
    assert [row["step"] for row in read_rows(tmp_path / "rows.jsonl")] == [1, 2, 3, 4, 5]
