"""Runs on preferences, as `trinity train` makes them: data, reference scores, what is told, what a kill costs."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.unit.test_trainer import SMALL, all_weights
from trinity.config import Config, Sequences
from trinity.data.dataset import IGNORE
from trinity.data.prepare import prepare
from trinity.errors import ConfigError, DataError
from trinity.pool.local import local_pool
from trinity.rl import reference
from trinity.rl.kinds import check, trainer_kind
from trinity.rpc.messages import Load
from trinity.stages import read_stages
from trinity.text.tokenizer import Tokenizer
from trinity.train.collectives import Alone
from trinity.train.loss import token_logprobs

PAIRS = [
    {"prompt": f"{n}?", "chosen": "it is so" + " so" * (n % 3), "rejected": "no" + " no" * (n % 2)} for n in range(16)
]
LABELS = [{"prompt": f"{n}?", "completion": f"it is {n}", "label": n % 3 != 0} for n in range(16)]


def config_for(folder, rows=PAIRS, form="pairs", **sections):
    Tokenizer.train(iter(["is it so? it is. no, no, really"]), SMALL["vocab_size"]).save(folder / "tokenizer")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"preset": "tiny", **SMALL},
        "data": {"train": [str(folder / "rows.jsonl")], "format": form, "tokenizer": str(folder / "tokenizer")},
        "train": dict(steps=6, seq_len=64, global_batch_size=4, micro_batch_size=2, eval_every=0, eval_sequences=4)
        | {"out_dir": str(folder / "run")},
        "optim": {"warmup_steps": 0, "decay": "none", "muon_lr": 1e-2, "adamw_lr": 3e-3},
    }
    tree["data"]["val_fraction"] = 0.25
    return Config.from_tree(tree).replace(**sections)


def trainer_for(config, comm=None):
    pool = local_pool(config.model, Load(), num_shards=2, optim=config.optim, backend="torch")
    data = prepare(config.data, config.train, config.model, config.train.out_dir)
    trainer = trainer_kind(config)(config, pool, data, comm or Alone())
    trainer.start()
    return trainer


def scores(trainer, data):
    """The definition, of each document alone: summed log p of what is trained of it, [N, 2]."""
    trainer.dispatcher.use(trainer.version)
    found = []
    for at in range(data.num_sequences):
        for inputs, targets in data.pieces(at):
            last = targets[-1:] if targets[-1] != IGNORE else np.zeros(1, np.int64)
            ids = torch.from_numpy(np.concatenate([inputs, last]))[None]
            logprobs = token_logprobs(trainer.model, ids)[0]
            found.append(float(logprobs[torch.from_numpy(targets != IGNORE)].sum()))
    return torch.tensor(found).view(-1, 2)


class Told:
    """A log that keeps what it is told."""

    def __init__(self):
        self.steps, self.validations = [], []

    def step(self, metrics):
        self.steps.append(metrics)

    def validation(self, step, loss, by_source, measures):
        self.validations.append((step, loss, measures))


def test_a_run_learns_what_its_pairs_prefer(tmp_path):
    trainer, told = trainer_for(config_for(tmp_path)), Told()
    assert trainer.data.train.num_sequences + trainer.data.val.num_sequences == len(PAIRS)
    for part in (trainer.data.train, trainer.data.val):
        torch.testing.assert_close(part.reference_N2, scores(trainer, part), atol=1e-4, rtol=0)
    trainer.logs = [told]
    assert trainer.evaluate() == pytest.approx(math.log(2), abs=1e-6)
    result = trainer.run()
    first, last = told.steps[0], told.steps[-1]
    assert first.loss == pytest.approx(math.log(2), abs=1e-7)
    assert first.measures == {"reward_chosen": 0, "reward_rejected": 0, "margin": 0, "accuracy": 0}
    assert last.measures["margin"] == pytest.approx(
        last.measures["reward_chosen"] - last.measures["reward_rejected"], abs=1e-5
    )
    assert last.measures["accuracy"] == 1
    assert last.loss < 0.9 * first.loss
    assert json.loads(json.dumps(last.row()))["measures"] == last.measures
    step, loss, measures = told.validations[-1]
    assert (step, loss) == (6, result["val_loss"])
    assert loss < math.log(2)
    assert measures["accuracy"] == 1, "held-out pairs prefer the same words"


def test_the_loss_of_labels_is_ktos(tmp_path):
    weights = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.75}
    trainer = trainer_for(config_for(tmp_path, LABELS, "labels", preferences=weights))
    data = trainer.data.train
    for _ in range(3):
        rho_N2 = scores(trainer, data) - data.reference_N2
        chosen, want = data.sequences(Sequences.nth(trainer.position, 4)), 0.0
        for micro in (chosen[:2], chosen[2:]):
            z = max(0.0, float(rho_N2[micro, 1].mean()))
            for at in micro:
                is_wanted = data.rows[at] % 2 == 0
                gain = 0.5 * (float(rho_N2[at, 0]) - z) * (1 if is_wanted else -1)
                want += (1.5 if is_wanted else 0.75) * (1 - 1 / (1 + math.exp(-gain))) / 4
        metrics = trainer.step()
        assert metrics.loss == pytest.approx(want, rel=1e-4)
    assert {"divergence", "accuracy"} < metrics.measures.keys() <= set(trainer.micro_batches.measures)
    validated = trainer.evaluate()
    assert 0 < validated < 1.5


def test_without_a_reference_and_with_a_margin_it_is_simpo(tmp_path):
    simpo = {"reference": False, "length_normalized": True, "beta": 2.0, "margin": 1.0}
    trainer = trainer_for(config_for(tmp_path, preferences=simpo))
    data, want = trainer.data.train, 0.0
    assert not (data.reference_N2 != 0).any()
    assert not list((tmp_path / "run" / "data").glob("reference-*"))
    sums_N2 = scores(trainer, data)
    for at in data.sequences(Sequences.nth(0, 4)):
        chosen, rejected = (
            float(sums_N2[at, side]) / int((targets != IGNORE).sum())
            for side, (_, targets) in enumerate(data.pieces(at))
        )
        want += math.log1p(math.exp(-(2.0 * (chosen - rejected) - 1.0))) / 4
    assert trainer.step().loss == pytest.approx(want, rel=1e-4)
    with pytest.raises(ConfigError, match="labels are learned against a reference"):
        check(config_for(tmp_path, LABELS, "labels", preferences=simpo))


def test_an_answer_goes_with_one_that_was_given_to_another_prompt(tmp_path):
    for form, rows, num in (("labels", LABELS, len(LABELS)), ("labels", PAIRS, 2 * len(PAIRS))):
        folder = tmp_path / str(num)
        folder.mkdir()
        config = config_for(folder, rows, form).replace(data={"val_fraction": 0})
        data = prepare(config.data, config.train, config.model, folder).train
        assert data.num_sequences == num
        decode = Tokenizer.load(folder / "tokenizer").decode
        for at in range(num):
            (own, answer), (mixed, other) = data.pieces(at)
            num_prompt = int((answer != IGNORE).argmax()) + 1
            assert (own[:num_prompt] == mixed[:num_prompt]).all()
            assert decode(mixed[:num_prompt].tolist()).count("?") == 1
            assert decode(other[other != IGNORE].tolist()).endswith("<|im_end|>")
        wanted = sum(row.get("label", False) for row in rows) or len(rows)
        assert int((data.rows % 2 == 0).sum()) == wanted
    batch = data.take(np.array([0, 5]))
    assert batch.docs_BS.max() == batch.other_docs_BS.max() == 1
    assert batch.ids_BS.shape == batch.targets_BS.shape


def losses_of(trainer, num):
    return [trainer.step().loss for _ in range(num)]


def test_whoever_goes_on_has_the_same_reference(tmp_path, monkeypatch):
    config = config_for(tmp_path)
    whole = trainer_for(config.replace(train={"out_dir": str(tmp_path / "whole")}))
    want = losses_of(whole, 4)
    first = trainer_for(config)
    found = losses_of(first, 2)
    first.save()
    monkeypatch.setattr(reference, "_computed", lambda *_: pytest.fail("a run that goes on scores nothing"))
    second = trainer_for(config.replace(train={"resume": True}))
    assert torch.equal(second.data.train.reference_N2, first.data.train.reference_N2)
    assert found + losses_of(second, 2) == want
    mine, theirs = all_weights(second), all_weights(whole)
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    for file in (tmp_path / "run" / "data").glob("reference-*"):
        file.unlink()
    with pytest.raises(ConfigError, match="lacks the reference scores reference-"):
        trainer_for(config.replace(train={"resume": True}))


def test_scores_are_of_the_weights_that_the_run_begins_with(tmp_path, monkeypatch):
    first = trainer_for(config_for(tmp_path))
    losses_of(first, 1)
    tuned = config_for(tmp_path, train={"out_dir": str(tmp_path / "tuned"), "init_from": str(first.save())})
    second = trainer_for(tuned)
    torch.testing.assert_close(second.data.train.reference_N2, scores(second, second.data.train), atol=1e-4, rtol=0)
    assert not torch.equal(second.data.train.reference_N2, first.data.train.reference_N2)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "_computed", lambda *_: pytest.fail("who is killed before the first step has them"))
        trainer_for(tuned)
    seeded = trainer_for(tuned.replace(train={"init_from": None, "seed": 1}))  # in the same folder, nothing saved yet
    assert not torch.equal(seeded.data.train.reference_N2, second.data.train.reference_N2)
    file = next((tmp_path / "run" / "data").glob("reference-*.npy"))
    file.write_bytes(b"torn")
    with pytest.raises(DataError, match="are damaged"):
        trainer_for(config_for(tmp_path, train={"resume": True}))


def test_workers_share_the_scoring_out(tmp_path):
    alone, parts = trainer_for(config_for(tmp_path)), []
    for rank in range(2):
        comm = SimpleNamespace(rank=rank, world=2, all_reduce=lambda sums: sums)
        parts.append(reference._computed(alone, alone.data.train, comm))
        assert 0 < int((parts[-1][:, 0] != 0).sum()) < alone.data.train.num_sequences
    assert torch.equal(sum(parts), alone.data.train.reference_N2)


def test_rows_that_cannot_be_learned_from_are_named(tmp_path, caplog):
    with pytest.raises(DataError, match=r"16 of 16 rows have a label.*labels for both"):
        trainer_for(config_for(tmp_path, LABELS, "pairs", data={"val_fraction": 0}))
    long = {"prompt": "?", "chosen": "so " * 60, "rejected": "no"}
    data = {"val_fraction": 0}
    config = config_for(tmp_path, [*PAIRS, long], data=data)
    assert prepare(config.data, config.train, config.model, tmp_path).train.num_sequences == len(PAIRS)
    assert "1 of 17 rows are left out, an answer is longer than train.seq_len 64" in caplog.text
    config = config_for(tmp_path, [long], data=data)
    with pytest.raises(DataError, match=r"no row has its answers within train\.seq_len 64"):
        prepare(config.data, config.train, config.model, tmp_path)
    with pytest.raises(ConfigError, match="pairs need the tokenizer and the chat template"):
        trainer_for(config_for(tmp_path).replace(data={"tokenizer": None}))


def test_preferences_are_a_stage_like_any_other(tmp_path):
    tree = config_for(tmp_path).model_dump(mode="json", exclude={"serve", "cluster"})
    stages = [{"name": "a"}, {"name": "b", "preferences": {"beta": 0.3}, "train": {"carry": "weights"}}]
    first, second = read_stages(tree | {"stages": stages})
    assert (first.config.preferences.beta, second.config.preferences.beta) == (0.1, 0.3)
    assert second.config.train.init_from == str(first.checkpoint)
