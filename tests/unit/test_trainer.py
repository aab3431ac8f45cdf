"""The trainer without Ray: against plain autograd, over shard counts, resumed, and with a gradient that is not finite."""

import itertools
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trinity.checkpoint import list_checkpoints, open_checkpoint
from trinity.config import Config, Sequences
from trinity.data.prepare import prepare
from trinity.dispatch.transport import Done, LocalTransport
from trinity.errors import ConfigError, TrinityError
from trinity.experts.stacked import named_matrices
from trinity.models.afmoe.init import init_weights
from trinity.models.afmoe.model import Afmoe
from trinity.models.common.attention import PackedAttention, packed_positions
from trinity.models.common.losses import sequence_balance_loss
from trinity.models.registry import family_of
from trinity.optim.base import Matrix
from trinity.optim.muon import orthogonalize
from trinity.optim.optimizer import Optimizer
from trinity.optim.schedule import lr_factor
from trinity.pool.local import local_pool
from trinity.rpc.messages import WEIGHT, Load
from trinity.text.tokenizer import Tokenizer
from trinity.train.collectives import Alone
from trinity.train.loss import Losses
from trinity.train.microbatches import MicroBatches
from trinity.train.trainer import Trainer

SMALL = dict(vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, head_dim=8, num_experts=4)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for n in range(12):
        (folder / f"{n}.txt").write_text(" ".join(f"word{(n * i) % 37} is {i * n}" for i in range(300)))
    return folder


def config_for(texts, out_dir, **train):
    train = dict(steps=6, seq_len=32, global_batch_size=4, micro_batch_size=2, eval_every=0, eval_sequences=4) | train
    return Config.from_tree(
        {
            "model": {"preset": "tiny", **SMALL},
            "data": {"train": [str(texts)], "val_fraction": 0.2},
            "train": {**train, "out_dir": str(out_dir)},
            "optim": {"warmup_steps": 2, "z_loss": 1e-3, "balance_loss": 1e-2},
        }
    )


def trainer_for(config, num_shards=1):
    pool = local_pool(config.model, Load(), num_shards=num_shards, optim=config.optim, backend="torch")
    trainer = Trainer(config, pool, prepare(config.data, config.train, config.model, config.train.out_dir), Alone())
    trainer.start()
    return trainer


def all_weights(trainer):
    weights = dict(trainer.model.tensors())
    for shard in trainer.pool.transport.shards.values():
        weights.update(named_matrices(shard.store.current, shard.spec.model, shard.experts, (WEIGHT,)))
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def assert_close(a, b, atol):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


