"""Tokens that are not trained, and experts that none of a step's rows came to: neither counts, nothing of them moves."""

import numpy as np
import pytest
import torch

from tests.unit.test_trainer import all_weights, assert_close, config_for, texts, trainer_for  # noqa: F401  a fixture
from trinity.data.dataset import Batch
from trinity.experts.stacked import experts_of, kinds_of, named_matrices, places_of
from trinity.models.common.losses import IGNORE, document_balance_loss, sequence_balance_loss
from trinity.rpc.messages import WEIGHT
from trinity.train.collectives import Alone
from trinity.train.loss import packed_inputs, token_logprobs
from trinity.train.microbatches import MicroBatches

LIKE_LAST_TIME = torch.Generator().manual_seed(3)
NUM, SEQ = 4, 32
IDS = torch.randint(4, 290, (NUM, SEQ + 1), generator=LIKE_LAST_TIME)
KEPT = torch.rand((NUM, SEQ), generator=LIKE_LAST_TIME) < torch.tensor([0.05, 0.9, 0.5, 0.1])[:, None]


def batch(rows=slice(None), kept_BS=KEPT):
    """Sequences of which very unlike parts are trained."""
    return Batch(
        IDS[rows, :-1], IDS[rows, 1:].where(kept_BS[rows], IGNORE), torch.zeros(NUM, SEQ, dtype=torch.int64)[rows]
    )


def micro_batches(size, kept_BS=KEPT):
    return lambda micro: batch(slice(micro * size, (micro + 1) * size), kept_BS)


def test_the_loss_is_the_mean_over_the_tokens_that_are_trained(texts, tmp_path):  # noqa: F811
    trainer = trainer_for(config_for(texts, tmp_path, micro_batch_size=1))
    trainer.dispatcher.use(0)
    want = -token_logprobs(trainer.model, IDS)[KEPT].mean()
    assert trainer.step(micro_batches(1)).loss == pytest.approx(want.item(), rel=1e-5)


def test_micro_batches_of_any_size_give_the_same_step(texts, tmp_path):  # noqa: F811
    """Each has another share of trained tokens: a mean of its own would weigh them otherwise."""
    found = []
    for size in (1, 2, 4):
        trainer = trainer_for(config_for(texts, tmp_path / str(size), micro_batch_size=size))
        found.append((trainer.step(micro_batches(size)), all_weights(trainer)))
    for metrics, weights in found[1:]:
        assert metrics.loss == pytest.approx(found[0][0].loss, rel=1e-6)
        assert metrics.grad_norm == pytest.approx(found[0][0].grad_norm, rel=1e-5)
        assert_close(weights, found[0][1], atol=2e-5)


def test_workers_agree_on_the_number_of_trained_tokens(texts, tmp_path):  # noqa: F811
    trainer, seen = trainer_for(config_for(texts, tmp_path, micro_batch_size=1)), []

    class Two(Alone):
        world = 2

        def all_reduce(self, tensor):
            seen.append(int(tensor))
            return tensor + 100  # the other's

    mine = MicroBatches(trainer.config, Two(), trainer.objective, torch.device("cpu"))
    trainer.dispatcher.use(0)
    losses = mine.run(micro_batches(1), NUM)
    assert seen == [int(KEPT[:2].sum())]
    nlls = -token_logprobs(trainer.model, IDS)[:2][KEPT[:2]].sum()
    assert float(sum(each.ce for each in losses)) == pytest.approx(float(nlls) / (seen[0] + 100), rel=1e-5)


def test_a_step_of_which_nothing_is_trained_loses_nothing(texts, tmp_path):  # noqa: F811
    trainer = trainer_for(config_for(texts, tmp_path, micro_batch_size=2))
    metrics = trainer.step(micro_batches(2, torch.zeros_like(KEPT)))
    assert (metrics.loss, metrics.skipped, trainer.version) == (0, 1, 0), "the balance loss alone makes no step"


def test_validation_counts_what_is_trained(texts, tmp_path, monkeypatch):  # noqa: F811
    trainer = trainer_for(config_for(texts, tmp_path, micro_batch_size=1, eval_sequences=NUM))
    monkeypatch.setattr(trainer.data.val, "take", lambda at_B: batch(torch.from_numpy(np.asarray(at_B))))
    monkeypatch.setattr(trainer.data.val, "num_sequences", NUM)
    want = -token_logprobs(trainer.model, IDS)[KEPT].mean()
    assert trainer.evaluate() == pytest.approx(want.item(), rel=1e-5)


def contents(trainer):
    """(layer, expert) -> all that its shard has of it: weights and optimizer state."""
    found = {}
    for shard in trainer.pool.transport.shards.values():
        version = shard.store.current
        for layer, held in experts_of(version).items():
            for expert in held:
                named = named_matrices(version, shard.spec.model, {layer: (expert,)}, kinds_of(version))
                found[layer, expert] = {key: matrix.clone() for key, matrix in named}
    return found


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_expert_without_rows_stays_as_it_is(texts, tmp_path, dtype, matrices):  # noqa: F811
    """Momentum, and weights' decay too. It had moved before, so that something is left that could move it."""
    config = config_for(texts, tmp_path, steps=40).replace(model={"dtype": dtype}, optim={"matrices": matrices})
    trainer = trainer_for(config.replace(optim={"bias_update": "none"}), num_shards=2)
    trainer.step()
    layer, idle = config.model.moe_layers[0], 2
    name = next(iter(trainer.model.biases()))
    for each_E in (trainer.model.biases()[name], trainer.backbone.store.current.tensors[f"{name}::{WEIGHT}"]):
        each_E[idle] = -100.0
    before, moved = contents(trainer), set()
    for _ in range(3):
        counts = trainer.step().counts_LE
        assert counts[0][idle] == 0
        assert min(n for n in counts[0] if n) > 0
        after = contents(trainer)
        moved |= {
            key for key in after if any(not torch.equal(after[key][name], before[key][name]) for name in after[key])
        }
    assert moved == before.keys() - {(layer, idle)}


def test_places_are_those_of_the_stacks(texts, tmp_path):  # noqa: F811
    trainer = trainer_for(config_for(texts, tmp_path), num_shards=2)
    shard = trainer.pool.transport.shards["shard-1"]
    layer = trainer.config.model.moe_layers[0]
    held = shard.experts[layer]
    found = places_of(shard.store.current, {layer: (held[1], 99)})
    assert {name: at for name, at in found.items() if at} == {f"{layer}.{part}": [1] for part in ("gate", "up", "down")}


def test_documents_end_to_end_are_balanced_as_they_are_alone(texts, tmp_path):  # noqa: F811
    """The loss of each is that of a sequence of its own, weighed as the caller says."""
    trainer = trainer_for(config_for(texts, tmp_path))
    trainer.dispatcher.use(0)
    model, config, lengths = trainer.model, trainer.config.model, (5, 12, 1, 9)
    weights_D = torch.tensor([0.5, 1.0, 2.0, 0.0])
    docs_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    ids = IDS.flatten()[: len(docs_T)]
    with torch.no_grad():
        together = model(*packed_inputs(config, ids[None], docs_T[None])).routing
        found = document_balance_loss(together, config, docs_T, weights_D, 0.1)
        each = [model(*packed_inputs(config, part[None], None)).routing for part in ids.split(lengths)]
    alone = [sequence_balance_loss(routing, config, 1, n, 0.1) for routing, n in zip(each, lengths, strict=True)]
    assert float(found) == pytest.approx(float(weights_D @ torch.stack(alone)), rel=1e-5)
