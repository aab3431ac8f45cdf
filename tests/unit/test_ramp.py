"""A batch that grows with the steps: which sequences each takes, whoever computes them and wherever the run was cut."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_stages import FLAT, state_of
from tests.unit.test_trainer import Seen, all_weights, assert_close, config_for, texts, trainer_for  # noqa: F401  a fixture
from trinity.checkpoint import open_checkpoint
from trinity.config import Config, Sequences, TrainConfig
from trinity.errors import ConfigError
from trinity.train.microbatches import MicroBatches

RAMP = [{"steps": 2, "global_batch_size": 2}, {"steps": 1, "global_batch_size": 4}]
SIZES = [2, 2, 4, 6, 6]  # of steps of that ramp, up to batches of 6


def ramped(texts, out_dir, ramp=RAMP, **train):  # noqa: F811
    return config_for(texts, out_dir, **{"steps": 5, "global_batch_size": 6, "batch_ramp": ramp} | train)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), max_size=5), st.integers(5, 8), st.integers(1, 60))
def test_steps_take_the_order_of_the_data_without_a_gap(parts, last, steps):
    ramp = [{"steps": num, "global_batch_size": size} for num, size in sorted(parts, key=lambda part: part[1])]
    settings = TrainConfig(steps=steps, global_batch_size=last, micro_batch_size=1, batch_ramp=ramp)
    sizes = [part["global_batch_size"] for part in ramp for _ in range(part["steps"])] + [last] * steps
    taken = [settings.sequences_of(step) for step in range(steps)]
    assert taken == [Sequences(sum(sizes[:step]), sizes[step]) for step in range(steps)]
    assert settings.num_sequences(steps) == sum(sizes[:steps])
    for num in (0, 1, sum(sizes[:steps]) - 1, sum(sizes[:steps]), 10**6):
        assert settings.num_steps(num) == sum(sum(sizes[: step + 1]) <= num for step in range(steps))


@pytest.mark.parametrize("ramp", [[], [{"steps": 2, "global_batch_size": 4}, {"steps": 9, "global_batch_size": 4}]])
def test_a_ramp_that_does_not_rise_changes_no_bit(texts, tmp_path, ramp):  # noqa: F811
    plain = trainer_for(config_for(texts, tmp_path / "plain"))
    level = trainer_for(config_for(texts, tmp_path / "level", batch_ramp=ramp))
    assert [level.step().loss for _ in range(3)] == [plain.step().loss for _ in range(3)]
    mine, theirs = state_of(level), state_of(plain)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    level.save()
    assert trainer_for(config_for(texts, tmp_path / "level")).position == 3, "it is the same run"


def test_steps_of_a_ramp_are_those_of_batches_that_large(texts, tmp_path):  # noqa: F811
    """Bit for bit those of stages of one size each, that take the same sequences one after the other."""
    run = trainer_for(ramped(texts, tmp_path / "ramped").replace(optim=FLAT))
    found = [run.step() for _ in SIZES]
    assert [metrics.global_batch_size for metrics in found] == SIZES
    assert [metrics.tokens for metrics in found] == [32 * size for size in SIZES]
    losses, before, first = [], None, 0
    for size, steps in ((2, 2), (4, 1), (6, 2)):
        start = {} if before is None else {"init_from": str(before), "carry": "all"}
        config = config_for(texts, tmp_path / str(size), steps=steps, global_batch_size=size, **start)
        stage = trainer_for(config.replace(optim=FLAT))
        for _ in range(steps):
            at = np.arange(first, first + size)
            losses.append(stage.step(lambda m, at=at, stage=stage: taken(stage, at[2 * m : 2 * m + 2])).loss)
            first += size
        before = stage.save()
    assert [metrics.loss for metrics in found] == losses
    mine, theirs = state_of(run), state_of(stage)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def taken(trainer, at):
    return trainer.data.train.take(trainer.data.train.indices(at))


@pytest.mark.parametrize(("packing", "cuts"), [("stream", (1, 4)), ("rsdb", (3,)), ("best_fit", (2,))])
def test_it_goes_on_wherever_it_was_cut(texts, tmp_path, packing, cuts):  # noqa: F811
    config = ramped(texts, tmp_path / "whole").replace(data={"packing": packing, "rsdb_documents": 2})
    whole = trainer_for(config)
    want = [whole.step().loss for _ in SIZES]
    for cut in cuts:
        own = config.replace(train={"out_dir": str(tmp_path / str(cut)), "resume": True})
        first = trainer_for(own)
        found = [first.step().loss for _ in range(cut)]
        first.save()
        second = trainer_for(own)
        assert second.position == cut
        assert found + [second.step().loss for _ in SIZES[cut:]] == want
        mine, theirs = state_of(second), state_of(whole)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_micro_batches_of_any_size_give_the_same_steps(texts, tmp_path):  # noqa: F811
    found = []
    for size in (1, 2):
        trainer = trainer_for(ramped(texts, tmp_path / str(size), micro_batch_size=size))
        found.append(([trainer.step() for _ in SIZES], all_weights(trainer)))
    (ones, weights), (twos, others) = found
    for one, two in zip(ones, twos, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-5)
        assert one.balance_loss == pytest.approx(two.balance_loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-4)
        assert len(str(one.batch_het)) > 3, "over the micro-batches that the step has"
    assert_close(weights, others, atol=2e-4)


@pytest.mark.parametrize("world", [1, 2])
def test_workers_share_out_each_step(texts, tmp_path, world):  # noqa: F811
    config = ramped(texts, tmp_path, micro_batch_size=1, num_workers=world)
    trainer = trainer_for(config)
    order = [tuple(row) for row in taken(trainer, np.arange(sum(SIZES))).ids_BS.tolist()]
    for position in range(len(SIZES)):
        first, num = config.train.sequences_of(position)
        found = {}
        for rank in range(world):
            comm = SimpleNamespace(rank=rank, world=world, all_reduce=lambda sums: sums)
            mine = MicroBatches(config, comm, seen := Seen(), torch.device("cpu"))
            losses = mine.run(lambda m, mine=mine, at=position: mine.batch(trainer.data.train, at, m), num)
            assert mine.total(losses, {}, False).means.numel() == num
            found |= {m * world + rank: tuple(batch.ids_BS[0].tolist()) for m, batch in enumerate(seen.batches)}
        assert [found[place] for place in sorted(found)] == order[first : first + num]


def test_another_ramp_is_another_run(texts, tmp_path):  # noqa: F811
    trainer = trainer_for(ramped(texts, tmp_path))
    trainer.step()
    assert open_checkpoint(trainer.save()).state["order"]["batch_ramp"] == "2 x 2, 1 x 4"
    with pytest.raises(ConfigError, match="batch_ramp is '2 x 2, 1 x 4', not '9 x 2'"):
        trainer_for(ramped(texts, tmp_path, ramp=[{"steps": 9, "global_batch_size": 2}]))


@pytest.mark.parametrize(
    ("ramp", "says"),
    [
        ("[{steps: 0, global_batch_size: 2}]", "train.batch_ramp.0.steps: Input should be greater than or equal to 1"),
        ("[{steps: 1, global_batch_size: 0}]", "train.batch_ramp.0.global_batch_size: Input should be greater"),
        ("[{steps: 1, global_batch: 2}]", "'train.batch_ramp.0.global_batch'; did you mean 'train.batch_ramp.0.glob"),
        (
            "[{steps: 1, global_batch_size: 3}]",
            "batch_ramp's global_batch_size 3 is not a multiple of micro_batch_size",
        ),
        ("[{steps: 1, global_batch_size: 4}, {steps: 1, global_batch_size: 2}]", "batch_ramp has 4 before 2; batches"),
        ("[{steps: 1, global_batch_size: 16}]", "has 16 before 8; batches grow from part to part, up to global_batch"),
        ("4", "train.batch_ramp: Input should be a valid tuple"),
    ],
)
def test_ramps_that_cannot_be_are_named(ramp, says):
    sizes = ["--train.global_batch_size", "8", "--train.micro_batch_size", "2", "--train.batch_ramp", ramp]
    with pytest.raises(ConfigError) as refused:
        Config.load(None, sizes, model="tiny")
    assert says in refused.value.message