class Dense(torch.nn.Module):
    """Routed experts as ordinary parameters: no dispatch, no shards, no custom autograd."""

    def __init__(self, config, source):
        super().__init__()
        self.matrices = torch.nn.ParameterDict(
            {name.replace(".", "/"): tensor.clone() for name, tensor in source.items() if ".mlp.experts." in name}
        )

    def begin(self, layer, x_TD, ids_TK, weights_TK):
        y_TD = torch.zeros_like(x_TD)
        for e in range(SMALL["num_experts"]):
            gate, up, down = (
                self.matrices[f"model/layers/{layer}/mlp/experts/{e}/{p}_proj/weight"] for p in ("gate", "up", "down")
            )
            weight_T = (weights_TK * (ids_TK == e)).sum(-1)
            y_TD = y_TD + weight_T[:, None] * ((torch.nn.functional.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T)
        return Done(y_TD)


def train_plainly(config, start, data):
    """The same run as one ordinary torch program: one graph, autograd everywhere, one clip, one optimizer."""
    dense = Dense(config.model, start)
    model = Afmoe(config.model, dense)
    init_weights(model, config.train.seed)
    dense_names = {n.replace("/", ".") for n in dense.matrices}
    names = model.weights() | {n.replace("/", "."): p for n, p in dense.matrices.items()}
    matrices = {
        n: Matrix(*p.shape)
        for n, p in names.items()
        if n in dense_names or family_of(config.model).group(n, p) == "matrices"
    }
    optimizer = Optimizer({n: p.detach() for n, p in names.items()}, matrices, config.optim)
    settings, losses = config.train, []
    for step in range(settings.steps):
        batch = data.train.batch(Sequences.nth(step, settings.global_batch_size), 0, 1, 0, settings.global_batch_size)
        num, seq = batch.ids_BS.shape
        out = model(
            batch.ids_BS.flatten(), packed_positions(num, seq), PackedAttention(config.model, batch.docs_BS, num, seq)
        )
        logits, targets = model.logits(out.hidden_TD), batch.targets_BS.flatten()
        ce = torch.nn.functional.cross_entropy(logits, targets)
        z = config.optim.z_loss * logits.logsumexp(-1).square().mean()
        loss = ce + z + sequence_balance_loss(out.routing, config.model, num, seq, config.optim.balance_loss)
        grads = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        scale = min(1.0, config.optim.grad_clip / norm)
        factor = lr_factor(step + 1, config.optim, settings.steps)
        lrs = {"muon": config.optim.muon_lr * factor, "adamw": config.optim.adamw_lr * factor}
        optimizer.step(grads, lrs, scale)
        losses.append((float(ce.detach()), norm))
    return losses, {n: p.detach() for n, p in names.items()}


def test_training_through_shards_equals_an_ordinary_program(texts, tmp_path):
    config = config_for(texts, tmp_path, steps=5).replace(optim={"bias_update": "none"})
    trainer = trainer_for(config, num_shards=2)
    want, want_weights = train_plainly(config, all_weights(trainer), trainer.data)
    got = [trainer.step() for _ in range(config.train.steps)]
    torch.testing.assert_close([(m.loss, m.grad_norm) for m in got], want, atol=1e-5, rtol=1e-5)
    mine = {n: t for n, t in all_weights(trainer).items() if not n.endswith("expert_bias")}
    assert_close(mine, want_weights, atol=1e-5)


def test_1_2_and_4_shards_train_alike(texts, tmp_path):
    runs = []
    for num_shards in (1, 2, 4):
        trainer = trainer_for(config_for(texts, tmp_path / str(num_shards)), num_shards)
        runs.append(([trainer.step().loss for _ in range(6)], all_weights(trainer)))
    for losses, weights in runs[1:]:
        torch.testing.assert_close(losses, runs[0][0], atol=1e-5, rtol=0)
        assert_close(weights, runs[0][1], atol=1e-5)
    assert runs[0][0][-1] < runs[0][0][0]


class Late(LocalTransport):
    """Computes nothing before its answer is asked for; `log` tells in which order that is."""

    def __init__(self, shards):
        super().__init__(shards)
        self.log = []

    def send(self, shard, verb, message):
        if verb not in ("infer", "backward"):
            return super().send(shard, verb, message)
        self.log.append(("send", verb, message.layer))
        return LateReply(
            lambda: self.log.append(("take", verb, message.layer)) or super(Late, self).send(shard, verb, message)
        )


class LateReply:
    def __init__(self, send):
        self.send = send

    def result(self):
        return self.send().result()


def test_micro_batches_side_by_side_train_alike_and_are_under_way_together(texts, tmp_path):
    runs = {}
    for num in (1, 2):
        trainer = trainer_for(config_for(texts, tmp_path / str(num), num_overlapped_microbatches=num))
        late = trainer.dispatcher.transport = Late(trainer.dispatcher.transport.shards)
        runs[num] = [trainer.step().loss for _ in range(6)], all_weights(trainer), late.log
    torch.testing.assert_close(runs[2][0], runs[1][0], atol=1e-6, rtol=0)
    assert_close(runs[2][1], runs[1][1], atol=1e-5)
    first = trainer.config.model.moe_layers[0]
    assert runs[1][2][:2] == [("send", "infer", first), ("take", "infer", first)]
    assert runs[2][2][:3] == [("send", "infer", first), ("send", "infer", first), ("take", "infer", first)]
    for num, (_, _, log) in runs.items():
        steps = [1 if what == "send" else -1 for what, verb, _ in log if verb == "backward"]
        assert max(itertools.accumulate(steps)) == num


def test_resumed_equals_uninterrupted_bitwise_on_another_number_of_shards(texts, tmp_path):
    whole = trainer_for(config_for(texts, tmp_path / "whole"))
    want = [whole.step().loss for _ in range(6)]
    first = trainer_for(config_for(texts, tmp_path / "cut"))
    got = [first.step().loss for _ in range(3)]
    assert first.save().name == "step-000003"
    second = trainer_for(config_for(texts, tmp_path / "cut"), num_shards=1)
    assert (second.version, second.position) == (3, 3)
    got += [second.step().loss for _ in range(3)]
    assert got == want
    weights = all_weights(whole)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in all_weights(second).items())
    third = trainer_for(config_for(texts, tmp_path / "cut"), num_shards=4)
    torch.testing.assert_close([third.step().loss for _ in range(3)], want[3:], atol=1e-5, rtol=0)


def test_gradients_that_are_not_finite_skip_the_step_everywhere(texts, tmp_path):
    trainer = trainer_for(config_for(texts, tmp_path), num_shards=2)
    trainer.step()
    before = all_weights(trainer)

    class Poison(LocalTransport):
        def send(self, shard, verb, message):
            reply = super().send(shard, verb, message)
            if verb == "backward" and shard == "shard-1":
                self.shards[shard].gathered._total[f"{message.layer}.gate"][0, 0, 0] = math.nan
            return reply

    clean = trainer.dispatcher.transport
    trainer.dispatcher.transport = Poison(clean.shards)
    metrics = trainer.step()
    assert (metrics.skipped, trainer.version, trainer.position) == (1, 1, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in all_weights(trainer).items())
    trainer.dispatcher.transport = clean
    assert math.isfinite(trainer.step().loss)
    assert (trainer.version, trainer.position) == (2, 3)


