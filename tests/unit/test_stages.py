"""One stage of a run after another: what goes on, and what begins anew."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.unit.checkpoint_files import plain
from tests.unit.test_trainer import all_weights, config_for, texts, trainer_for  # noqa: F401  a fixture
from trinity import __version__
from trinity.checkpoint import open_checkpoint
from trinity.checkpoint.export import export
from trinity.cli import main
from trinity.data.shards import Recipe
from trinity.errors import ConfigError
from trinity.experts.stacked import kinds_of, named_matrices
from trinity.launch import check_out_dir, rewound
from trinity.stages import read_stages
from trinity.text.tokenizer import Tokenizer
from trinity.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
FLAT = {"warmup_steps": 1, "decay": "none"}


def state_of(trainer):
    """Everything that a next step depends on: weights, and optimizer state of backbone and experts."""
    found = dict(trainer.backbone.store.current.tensors)
    for shard in trainer.pool.transport.shards.values():
        version = shard.store.current
        found |= dict(named_matrices(version, shard.spec.model, shard.experts, kinds_of(version)))
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_that_changes_nothing_changes_no_bit(texts, tmp_path, dtype):  # noqa: F811
    """With the data and the rate of the stage before it, a boundary is not to be told from an uninterrupted run."""
    base = config_for(texts, tmp_path / "whole", steps=6).replace(optim=FLAT, model={"dtype": dtype})
    whole = trainer_for(base, num_shards=2)
    batches = [[whole.micro_batches.batch(whole.data.train, step, micro) for micro in range(2)] for step in range(6)]
    want = [whole.step(batches[step].__getitem__).loss for step in range(6)]

    first = trainer_for(base.replace(train={"out_dir": str(tmp_path / "first"), "steps": 3}), num_shards=2)
    found = [first.step(batches[step].__getitem__).loss for step in range(3)]
    checkpoint = first.save()
    stage = {"out_dir": str(tmp_path / "second"), "init_from": str(checkpoint), "carry": "all", "steps": 3}
    second = trainer_for(base.replace(train=stage), num_shards=2)
    assert (second.version, second.position, second.backbone.num_updates) == (3, 0, 3)
    found += [second.step(batches[step].__getitem__).loss for step in range(3, 6)]
    assert found == want
    mine, theirs = state_of(second), state_of(whole)
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    saved = open_checkpoint(second.save())
    assert (saved.version, saved.path.name, saved.state["position"]) == (6, "step-000003", 3)


def test_a_stage_has_its_own_data_length_and_schedule(texts, tmp_path):  # noqa: F811
    first = trainer_for(config_for(texts, tmp_path / "first", steps=2))
    for _ in range(2):
        first.step()
    stage = {"out_dir": str(tmp_path / "second"), "init_from": str(first.save()), "carry": "all", "steps": 4}
    config = config_for(texts, tmp_path, seq_len=64, global_batch_size=2, micro_batch_size=1)
    config = config.replace(train=stage, model={"max_position_embeddings": 2 * config.model.max_position_embeddings})
    second = trainer_for(config)
    metrics = second.step()
    assert (metrics.step, second.version) == (1, 3)
    assert metrics.lrs["muon"] == pytest.approx(config.optim.muon_lr / 2), "warm-up begins again"
    again = trainer_for(config)
    assert (again.version, again.position) == (2, 0), (
        "nothing of it was saved, so it begins where the stage before ended"
    )
    path = second.save()
    assert open_checkpoint(path).config.max_position_embeddings == config.model.max_position_embeddings
    resumed = trainer_for(config.replace(train={"resume": True}))
    assert (resumed.version, resumed.position) == (3, 1)


def test_weights_alone_begin_a_run_of_their_own(texts, tmp_path):  # noqa: F811
    first = trainer_for(config_for(texts, tmp_path / "first"))
    first.step()
    stage = {"out_dir": str(tmp_path / "second"), "init_from": str(first.save())}
    second = trainer_for(config_for(texts, tmp_path).replace(train=stage))
    assert (second.version, second.backbone.num_updates) == (0, 0)
    assert all(torch.equal(tensor, all_weights(first)[name]) for name, tensor in all_weights(second).items())
    bare = plain(second.save())  # as the Hub has them
    with pytest.raises(ConfigError, match=r"has no optimizer state, which train\.carry all asks for"):
        trainer_for(config_for(texts, tmp_path / "third", init_from=str(bare), carry="all"))


# -- a file with stages


def story(texts, tmp_path, *more):  # noqa: F811
    """Three stages of a few steps, as a file has them."""
    chats = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "so"}]} for n in range(40)
    ]
    if not chats.exists():
        chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = config_for(texts, tmp_path / "run", steps=2).model_dump(mode="json", exclude={"serve", "cluster"})
    longer = 2 * base["model"]["max_position_embeddings"]
    return base | {
        "stages": [
            {"name": "TrueBase"},
            {
                "name": "long",
                "export": "Base",
                "train": {"seq_len": 64, "steps": 3, "batch_ramp": [{"steps": 1, "global_batch_size": 2}]},
                "model": {"max_position_embeddings": longer},
            },
            {
                "name": "Preview",
                "train": {"carry": "weights", "steps": 2},
                "data": {"train": [str(chats)], "format": "chats"},
            },
            *more,
        ]
    }


def told(tmp_path, texts, monkeypatch, *flags, stop_in=None, more=(), first=None):  # noqa: F811
    """-> (exit code, the runs that were made) of the command, with a run in this process in the place of Ray's."""
    made = []

    def run_here(config, served, cluster, num_workers):
        point = check_out_dir(config)
        if point is not None and not rewound(config, point):
            return None
        made.append((Path(config.train.out_dir).name, config.train.resume))
        trainer = trainer_for(config, num_shards=2)
        trainer.should_stop = lambda: len(made) == stop_in
        result = trainer.run()
        rows = [
            {"step": trainer.position, "loss": result["loss"]},
            {"step": trainer.position, "val_loss": None},
        ]
        Path(config.train.out_dir, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return result

    monkeypatch.setattr("trinity.commands.train._trained", run_here)
    tree = story(texts, tmp_path, *more)
    tree["stages"][0] |= first or {}
    (tmp_path / "story.yaml").write_text(yaml.safe_dump(tree))
    return main(["train", str(tmp_path / "story.yaml"), *flags]), made


def test_stages_follow_one_another_and_their_exports_load_in_transformers(texts, tmp_path, monkeypatch):  # noqa: F811
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, made = told(tmp_path, texts, monkeypatch)
    assert (code, made) == (0, [("1-TrueBase", False), ("2-long", False), ("3-Preview", False)])
    for name, version, reach in (("TrueBase", 2, 1), ("Base", 5, 2), ("Preview", 2, 2)):
        folder = tmp_path / "run" / name
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert (
            model.config.max_position_embeddings == reach * story(texts, tmp_path)["model"]["max_position_embeddings"]
        )
        assert AutoTokenizer.from_pretrained(folder)("so").input_ids
        mine = open_checkpoint(folder)
        assert mine.tensor("lm_head.weight").shape == model.lm_head.weight.shape
        assert not (folder / "training").exists()
        card = (folder / "README.md").read_text()
        assert f"# {name}\n" in card
        assert "| validation loss |" in card
        assert f"| code | trinity-moe {__version__}, commit " in card
        stage = next((tmp_path / "run").glob(f"*-{'long' if name == 'Base' else name}"))
        [checkpoint] = stage.glob("step-*")
        assert open_checkpoint(checkpoint).version == version
        assert (checkpoint / "config.json").samefile(folder / "config.json"), "linked"
    code, made = told(tmp_path, texts, monkeypatch, "--resume")
    assert (code, made) == (0, []), "everything is done"
    shutil.rmtree(tmp_path / "run" / "Base")
    assert told(tmp_path, texts, monkeypatch, "--resume") == (0, [])
    assert (tmp_path / "run" / "Base" / "config.json").is_file(), "who was killed before the export makes it now"


def test_a_stage_that_was_stopped_goes_on(texts, tmp_path, monkeypatch):  # noqa: F811
    code, made = told(tmp_path, texts, monkeypatch, stop_in=2)
    assert (code, made[-1]) == (130, ("2-long", False))
    assert not (tmp_path / "run" / "Base").exists()
    assert told(tmp_path, texts, monkeypatch)[0] == 2, "a run that is there is gone on with by --resume alone"
    code, made = told(tmp_path, texts, monkeypatch, "--resume")
    assert (code, made) == (0, [("2-long", True), ("3-Preview", False)])


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([], "stages is a list of sections"),
        ([7], "stage 1 is 7; a stage is a section"),
        ([{"train": {}}], "stage 1 is called None"),
        ([{"name": "../x"}], r"stage 1 is called '\.\./x'"),
        ([{"name": "a"}, {"name": "a"}], "two stages are called 'a'"),
        ([{"name": "a", "dats": {}}], "stage 'a' has an unknown setting 'dats'; did you mean 'data'?"),
        ([{"name": "a", "train": {"stepz": 1}}], r"unknown setting 'train\.stepz'; did you mean 'train\.steps'"),
        ([{"name": "a", "export": 7}], "stage 'a' has export 7"),
        ([{"name": "a"}, {"name": "b", "model": {"preset": "nano"}}], "stage 'b' has a model of its own"),
        (
            [{"name": "a"}, {"name": "b", "model": {"num_experts": 8}}],
            "stage 'b' is of another architecture than 'a'.*: num_experts 4 instead of 8",
        ),
        (
            [{"name": "a"}, {"name": "b", "export": "a"}],
            "stage 'b' exports .*run/a, which is of stage 'a'; name another",
        ),
        ([{"name": "a"}, {"name": "b", "export": "1-a"}], "stage 'b' exports .*run/1-a, which is of stage 'a'"),
        ([{"name": "a", "export": "../mine"}], "mine is there and is no export"),
        (
            [{"name": "a"}, {"name": "b", "optim": {"matrices": "adamw"}, "train": {"carry": "all"}}],
            r"stage 'b' trains otherwise than 'a' .*leave train\.carry out",
        ),
        (
            [{"name": "a"}, *({"name": f"r{rank}", "optim": {"lora": {"rank": rank}}} for rank in (2, 4))],
            "stage 'r4' goes on with the adapter of 'r2', and has other optim.lora: rank is 2, not 4; take the same",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused_by_name(texts, tmp_path, stages, says):  # noqa: F811
    tree = story(texts, tmp_path) | {"stages": stages}
    for folder in ("run", "mine"):
        (tmp_path / folder).mkdir()
    with pytest.raises(ConfigError, match=says):
        read_stages(tree)


COUNTING = (  # a template whose beginning says how many messages follow
    "{{ messages | length }}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ({"data": {"train": ["/nowhere.jsonl"]}}, r"no text file matches '/nowhere\.jsonl'"),
        ({"data": {"train": ["FOLDER/empty.txt"]}}, "the data holds no text: every document is empty"),
        ({"data": {"train": ["FOLDER/rows.jsonl"]}}, r"rows\.jsonl has no text in 'text', only messages"),
        ({"data": {"train": ["FOLDER/short.txt"]}}, "tokens of text are less than one sequence of train.seq_len"),
        (
            {"data": {"sources": [{"train": ["FOLDER/some.txt"], "epochs": 1}]}, "train": {"steps": 50}},
            r"source 'some.*' would be read .* times in 50 steps; its epochs 1 allow \d+ steps",
        ),
        (
            {"data": {"train": ["FOLDER/rows.jsonl"], "format": "chats", "tokenizer": "FOLDER/odd"}},
            r"rows\.jsonl:1, message 1: the template is not prefix-preserving",
        ),
        (
            {"data": {"train": ["FOLDER/rows.jsonl"], "format": "pairs"}},
            r"rows\.jsonl:1 has messages; it is to have chosen and rejected",
        ),
        ({"data": {"length_bias": {"tokens": 9999, "share": 0.5}}}, "length_bias cannot make 50.0%"),
        ({"distill": {"teacher": "FOLDER/odd"}}, "distill.teacher .*odd has another tokenizer"),
        ({"distill": {"teacher": "FOLDER/gone"}}, "gone"),
    ],
)
def test_what_ends_a_later_stage_is_named_before_a_step(texts, tmp_path, monkeypatch, capfd, last, says):  # noqa: F811
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("so")
    (tmp_path / "some.txt").write_text("so it goes on and on " * 300)
    row = {"messages": [{"role": "user", "content": "so?"}, {"role": "assistant", "content": "so"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    odd = Tokenizer.train(iter(["so it goes " * 99]), 300)
    odd.chat_template = COUNTING
    odd.save(tmp_path / "odd")
    last = json.loads(json.dumps({"name": "last", **last}).replace("FOLDER", str(tmp_path)))
    code, made = told(tmp_path, texts, monkeypatch, more=[last])
    assert (code, made) == (2, [])
    error = capfd.readouterr().err
    assert re.search(f"stage 'last': .*{says}", error), error


def test_data_are_made_ready_once_and_those_of_stages_that_are_done_may_go(texts, tmp_path, monkeypatch):  # noqa: F811
    """All before the first step, under the names that the stages look for."""
    builds, steps = [], []
    build, step = Recipe._build, Trainer.step
    monkeypatch.setattr(
        Recipe, "_build", lambda recipe, found, to: (builds.append(len(steps)), build(recipe, found, to))
    )
    monkeypatch.setattr(Trainer, "step", lambda trainer: (steps.append(1), step(trainer))[1])
    shutil.copytree(texts, own := tmp_path / "own")
    first = {"data": {"train": [str(own)]}}
    assert told(tmp_path, texts, monkeypatch, stop_in=2, first=first)[0] == 130
    assert builds == [0] * (12 + 12 + 1), "text for two stages, and conversations"
    shutil.rmtree(own)
    assert told(tmp_path, texts, monkeypatch, "--resume", first=first)[0] == 0
    assert len(builds) == 25


def test_an_export_takes_no_others_place(texts, tmp_path):  # noqa: F811
    trainer = trainer_for(config_for(texts, tmp_path / "run"))
    trainer.step()
    checkpoint = trainer.save()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine is there and is no export"):
        export(checkpoint, tmp_path / "mine", "card")
    for text in ("one", "two"):
        assert (export(checkpoint, tmp_path / "yours", text) / "README.md").read_text() == text


@pytest.mark.parametrize("num", [2, pytest.param(40, marks=pytest.mark.chaos)])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(tmp_path, num):
    """In a stage, a save, a switch, an export: the checkpoints and exports are those of a run that nobody killed."""
    program, environment = Path(__file__).with_name("killed_stages.py"), {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, program, tmp_path, str(num), "5"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    operations, hit = json.loads(done.stdout.splitlines()[-1])
    assert operations > 100
    assert len(hit) >= num // 2
