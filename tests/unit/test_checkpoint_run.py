"""The checkpoints of a run: which are kept, which is gone on from, and what becomes of the others."""

import os
import shutil

import pytest
import yaml

from tests.unit.checkpoint_files import MODEL, contents, model_and_pool, plain, same, save, write
from trinity.checkpoint import (
    CheckpointWriter,
    latest_checkpoint,
    list_checkpoints,
    prune,
    resume_point,
    rewind,
    step_of,
    step_path,
)
from trinity.commands.train import run
from trinity.config import Config
from trinity.errors import CheckpointError, ConfigError
from trinity.launch import check_out_dir, steps_done
from trinity.train.recovery import rates_changed


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return write(tmp_path_factory.mktemp("one"), step=3)[1]


def folders(out_dir, *steps):
    """Checkpoints as far as their names and manifests go."""
    for step in steps:
        step_path(out_dir, step).mkdir(parents=True)
        (step_path(out_dir, step) / "manifest.json").write_text("{}")


def steps_in(out_dir):
    return [step_of(path) for path in list_checkpoints(out_dir)]


def test_the_newest_those_at_multiples_and_those_in_use_are_kept(tmp_path):
    folders(tmp_path, *range(10, 101, 10), 1_000_000)
    assert [step_of(path) for path in prune(tmp_path, 2, every=40, in_use=[tmp_path / "step-000020"])] == [
        10, 30, 50, 60, 70, 90,
    ]  # fmt: skip
    assert steps_in(tmp_path) == [20, 40, 80, 100, 1_000_000]
    assert prune(tmp_path, 2, every=40) == [tmp_path / "step-000020"]
    prune(tmp_path, 9)
    assert steps_in(tmp_path) == [40, 80, 100, 1_000_000]
    prune(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step-1000000"]


def test_what_is_in_use_may_be_named_by_another_path(tmp_path, monkeypatch):
    folders(tmp_path / "run", 1, 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    for path in ("run/step-000001", "link/step-000001", tmp_path / "run" / ".." / "run" / "step-000001"):
        assert prune(tmp_path / "run", 1, in_use=[path]) == []


def test_only_finished_checkpoints_of_the_run_are_listed(tmp_path):
    folders(tmp_path, 1, 2)
    for name in ("step-000003.0123abcd.partial", "step-000004.0123abcd.deleted", "step-x", "step-", "other", "aside-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "step-000005").mkdir()  # no manifest
    (tmp_path / "step-000006").touch()
    assert steps_in(tmp_path) == [1, 2]
    assert latest_checkpoint(tmp_path).name == "step-000002"
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_a_checkpoint_that_was_about_to_be_replaced_counts_until_the_other_is_there(tmp_path, one):
    path = shutil.copytree(one, tmp_path / "step-000003.replaced")
    assert steps_in(tmp_path) == [3]
    assert resume_point(tmp_path, 3) == path
    assert same(contents(path), contents(one))
    shutil.copytree(one, tmp_path / "step-000003")
    assert list_checkpoints(tmp_path) == [tmp_path / "step-000003"]
    prune(tmp_path, 1)
    folders(tmp_path, 4)
    prune(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step-000004"], "the replaced one does not come back"


def test_a_save_removes_what_dead_ones_left_and_nothing_of_a_living_or_another_one(tmp_path, one):
    for name in ("step-000001.0123abcd.partial", "step-000002.replaced.0123abcd.deleted"):
        shutil.copytree(one, tmp_path / name)
    others = ["model.0123abcd.partial", "step-000003-bf16.0123abcd.partial", "notes.partial", "step-000003"]
    for name in others:
        (tmp_path / name).mkdir()
    living = CheckpointWriter(step_path(tmp_path, 3), 3)
    same_step, last = CheckpointWriter(step_path(tmp_path, 3), 3), CheckpointWriter(step_path(tmp_path, 4), 4)
    assert {*os.listdir(tmp_path)} == {*others, living.folder.name, same_step.folder.name, last.folder.name}
    for writer in (living, same_step, last):
        writer.abandon()
        writer.abandon()
    assert {*os.listdir(tmp_path)} == {*others}


def test_a_point_is_a_step_a_name_or_a_folder_and_what_is_none_is_named(tmp_path, one, monkeypatch):
    run, elsewhere = tmp_path / "run", one
    assert resume_point(run) is None
    assert resume_point(run, str(elsewhere)) == elsewhere
    for step in (1, 2):
        shutil.copytree(one, step_path(run, step))
    monkeypatch.chdir(tmp_path)
    assert resume_point(run) == run / "step-000002"
    for wanted in (1, "step-000001", "run/step-000001", str(run / "step-000001")):
        assert resume_point(run, wanted) == run / "step-000001"
    for wanted in (3, -1, "nowhere", "step-000003"):
        with pytest.raises(
            ConfigError, match=f"resume_from {wanted} is no checkpoint; .* has step-000001, step-000002"
        ):
            resume_point(run, wanted)
    with pytest.raises(ConfigError, match=r"already holds step-000002; resume from .* in another train\.out_dir"):
        resume_point(run, str(elsewhere))
    weights = plain(shutil.copytree(one, tmp_path / "weights"))
    with pytest.raises(ConfigError, match=r"has weights only; start from them with train\.init_from"):
        resume_point(tmp_path / "new", str(weights))


def test_going_back_moves_later_checkpoints_aside_and_loses_none(tmp_path):
    folders(tmp_path, 1, 2, 3, 4)
    assert rewind(tmp_path, step_path(tmp_path, 4)) is None
    aside = rewind(tmp_path, step_path(tmp_path, 2))
    assert (steps_in(tmp_path), steps_in(aside)) == ([1, 2], [3, 4])
    folders(tmp_path, 3)
    again = rewind(tmp_path, step_path(tmp_path, 1))
    assert (steps_in(tmp_path), steps_in(aside), steps_in(again)) == ([1], [3, 4], [2, 3])
    assert aside != again


def test_a_run_that_goes_on_from_another_ones_checkpoint_keeps_it_whatever_that_one_does(tmp_path, one):
    theirs = shutil.copytree(one, tmp_path / "theirs" / "of-note")
    run = tmp_path / "run"
    assert rewind(run, resume_point(run, str(theirs))) is None
    assert latest_checkpoint(run) == run / "step-000003"
    mine = (run / "step-000003" / "model-backbone-00.safetensors").stat()
    assert mine.st_ino == (theirs / "model-backbone-00.safetensors").stat().st_ino, "no second copy"
    shutil.rmtree(theirs)
    assert same(contents(run / "step-000003"), contents(one))


def config_for(out_dir, **train):
    train = {"steps": 10, **train, "out_dir": str(out_dir)}
    return Config.from_tree({"model": MODEL.model_dump(), "train": train})


def test_a_run_goes_on_from_where_it_is_told(tmp_path, one, capsys):
    out_dir = tmp_path / "run"
    model, pool = model_and_pool()
    for step in (3, 6, 9):
        save(step_path(out_dir, step), step, model, pool)
    with pytest.raises(ConfigError, match="already holds step-000009; continue it with --resume"):
        check_out_dir(config_for(out_dir))
    assert check_out_dir(config_for(out_dir, resume=True)) == out_dir / "step-000009"
    assert check_out_dir(config_for(out_dir, resume_from=6)) == out_dir / "step-000006"
    assert steps_in(out_dir) == [3, 6, 9], "looking changes nothing"
    assert check_out_dir(config_for(tmp_path / "new", resume_from=str(one))) == one
    with pytest.raises(ConfigError, match="of another architecture"):
        check_out_dir(config_for(out_dir, resume_from=6).replace(model={"vocab_size": 98}))
    eos = config_for(out_dir).model.eos_token_id
    check_out_dir(config_for(out_dir, resume_from=6).replace(model={"eos_token_id": (eos, eos + 1)}))
    with pytest.raises(ConfigError, match=f"of another architecture.*eos_token_id {eos} instead of {eos + 1}"):
        check_out_dir(config_for(out_dir, resume_from=6).replace(model={"eos_token_id": (eos + 1, eos)}))
    os.truncate(out_dir / "step-000009" / "training" / "backbone-00.safetensors", 10)
    with pytest.raises(CheckpointError, match=r"step-000009/training/backbone-00\.safetensors has 10 bytes"):
        check_out_dir(config_for(out_dir, resume=True))
    assert check_out_dir(config_for(out_dir, resume_from=6)) == out_dir / "step-000006"
    assert steps_done(config_for(out_dir)) == 9


class Reached(Exception):
    """Everything was checked, and Ray would start."""


def test_the_command_goes_back_right_before_it_starts(tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise Reached

    monkeypatch.setattr("trinity.commands.train.setup_environment", stop)
    out_dir = tmp_path / "run"
    model, pool = model_and_pool()
    for step in (3, 6, 9):
        save(step_path(out_dir, step), step, model, pool)
    tree = {"model": MODEL.model_dump(mode="json"), "train": {"out_dir": str(out_dir), "steps": 20}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    flags = ["--train.resume_from", "6"]
    assert command(tmp_path, "--train.steps", "6", *flags) == 0
    assert "is at step 6 already; raise --train.steps" in capsys.readouterr().err
    assert command(tmp_path, "--dry-run", *flags) == 0
    assert steps_in(out_dir) == [3, 6, 9]
    with pytest.raises(Reached):
        command(tmp_path, *flags)
    assert f"checkpoints after step 6 are in {out_dir / 'aside-1'} now" in capsys.readouterr().err
    assert steps_in(out_dir) == [3, 6]
    assert steps_in(out_dir / "aside-1") == [9]
    with pytest.raises(Reached):
        command(tmp_path, "--resume")
    assert steps_in(out_dir) == [3, 6]


def command(folder, *flags):
    from trinity.cli import parser

    return run(*parser().parse_known_args(["train", str(folder / "run.yaml"), *flags]))


def test_a_learning_rate_that_jumps_is_said(tmp_path):
    """`train.steps` is raised at the end of a linear decay, as the command itself advises."""
    optim = {"warmup_steps": 2, "final_lr_ratio": 0}
    done = config_for(tmp_path, steps=6, resume=True).replace(optim=optim)
    model, pool = model_and_pool()
    save(step_path(tmp_path, 5), 5, model, pool)
    assert rates_changed(done) == "", "an old checkpoint does not say which it was"
    save(step_path(tmp_path, 6), 6, model, pool, config=done.model_dump(mode="json"))
    assert rates_changed(config_for(tmp_path / "new")) == rates_changed(done) == ""
    said = rates_changed(done.replace(train={"steps": 12}))
    assert said == (
        "step 7 has the learning rate of another schedule than before: muon 0.0005 after 0, not 0, adamw 0.00015 after 0, not 0"
    )
    assert "muon 0.005 after 0, not 0" in rates_changed(done.replace(train={"steps": 12}, optim={"muon_lr": 0.01}))