def test_a_run_that_only_skips_stops_by_itself(texts, tmp_path):
    trainer = trainer_for(config_for(texts, tmp_path, steps=50))
    trainer._prepare = lambda *_: math.inf
    with pytest.raises(TrinityError, match="20 steps in a row"):
        trainer.run()
    assert (trainer.version, trainer.position) == (0, 20)


def test_bf16_models_add_up_small_gradients_and_resume_bitwise(texts, tmp_path):
    def config(out, **train):
        return config_for(texts, tmp_path / out, **train).replace(model={"dtype": "bfloat16"})

    grads = []
    for micro in (1, 64):
        trainer = trainer_for(config(f"micro{micro}", global_batch_size=64, micro_batch_size=micro, seq_len=8))
        trainer._stage = lambda *_, t=trainer: bool(grads.append({n: g.clone() for n, g in t._grads().items()}))
        trainer.step()
    for name, summed in grads[0].items():
        assert summed.dtype == torch.float32
        assert float((summed - grads[1][name]).norm() / grads[1][name].norm()) < 0.05, name

    whole, first = trainer_for(config("whole")), trainer_for(config("cut"))
    want = [whole.step().loss for _ in range(4)]
    got = [first.step().loss for _ in range(2)]
    source = open_checkpoint(first.save())
    assert source.tensor("lm_head.weight").dtype == torch.bfloat16
    assert source.tensor("model.layers.1.mlp.expert_bias").dtype == torch.float32
    second = trainer_for(config("cut"))
    assert got + [second.step().loss for _ in range(2)] == want
    assert all(torch.equal(t, all_weights(whole)[name]) for name, t in all_weights(second).items())


def test_another_order_of_data_is_not_resumed(texts, tmp_path):
    trainer = trainer_for(config_for(texts, tmp_path))
    trainer.step()
    trainer.save()
    with pytest.raises(ConfigError, match="other data or batches"):
        trainer_for(config_for(texts, tmp_path, global_batch_size=8))


def test_other_documents_of_as_many_tokens_are_not_resumed(texts, tmp_path):
    words, trainers = ["one two three ", "two one three "], []
    Tokenizer.train(iter(words), 300).save(tmp_path)
    for name, text in zip("ab", words, strict=True):
        (tmp_path / f"{name}.txt").write_text(text * 300)
        data = {"train": [str(tmp_path / f"{name}.txt")], "val_fraction": 0, "tokenizer": str(tmp_path)}
        trainers.append(partial(trainer_for, config_for(texts, tmp_path / "run").replace(data=data)))
    first = trainers[0]()
    first.step()
    first.save()
    with pytest.raises(ConfigError, match=f"other data or batches.*{first.data.train.store.content}") as refused:
        trainers[1]()
    assert refused.value.message.count(f"'num_tokens': {len(first.data.train.store.tokens)}") == 2
    assert trainers[0]().position == 1


def test_validation_is_the_same_for_any_number_of_workers_and_uses_what_there_is(texts, tmp_path):
    trainer = trainer_for(config_for(texts, tmp_path, eval_sequences=5, micro_batch_size=2))
    alone = trainer.evaluate()

    class Two:
        world = 2

        def __init__(self, rank):
            self.rank, self.sent = rank, []

        def all_reduce(self, tensor):
            self.sent.append(tensor.clone())
            return tensor

    parts = []
    for rank in range(2):
        trainer.comm = Two(rank)
        trainer.evaluate()
        num_tokens, sums = trainer.comm.sent
        parts.append((float(num_tokens * sums[0, 0]), float(num_tokens)))
    (a, num_a), (b, num_b) = parts
    assert (a + b) / (num_a + num_b) == pytest.approx(alone, rel=1e-5)


class Seen(torch.nn.Module):
    """An objective that only notes what it is given."""

    measures = ()

    def __init__(self):
        super().__init__()
        self.zero, self.batches = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, batches, num_tokens, num_sequences):
        self.batches += batches
        return [Losses(self.zero, self.zero, self.zero, torch.zeros(1, 4), self.zero) for _ in batches]


