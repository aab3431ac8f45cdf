"""Adapters of low rank: the same mathematics as whole weights, one copy of the base, and a resume bit for bit; frozen parts."""

import pytest
import torch

from tests.unit.test_trainer import all_weights, config_for, texts, trainer_for  # noqa: F401  a fixture
from trinity.checkpoint import open_checkpoint
from trinity.config import Sequences
from trinity.dispatch.transport import LocalTransport
from trinity.dispatch.view import StaticView
from trinity.experts.base import Assignments, LayerAdapters, LayerWeights
from trinity.experts.reference import ReferenceBackend
from trinity.experts.registry import resolve
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.experts.stacked import kinds_of, named_matrices
from trinity.experts.torch_backend import TorchBackend
from trinity.launch import check_out_dir
from trinity.models.registry import build
from trinity.placement.table import PlacementTable
from trinity.pool.local import local_pool
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Commit, Fetch, Load, Prepare, Stage
from trinity.train.backbone import load_values
from trinity.train.loss import token_logprobs

RANK = 4
RATES = {"warmup_steps": 0, "decay": "none", "adamw_lr": 1e-2, "matrices": "adamw", "balance_loss": 0.0}


# -- the mathematics, on one layer


def layer(dtype=torch.float32, experts=5, rows=24, dim=32, ffn=16, rank=RANK):
    rng = torch.Generator().manual_seed(3)

    def leaf(*shape):
        return (torch.randn(*shape, generator=rng) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    shapes = (rank, dim, ffn), (rank, dim, ffn), (rank, ffn, dim)
    pairs = [(leaf(experts, r, k).float(), leaf(experts, n, r).float()) for r, k, n in shapes]
    pairs = [tuple(part.detach().requires_grad_() for part in pair) for pair in pairs]
    expert_A = torch.randint(0, experts - 1, (2 * rows,), generator=rng)  # the last expert has no rows
    weight_A = torch.rand(2 * rows, generator=rng).requires_grad_()
    assigned = Assignments(torch.arange(rows).repeat(2), expert_A, weight_A)
    weights = LayerWeights(*(leaf(experts, ffn, dim).detach() for _ in range(3)))
    return leaf(rows, dim), assigned, weights, LayerAdapters(*pairs, 0.5)


def found(backend, x_RD, assigned, weights, adapters):
    y_RD = backend(x_RD, assigned, weights, adapters)
    leaves = [x_RD, assigned.weight_A, *(part for pair in adapters[:3] for part in pair)]
    return [y_RD.detach(), *torch.autograd.grad(y_RD.float().square().sum(), leaves)]


def test_every_backend_computes_what_the_merged_weights_do():
    for dtype, tolerance, paths in (
        (torch.float32, 2e-5, ("auto", "loop", "grouped")),
        (torch.bfloat16, 0.1, ("auto", "loop")),
    ):
        case = layer(dtype)
        want = found(ReferenceBackend(), *case)
        for path in paths:
            for mine, theirs in zip(found(TorchBackend(path), *case), want, strict=True):
                torch.testing.assert_close(mine.float(), theirs.float(), atol=tolerance, rtol=tolerance)


def test_megablocks_computes_adapters_as_torch_does():
    case = layer(dim=128, ffn=128, rows=6, experts=3)
    want = found(ReferenceBackend(), *case)
    for mine, theirs in zip(found(resolve("megablocks", "cpu"), *case), want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=5e-5)


def test_no_rows_give_no_gradient():
    x_RD, _, weights, adapters = layer()
    none = Assignments(
        *(torch.zeros(0, dtype=kind) for kind in (torch.int64, torch.int64)), torch.zeros(0).requires_grad_()
    )
    assert all(not gradient.any() for gradient in found(TorchBackend(), x_RD, none, weights, adapters))


# -- training


@pytest.fixture(scope="module")
def base(texts, tmp_path_factory):  # noqa: F811
    """The checkpoint of a short run, and its settings."""
    config = config_for(texts, tmp_path_factory.mktemp("base"), steps=2).replace(optim=RATES)
    trainer = trainer_for(config)
    trainer.step()
    return trainer.save(), config


def lora_config(base, out_dir, lora=None, **train):
    path, config = base
    settings = {"out_dir": str(out_dir), "init_from": str(path), "steps": 6} | train
    return config.replace(train=settings, optim={"lora": {"rank": RANK} | (lora or {})})


def adapters_of(trainer):
    """The adapters and their optimizer state, of backbone and experts."""
    state = {n: t for n, t in trainer.backbone.store.current.tensors.items() if ".lora_" in n}
    for shard in trainer.pool.transport.shards.values():
        version = shard.store.current
        kinds = [kind for kind in kinds_of(version) if kind.startswith("lora_")]
        state |= dict(named_matrices(version, shard.spec.model, shard.experts, kinds))
    return {name: tensor.clone() for name, tensor in state.items()}


def test_gradients_are_those_of_whole_weights_through_the_low_rank(base, tmp_path):
    """dB = s dW A^T and dA = s B^T dW, where dW is the gradient of the merged weights, in backbone and experts."""
    lora = trainer_for(lora_config(base, tmp_path / "lora"), num_shards=2)
    for _ in range(2):
        lora.step()
    saved = lora.save()
    config = base[1].replace(train={"out_dir": str(tmp_path / "full"), "init_from": str(saved), "steps": 6})
    full = trainer_for(config, num_shards=2)
    gradients = [gradients_at(trainer, position=2) for trainer in (lora, full)]
    mine, whole = gradients
    assert mine["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    parts = {name: tensor for name, tensor in adapters_of(lora).items() if name.endswith(".weight")}
    parts |= {
        f"{name.removesuffix('::weight')}": t for name, t in adapters_of(lora).items() if name.endswith("::weight")
    }
    scale, checked = lora.config.optim.lora.scale, 0
    for name in [name for name in mine if name.endswith(".lora_A.weight")]:
        dw = whole[name.replace(".lora_A", "").removeprefix("base_model.model.")]
        a, b = parts[name], parts[name.replace("lora_A", "lora_B")]
        torch.testing.assert_close(mine[name], scale * b.T @ dw, atol=1e-6, rtol=2e-3)
        torch.testing.assert_close(mine[name.replace("lora_A", "lora_B")], scale * dw @ a.T, atol=1e-6, rtol=2e-3)
        checked += 1
    assert checked == len(open_checkpoint(saved).adapter.modules)


def gradients_at(trainer, position):
    """Gradients of everything that is trained, of one step's batch, by name in files."""
    trainer.position = position
    ticket = trainer._begin_attempt()
    totals = trainer._forward_backward(ticket, trainer._next_batch)
    found = {name: p.grad for name, p in trainer.backbone.trained.items() if p.grad is not None}
    for shard in trainer.pool.transport.shards.values():
        sums, names = shard.gathered.sums(), {}
        for name, stack in sums.items():
            number, _, part = name.partition(".")
            for at, expert in enumerate(shard.experts[int(number)]):
                projection, _, kind = part.partition(".")
                matrix = stack[at].mT if part == "down" else stack[at]
                key = f"model.layers.{number}.mlp.experts.{expert}.{projection}_proj"
                names[f"base_model.model.{key}.{kind}.weight" if kind else f"{key}.weight"] = matrix
        found |= names
    return {**found, "loss": totals.ce}


def test_nothing_but_adapters_changes_and_the_base_is_one_copy(base, tmp_path):
    trainer = trainer_for(lora_config(base, tmp_path), num_shards=2)
    before, first = all_weights(trainer), adapters_of(trainer)
    stacks = [shard.versions.present for shard in trainer.pool.transport.shards.values()]
    addresses = [[w.data_ptr() for layer in shard.values() for w in layer] for shard in stacks]
    for _ in range(3):
        trainer.step()
    after, last = all_weights(trainer), adapters_of(trainer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    moved = [name for name in last if name.endswith("lora_B.weight") and not torch.equal(first[name], last[name])]
    assert moved
    assert not any("momentum" in name or "master" in name for name in last)
    stacks = [shard.versions.present for shard in trainer.pool.transport.shards.values()]
    assert [[w.data_ptr() for layer in shard.values() for w in layer] for shard in stacks] == addresses
    for shard in trainer.pool.transport.shards.values():
        base_bytes = sum(w.nbytes for layer in shard.versions.present.values() for w in layer)
        own = [t for name, t in shard.store.current.tensors.items() if "lora_" in name]
        assert shard.store.num_bytes == base_bytes + 2 * sum(t.nbytes for t in own), (
            "two versions of the adapters alone"
        )


def test_a_killed_run_goes_on_bit_for_bit(base, tmp_path):
    whole = trainer_for(lora_config(base, tmp_path / "whole"), num_shards=2)
    want = [whole.step().loss for _ in range(4)]
    cut = trainer_for(lora_config(base, tmp_path / "cut"), num_shards=2)
    got = [cut.step().loss for _ in range(2)]
    saved = cut.save()
    assert sorted(path.name for path in saved.glob("*.safetensors")) == ["adapter_model.safetensors"]
    config = lora_config(base, tmp_path / "cut", resume=True)
    assert check_out_dir(config) == saved
    again = trainer_for(config, num_shards=2)
    assert (again.version, again.position) == (2, 2)
    got += [again.step().loss for _ in range(2)]
    assert got == want
    mine, theirs = adapters_of(again), adapters_of(whole)
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []


def test_the_adapter_of_an_expert_without_rows_stays_as_it_is(base):
    config = base[1].replace(optim={"lora": {"rank": RANK}})
    shard = local_pool(config.model, Load(str(base[0]), training=False), optim=config.optim).transport.shards["shard-0"]
    number = config.model.moe_layers[0]
    for step in (1, 2):
        trained = shard.versions.trained[number]
        before = {name: stack.detach().clone() for name, stack in trained.items()}
        shard.gathered.add(f"test:{number}", tuple(trained), [torch.ones_like(stack) for stack in trained.values()])
        shard.prepare(Prepare(step))
        shard.stage(Stage(step, {"muon": 0.1, "adamw": 0.1}, 1.0, idle={number: (1, 3)} if step == 2 else {}))
        shard.commit(Commit(step))
    for name, stack in shard.versions.trained[number].items():
        same = [torch.equal(mine, theirs) for mine, theirs in zip(stack, before[name], strict=True)]
        assert same == [False, True, False, True], name


def stepped(config, table):
    """-> the adapters of a layer by expert and shard, after two steps of rows that went wherever the table says."""
    shards = {
        name: ExpertShard(ShardSpec(name, config.model, table.experts_of(name), config.optim, "torch"))
        for name in table.shards
    }
    pool, number = ExpertPool(StaticView(table), LocalTransport(shards), 60.0), config.model.moe_layers[0]
    for shard in shards.values():
        shard.peers = pool.transport
    pool.load(Load(seed=3))
    dispatcher, rng = pool.dispatcher(), torch.Generator().manual_seed(5)
    for step in (1, 2):
        dispatcher.use(step - 1, step)
        x_TD = torch.randn(40, config.model.hidden_size, generator=rng).requires_grad_()
        ids_TK = torch.stack([torch.randperm(config.model.num_experts, generator=rng)[:2] for _ in range(40)])
        dispatcher(number, x_TD, ids_TK, torch.rand(40, 2, generator=rng)).square().sum().backward()
        pool.prepare(step, dispatcher.num_sent_ops, step)
        assert pool.stage(Stage(step, {"muon": 0.0, "adamw": 0.01}, 1.0, step))()
        pool.commit(step)
    return {
        (expert, name): [shard.fetch(Fetch(number, expert, 2, 4e9, f"{part}.weight")) for part in ("lora_A", "lora_B")]
        for name, shard in shards.items()
        for expert in table.experts_of(name)[number]
    }


def test_replicas_of_an_expert_have_one_adapter(base):
    """Each has seen a part of the rows; both step with the sum."""
    config = base[1].replace(optim={"lora": {"rank": RANK}})
    layers, num = config.model.moe_layers, config.model.num_experts
    alone = stepped(config, PlacementTable.spread(layers, num, ("a",)))
    held = tuple((0, 1) if expert < 2 else (expert % 2,) for expert in range(num))
    found = stepped(config, PlacementTable(1, ("a", "b"), layers, (held,) * len(layers)))
    assert len(found) == num + 2
    for (expert, name), parts in found.items():
        for mine, want, other in zip(parts, alone[expert, "a"], found[expert, "ab"[held[expert][0]]], strict=True):
            torch.testing.assert_close(mine, want, atol=1e-5, rtol=1e-4)
            assert torch.equal(mine, other), (expert, name)


def test_a_server_of_the_run_computes_what_the_trainer_does(base, tmp_path):
    """An engine takes the backbone's version with its adapters merged; experts compute theirs on the shards."""
    trainer = trainer_for(lora_config(base, tmp_path))
    for _ in range(2):
        trainer.step()
    ids_BS = trainer.data.train.batch(Sequences.nth(0, 4), 0, 1, 0, 4).ids_BS
    engine = build(trainer.config.model, trainer.pool.dispatcher(trainer.version))
    load_values(engine, trainer.backbone.store.current)
    assert not engine.adapters()
    trainer.dispatcher.use(trainer.version)
    torch.testing.assert_close(token_logprobs(engine, ids_BS), token_logprobs(trainer.model, ids_BS), atol=2e-5, rtol=0)


# -- parts that are frozen


@pytest.mark.parametrize("freeze", [["embedding", "router", "norm"], ["experts"], ["attention", "dense", "head"]])
def test_frozen_parts_stay_bit_for_bit_and_the_run_resumes(base, tmp_path, freeze):
    path, config = base
    settings = {"steps": 6, "out_dir": str(tmp_path / "run"), "init_from": str(path)}
    config = config.replace(train=settings, optim={"freeze": freeze, "matrices": "muon"})
    trainer = trainer_for(config, num_shards=2)
    before = all_weights(trainer)
    losses = [trainer.step().loss for _ in range(2)]
    trainer.save()
    losses.append(trainer.step().loss)
    after = all_weights(trainer)
    words = {"embedding": "embed_tokens", "router": ("mlp.router", "expert_bias"), "norm": "norm.weight",
             "experts": ".experts.", "attention": "_proj", "dense": "mlp.", "head": "lm_head"}  # fmt: skip
    frozen = [name for name in before if any(_is_of(name, role, words) for role in freeze)]
    assert frozen
    assert [name for name in frozen if not torch.equal(before[name], after[name])] == []
    assert any(not torch.equal(before[name], after[name]) for name in before if name not in frozen)
    again = trainer_for(config.replace(train={"resume": True}), num_shards=2)
    assert again.step().loss == losses[-1]
    assert all(torch.equal(tensor, after[name]) for name, tensor in all_weights(again).items())


def _is_of(name, role, words):
    if role == "attention":
        return "self_attn" in name and "norm" not in name
    if role == "dense":
        return "mlp." in name and not any(part in name for part in ("experts", "router", "bias"))
    return any(word in name for word in ([words[role]] if isinstance(words[role], str) else words[role]))


def test_experts_alone_may_have_adapters(base, tmp_path):
    """Nothing of the backbone is trained then: rows go back to the shards although nobody wants their gradients."""
    trainer = trainer_for(lora_config(base, tmp_path, {"targets": ["experts"]}))
    assert trainer.backbone.trained == {}
    for _ in range(2):
        trainer.step()
    moved = {name for name, tensor in adapters_of(trainer).items() if name.endswith("lora_B.weight") and tensor.any()}
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in moved}
    assert layers == set(trainer.config.model.moe_layers), "the first of them too"
