"""Chaos without Ray: what strikes when, and what a run's attempts say of it."""

import itertools
import math

import pytest

from actors.chaos.plan import Attempt, Fault, goodput, longest_step_s, num_lost, num_replays, plan, recovery_s, step_at
from trinity.bench.open_load import RequestFailed, Timeline
from trinity.chaos.serve import Answers, longest_stall_s, num_wrong
from trinity.cli import main

ALL = tuple(Fault)


def attempts(*pairs):
    return [Attempt(time_s, position) for time_s, position in pairs]


CALM = attempts((0, 0), (1, 1), (2, 2), (3, 3), (4, 4))
KILLED = attempts((0, 0), (1, 1), (2, 2), (2.5, 2), (4, 2), (6, 3), (7, 4))


def test_a_plan_is_a_function_of_its_seed():
    assert list(plan(3, 1000, ALL, 10)) == list(plan(3, 1000, ALL[::-1], 10))
    assert list(plan(3, 1000, ALL, 10)) != list(plan(4, 1000, ALL, 10))
    shorter = list(plan(3, 300, ALL, 10))
    assert shorter == list(plan(3, 1000, ALL, 10))[: len(shorter)]


def test_a_plan_keeps_its_bounds_and_leaves_no_fault_out():
    found = list(plan(0, 6000, ALL, 10))
    assert len(found) == pytest.approx(600, rel=0.1)
    assert sum(each.after_s for each in found) < 6000
    assert all(5 <= each.after_s <= 15 and 1 <= each.for_s <= 5 and 0 <= each.draw < 1 for each in found)
    for first in range(0, len(found) - len(ALL), len(ALL)):
        assert {each.fault for each in found[first : first + len(ALL)]} == set(ALL)
    some = (Fault.KILL_SHARD, Fault.STOP_SHARD)
    assert {each.fault for each in itertools.islice(plan(0, math.inf, some, 1), 50)} == set(some)
    assert list(plan(0, 4, ALL, 10)) == [], "the first one comes after 5 s at the earliest"


def test_a_calm_run_is_all_good():
    assert (num_replays(CALM), num_lost(CALM), goodput(CALM)) == (0, 0, 1.0)


def test_a_step_that_was_tried_again_cost_time_and_nothing_else():
    assert (num_replays(KILLED), num_lost(KILLED)) == (2, 0)
    assert goodput(KILLED) == pytest.approx(4 / 7)
    assert step_at(KILLED, 2.2) == 3
    assert recovery_s(KILLED, 2.2) == pytest.approx(3.8)
    assert recovery_s(KILLED, 6.5) == pytest.approx(0.5)
    assert recovery_s(KILLED, 7.5) is None, "the last step's end is not seen"
    assert longest_step_s(KILLED, 2.2, 6.5) == 4
    assert longest_step_s(KILLED, 0.5, 5) == 1
    assert longest_step_s(KILLED, 6.5, 99) == 1
    assert longest_step_s(KILLED, 7.5, 99) is None


def test_a_run_that_fell_back_lost_steps():
    fallen = attempts((0, 0), (1, 1), (2, 2), (3, 3), (9, 1), (10, 2), (11, 3), (12, 4))
    assert (num_lost(fallen), num_replays(fallen)) == (2, 3)
    assert math.isnan(goodput(fallen[:2]))


def line(first_s, *gaps_s, failure=None):
    return Timeline(0.0, chunks_s=list(itertools.accumulate(gaps_s, initial=first_s)), failure=failure)


def test_a_wrong_text_counts_and_a_failed_one_does_not():
    failed = line(0.1, failure=RequestFailed("HTTP 503"))
    answers = Answers([line(0.1), line(0.1), failed, line(0.1)], ["a", "b", "", "x"])
    assert num_wrong(["a", "b"], answers) == 1


def test_a_stall_counts_from_what_was_usual():
    quiet = Answers([line(0.5, 0.1, 0.1), line(0.5, 0.1)], ["", ""])
    assert longest_stall_s(quiet, Answers([line(0.7, 0.1), line(0.5, 0.1, 1.1)], ["", ""])) == pytest.approx(1.0)
    assert longest_stall_s(quiet, Answers([line(2.5)], [""])) == pytest.approx(2.0)
    assert longest_stall_s(quiet, Answers([line(0.1, failure=RequestFailed("x"))], [""])) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tiny", "--faults", "kill-shard,flood"], "'flood' is not one of kill-shard, stop-shard"),
        (["serve", "x", "--faults", "kill-worker"], "'kill-worker' is not one of kill-shard, stop-shard"),
        (["train", "tiny", "--every", "0"], "0 is not a number of seconds above 0"),
    ],
)
def test_flags_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["chaos", *arguments])
    assert message in capsys.readouterr().err


def test_what_cannot_be_compared_is_said_before_anything_starts(tmp_path, capsys):
    flags = ["--train.out_dir", str(tmp_path), "--placement.num_gpus_per_shard", "1"]
    assert main(["chaos", "train", "tiny", "--compare", *flags]) == 2
    assert "--compare trains in this process on the CPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