@pytest.mark.parametrize("world", range(1, 7))
def test_any_number_of_workers_shares_out_the_whole_step(texts, tmp_path, world):
    """Each sequence once, whether the number divides the micro-batches or not, in the order of the data."""
    trainer, found = trainer_for(config_for(texts, tmp_path, global_batch_size=12, micro_batch_size=2)), {}
    want = trainer.data.train.sequences(Sequences.nth(0, 12)).tolist()
    by_text = {tuple(trainer.data.train.take(np.array([n])).ids_BS[0].tolist()): n for n in want}

    for rank in range(world):
        seen = Seen()
        comm = SimpleNamespace(rank=rank, world=world, all_reduce=lambda sums: sums)
        mine = MicroBatches(trainer.config, comm, seen, torch.device("cpu"))
        losses = mine.run(lambda micro, mine=mine: mine.batch(trainer.data.train, 0, micro), 12)
        assert len(losses) == len(seen.batches)
        for micro, batch in enumerate(seen.batches):
            found[micro * world + rank] = [by_text[tuple(row)] for row in batch.ids_BS.tolist()]
    assert [n for place in sorted(found) for n in found[place]] == want


def test_run_evaluates_saves_and_reports(texts, tmp_path):
    config = config_for(texts, tmp_path, steps=4, eval_every=2, save_every=2, keep_checkpoints=1)
    keys = {"api_key": "hidden-1", "admin_key": "hidden-2", "clients": {"ann": {"key": "hidden-3"}}}
    trainer = trainer_for(config.replace(serve=keys))
    result = trainer.run()
    assert result["version"] == 4
    assert math.isfinite(result["val_loss"])
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000004"]
    state = json.loads((tmp_path / "step-000004" / "training" / "state.json").read_text())
    assert (state["position"], state["num_skipped"]) == (4, 0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hidden-" in path.read_bytes()]


def test_intra_document_masks_change_the_loss(texts, tmp_path):
    (texts / "lines.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(200)))
    masked = trainer_for(config_for(texts, tmp_path / "a"))
    plain = trainer_for(config_for(texts, tmp_path / "b").replace(data={"intra_document_mask": False}))
    assert [masked.step().loss for _ in range(6)] != [plain.step().loss for _ in range(6)]


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (3, 6, 4)])
def test_orthogonalised_updates_have_singular_values_near_one(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalize(g))
    assert singular.min() > 0.6
    assert singular.max() < 1.4
    torch.testing.assert_close(orthogonalize(g.mT), orthogonalize(g).mT, atol=1e-5, rtol=0)
    assert not orthogonalize(torch.zeros(shape)).any()


def test_adamw_equals_torch():
    torch.manual_seed(0)
    config = Config.from_tree({"model": "tiny"}).optim
    mine, theirs = torch.randn(6, 4), torch.nn.Parameter(torch.zeros(6, 4))
    theirs.data.copy_(mine)
    reference = torch.optim.AdamW(
        [theirs], lr=3e-3, betas=config.adamw_betas, eps=config.adamw_eps, weight_decay=config.weight_decay
    )
    optimizer = Optimizer({"w": mine}, {}, config)
    for _ in range(5):
        grad = torch.randn(6, 4)
        optimizer.step({"w": grad}, {"adamw": 3e-3})
        theirs.grad = grad.clone()
        reference.step()
    torch.testing.assert_close(mine, theirs.detach(), atol=1e-6, rtol=1e-6)


def test_schedule_warms_up_stays_and_decays():
    optim = Config.from_tree({"model": "tiny"}).optim
    linear = optim.model_copy(update=dict(warmup_steps=10, decay="linear", decay_start=50, final_lr_ratio=0.1))
    assert [round(lr_factor(s, linear, 100), 3) for s in (1, 10, 50, 75, 100)] == [0.1, 1.0, 1.0, 0.55, 0.1]
    cosine = linear.model_copy(update=dict(decay="cosine"))
    assert [round(lr_factor(s, cosine, 100), 3) for s in (50, 75, 100)] == [1.0, 0.55, 0.1]


def test_a_worker_that_takes_over_after_the_last_step_writes_its_checkpoint(texts, tmp_path):
    """The one before died between the last step's decision and the end of its checkpoint."""
    trainer = trainer_for(config_for(texts, tmp_path, steps=2))
    trainer.step()
    trainer.step()
    result = trainer.run()
    assert open_checkpoint(result["checkpoint"]).version == result["position"] == 2
    assert math.isfinite(result["val_loss"])
    assert trainer.run()["checkpoint"] == result["checkpoint"], "one that is there is left as it is"


def test_a_worker_that_takes_over_in_between_writes_the_checkpoint_that_was_due(texts, tmp_path):
    """The one before died between a step's decision and the end of its checkpoint."""
    trainer = trainer_for(config_for(texts, tmp_path, steps=5, save_every=2, keep_checkpoints=9))
    trainer.step()
    trainer.step()
    trainer.run()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-00000{n}" for n in (2, 4, 5)]
