"""Experts in another form than they are trained in: one object with its scales, made at commits, moved and replicated as it is,
with a monolith's bits."""

import random

import pytest
import torch

from tests.unit.test_replicas import FOREVER, LAYER, MODEL, copy_all
from trinity.checkpoint import all_experts
from trinity.config import Config, LoraConfig, OptimConfig, PlacementConfig
from trinity.dispatch.transport import LocalTransport
from trinity.dispatch.view import StaticView
from trinity.errors import ConfigError, InvalidRequest, StepConflict, VersionGone
from trinity.experts.base import Assignments
from trinity.experts.derived import FORMS, shapes_of
from trinity.experts.derived_compute import infer
from trinity.experts.layer import ready_layers
from trinity.experts.migration import migrate_in
from trinity.experts.native_experts import matrices_of
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.experts.sizes import replica_bytes
from trinity.experts.stacked import derived_rows
from trinity.ops import formats
from trinity.ops.batch_invariant import fused_mlp
from trinity.ops.unpack import unpacked
from trinity.placement.table import PlacementTable
from trinity.pool.local import shard_specs
from trinity.pool.memory import experts_bytes
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import (
    REMOTE,
    WEIGHT,
    Commit,
    Copy,
    Fetch,
    Forward,
    Install,
    Load,
    Prepare,
    PruneTo,
    Rows,
    Save,
    Stage,
    Status,
)
from trinity.state.versioned_store import Store

MODEL = MODEL.model_copy(update=dict(moe_intermediate_size=16))
NUM = MODEL.num_experts
ODD = [name for name in FORMS if name != MODEL.dtype]


def shard_of(name, experts, form, optim=None, load=None):
    held = {layer: tuple(experts) for layer in MODEL.moe_layers}
    shard = ExpertShard(ShardSpec(name, MODEL, held, optim, backend="torch", expert_dtype=form))
    shard.load(load or Load(seed=5, training=optim is not None))
    return shard


def matrices(shape, seed=0):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    w[0] *= 30
    return w


# -- forms


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", [(16, 32), (5, 16), (130, 144), (3, 7)])
def test_one_experts_row_is_all_that_it_has(name, shape):
    form = FORMS[name]
    if shape[1] % form.inputs:
        return
    stack, other = form.empty(shape, 3), form.empty(shape, 2).zero_()
    for at in range(3):
        form.derive(stack, at, matrices(shape, at))
    form.put(other, 1, shape, form.row(stack, 2, shape))
    for mine, theirs in zip(form.parts(other, shape), form.parts(stack, shape), strict=True):
        assert torch.equal(mine[1].view(torch.uint8), theirs[2].view(torch.uint8))
        assert not mine[0].view(torch.uint8).any()
        assert mine.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()  # one buffer
    wrong = (form.read(*(part[1] for part in form.parts(other, shape))) - matrices(shape, 2)).abs()
    worst = {"float32": 0, "bfloat16": 2**-8, "int8": 1 / 250, "fp8": 1 / 15, "nvfp4": 1 / 3}[name]
    assert (wrong <= worst * matrices(shape, 2).abs().amax(1, keepdim=True)).all()


def test_e2m1_numbers_are_the_nearest_and_halves_go_to_even():
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    w = torch.linspace(-6, 6, 16 * 9).view(9, 16)
    w[:, 0] = 6  # so that every scale is one
    w[0, 1:8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    data, scale, overall = formats.to_fp4(w)
    assert (scale.float() / overall).unique().tolist() == [1.0]
    got = formats.decoded(data, formats.FP4)
    assert got[0, 1:8].tolist() == [0, 1, 1, 2, 2, 4, 4]
    nearest = (w.abs().unsqueeze(2) - grid).abs().amin(2)
    assert torch.equal((got - w).abs(), nearest)


@pytest.mark.parametrize("shape", [(5, 7), (3, 256), (2, 300), (0, 4)])
@pytest.mark.parametrize(("table", "columns"), [(formats.FP8, 128), (formats.FP4, 16), (formats.INT8, 3)])
def test_what_is_unpacked_in_one_pass_has_the_formats_bits(shape, table, columns):
    rng = torch.Generator().manual_seed(shape[1])
    data = torch.randint(0, 127, shape, generator=rng).to(torch.uint8)
    num = shape[1] * table.shape[1]
    scale = torch.rand(shape[0], -(-num // columns), generator=rng)
    want = formats.scaled(formats.decoded(data, table), scale, columns) if shape[0] else torch.empty(0, num)
    assert torch.equal(unpacked(data, table, scale, columns), want)


@pytest.mark.parametrize("name", ODD)
def test_rows_have_the_same_bits_in_any_company_and_are_products_of_the_formats_numbers(name):
    shard = shard_of("a", range(NUM), name)
    layer = ready_layers(shard.store.current, MODEL, None)[LAYER]
    rng = torch.Generator().manual_seed(1)
    x, expert, weight = (
        torch.randn(37, MODEL.hidden_size, generator=rng),
        torch.arange(37) % NUM,
        torch.rand(37, generator=rng),
    )
    assigned = Assignments(torch.arange(37), expert, weight)
    whole = infer(x, assigned, layer.derived)
    for part in (slice(0, 1), slice(3, 20), slice(1, 37)):
        own = Assignments(torch.arange(len(x[part])), expert[part], weight[part])
        assert torch.equal(infer(x[part], own, layer.derived), whole[part])
    gate, up, down = (
        torch.stack([layer.derived.form.read(*(p[e] for p in parts)) for e in range(NUM)])
        for parts in layer.derived[1:]
    )
    order = expert.argsort(stable=True)
    end = torch.bincount(expert, minlength=NUM).cumsum(0)
    with torch.no_grad():
        exact = fused_mlp.feed_forward(x[order], gate, up, down.contiguous(), end, weight[order])
    if name in ("int8", "bfloat16"):  # rows are rounded as well
        torch.testing.assert_close(whole[order], exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))
    else:
        assert torch.equal(whole[order], exact)
    assert torch.equal(
        infer(x.bfloat16(), assigned, layer.derived), infer(x.bfloat16().float(), assigned, layer.derived).bfloat16()
    )
    assert not infer(x, Assignments(*(each[:0] for each in assigned)), layer.derived).any()


# -- shards


def step_all(shards, step):
    """One update of every shard, with gradients that are an expert's own."""
    noise = torch.Generator().manual_seed(step)
    all_noise = {
        layer: {i: torch.randn(3, NUM, *shapes_of(MODEL)[0], generator=noise) for i in (0,)}[0]
        for layer in MODEL.moe_layers
    }
    for shard in shards:
        for layer in MODEL.moe_layers:
            trained = shard.versions.trained[layer]
            gradients = [
                torch.empty_strided(stack.shape, stack.stride()).copy_(all_noise[layer][i][list(shard.experts[layer])])
                for i, stack in enumerate(trained.values())
            ]
            shard.gathered.add(f"test:{layer}", tuple(trained), gradients)
        shard.prepare(Prepare(step))
        shard.stage(Stage(step, {"muon": 0.02, "adamw": 0.01}, 1.0, keep=(step - 1,)))
        shard.commit(Commit(step))


def answers(shard, layer, version, experts, is_native=True):
    """y of rows that one expert each computes."""
    shard._is_native = lambda _: is_native
    x = torch.randn(len(experts), MODEL.hidden_size, generator=torch.Generator().manual_seed(version))
    ids = torch.tensor([[expert, REMOTE] for expert in experts])
    return shard.infer(Forward("", layer, 0, version, FOREVER, Rows(x, ids, torch.full((len(experts), 2), 0.7))))


@pytest.mark.parametrize("name", ODD)
def test_moved_replicated_and_updated_at_once_they_have_a_monoliths_bits(name):
    rng, optim = random.Random(ODD.index(name)), OptimConfig()
    whole = shard_of("whole", range(NUM), name, optim)
    shards = {s: shard_of(s, at, name, optim) for s, at in (("a", range(3)), ("b", range(3, 6)), ("c", range(6, NUM)))}
    seen = set()
    for turn in range(12):
        what = rng.choice(["step", "copy", "copy", "prune"])
        owner = {e: [s for s, shard in shards.items() if e in shard.experts[LAYER]] for e in range(NUM)}
        expert, target = rng.randrange(NUM), rng.choice("abc")
        if what == "step":
            step_all([whole, *shards.values()], whole.version + 1)
        elif what == "copy" and expert not in shards[target].experts[LAYER]:
            source = {s: shard for s, shard in shards.items() if s != target}
            copy_all(shards[target], [expert], source)
        elif what == "prune" and len(owner[expert]) > 1:
            shard = shards[owner[expert][0]]
            left = {
                layer: tuple(e for e in shard.experts[layer] if (layer, e) != (LAYER, expert))
                for layer in MODEL.moe_layers
            }
            shard.prune_to(PruneTo(left))
        seen.add(what)
        for expert in range(NUM) if what == "step" else ():  # the monolith's form is made of its weights
            weights, words = (
                whole.fetch(Fetch(LAYER, expert, whole.version, FOREVER, k)) for k in (WEIGHT, FORMS[name].kind)
            )
            assert torch.equal(words.view(torch.int32), derived_rows(weights, FORMS[name], MODEL).view(torch.int32))
        kind = FORMS[name].kind
        for shard in shards.values():
            held = shard.experts[LAYER]
            for version in {shard.version, max(0, shard.version - 1)}:
                if version == shard.version or set(shard.weights.holds(version, LAYER)) >= set(held):
                    assert torch.equal(
                        answers(shard, LAYER, version, held), answers(whole, LAYER, version, held, False)
                    ), (
                        turn,
                        what,
                    )
            for at in held:
                call = Fetch(LAYER, at, shard.version, FOREVER, kind)
                assert torch.equal(shard.fetch(call).view(torch.int32), whole.fetch(call).view(torch.int32))
    assert seen == {"step", "copy", "prune"}
    assert whole.version > 1


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_a_pool_that_serves_has_that_form_alone_and_the_bits_of_one_that_trains(tmp_path, name, monkeypatch):
    monkeypatch.setattr("trinity.experts.loading.AT_ONCE_BYTES", 3 * 4 * MODEL.expert_params)  # three at a time
    trained = shard_of("a", range(NUM), name, OptimConfig())
    served = shard_of("b", range(3), name)
    plain = shard_of("c", range(NUM), None)
    assert served.weights.kinds(0) == (FORMS[name].kind,)
    copy_all(served, [4, 6], {"a": trained})
    migrate_in(served, Copy(LAYER, (7,), ("",), 0, FOREVER), LocalTransport({}), Load(seed=5, training=False))
    held = served.experts[LAYER]
    assert held == (0, 1, 2, 4, 6, 7)
    ready = [ready_layers(shard.store.current, MODEL, None)[LAYER] for shard in (served, trained, plain)]
    assert None not in map(matrices_of, ready), "C++ knows all of them"
    assert torch.equal(answers(served, LAYER, 0, held), answers(trained, LAYER, 0, held))
    assert not torch.equal(answers(served, LAYER, 0, held), answers(plain, LAYER, 0, held))
    size = served.status(Status()).weight_bytes / served.weights.num_experts
    assert size < (plain.status(Status()).weight_bytes / plain.weights.num_experts) * (0.6 if name == "int8" else 0.3)
    assert [s.status(Status()).expert_dtype for s in (served, plain)] == [name, "float32"]
    with pytest.raises(InvalidRequest, match=f"has experts as {name} only; nothing is saved"):
        served.save(Save(str(tmp_path), {LAYER: (0,)}, 0, training=False))


def test_what_outlives_its_process_has_its_form(tmp_path):
    spec = ShardSpec("a", MODEL, all_experts(MODEL), OptimConfig(), backend="torch", expert_dtype="fp8")
    before = ExpertShard(spec, Store(tmp_path))
    before.load(Load(seed=5))
    step_all([before], 1)
    want = answers(before, LAYER, 1, range(NUM))
    before.store._lock.close()  # as when its process dies
    after = ExpertShard(spec, Store(tmp_path))
    assert after.version == 1
    assert torch.equal(answers(after, LAYER, 1, range(NUM)), want)
    step_all([after], 2)
    assert not torch.equal(answers(after, LAYER, 2, range(NUM)), want)


def test_what_comes_without_its_form_is_refused():
    """A pool is of one form: experts of another are not taken up, and rows of it are of no use."""
    int8, plain = shard_of("a", range(4), "int8", OptimConfig()), shard_of("b", range(4, NUM), None, OptimConfig())
    with pytest.raises(InvalidRequest, match=r"version 0 has no 'int8.weight'"):
        copy_all(int8, [5], {"b": plain})
    rows = {kind: (plain.fetch(Fetch(LAYER, 5, 0, FOREVER, kind)),) for kind in plain.weights.kinds(0)}
    with pytest.raises(InvalidRequest, match=r"this shard needs .*int8[.]weight"):
        int8.install(Install(LAYER, (5,), 0, rows))
    assert int8.experts[LAYER] == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--placement.expert_dtype", "[int8, fp9]"], r"placement.expert_dtype.1: .* \(got 'fp9'\)"),
        (["--placement.expert_dtype", "int8", "--optim.lora.rank", "4"], "int8 knows no adapters"),
        (
            ["--placement.expert_dtype", "nvfp4", "--model.moe_intermediate_size", "24"],
            r"multiples of 16; .* \(128, 24\)",
        ),
        (
            ["--placement.expert_dtype", "[float32, int8]", "--placement.device", "cuda"],
            "int8 is computed on CPUs, not on cuda",
        ),
        (["--placement.expert_dtype", "fp8", "--placement.num_gpus_per_shard", "1"], "fp8 is computed on CPUs"),
    ],
)
def test_settings_of_what_cannot_be_are_refused_before_anything_is_started(flags, message):
    with pytest.raises(ConfigError, match=message):
        Config.load(None, flags, model="tiny")


def test_a_shards_form_is_the_one_whose_turn_its_number_is():
    found = Config.load(None, ["--placement.expert_dtype", "[float32, int8, fp8]"], model="tiny").placement
    names = ("shard-0", "shard-1", "shard-2", "shard-3", "shard-13", "a")
    assert [found.expert_dtype_of(name) for name in names] == ["float32", "int8", "fp8", "float32", "int8", "float32"]
    assert (
        Config.load(None, ["--placement.expert_dtype", "int8"], model="tiny").placement.expert_dtype_of("shard-7")
        == "int8"
    )
    assert Config.load(None, [], model="tiny").placement.expert_dtype_of("shard-0") is None


def test_what_cannot_be_is_refused_when_the_shard_is_made():
    for changes, message in (
        ({"optim": OptimConfig(lora=LoraConfig(rank=2))}, "knows no adapters"),
        ({"device": "cuda"}, "is computed on CPUs"),
        ({"model": MODEL.model_copy(update={"moe_intermediate_size": 12}), "expert_dtype": "nvfp4"}, "multiples of 16"),
    ):
        settings = {"name": "a", "model": MODEL, "experts": {}, "expert_dtype": "int8", **changes}
        with pytest.raises(ConfigError, match=message):
            ExpertShard(ShardSpec(**settings))


# -- shards of several forms, which somebody asked for

LORA = {"lora": LoraConfig(rank=2)}
MIXED = ("int8", "float32", "bfloat16")


def mixed_shards(optim, model=MODEL, dtypes=MIXED):
    """Shards of one pool, each with two experts and in the form that is its number's turn."""
    settings, shards = PlacementConfig(expert_dtype=dtypes), {}
    table = PlacementTable.spread(model.moe_layers, NUM, [f"shard-{i}" for i in range(len(dtypes))])
    for spec in shard_specs(table, model, optim, settings, "cpu"):
        shards[spec.name] = ExpertShard(spec)
        shards[spec.name].load(Load(seed=5, training=optim is not None))
    return shards


def test_shards_of_several_forms_have_each_a_monoliths_bits_wherever_experts_come_from():
    shards = mixed_shards(OptimConfig())
    wholes = [shard_of("whole", range(NUM), form, OptimConfig()) for form in MIXED]
    for turn in range(3):
        step_all([*wholes, *shards.values()], turn + 1)
        for at, (name, shard) in enumerate(shards.items()):
            others = {s: other for s, other in shards.items() if s != name}
            new = next(e for e in range(NUM) if e not in shard.experts[LAYER])
            copy_all(shard, [new], {s: other for s, other in others.items() if new in other.experts[LAYER]})
            held = shard.experts[LAYER]
            assert new in held
            assert torch.equal(answers(shard, LAYER, turn + 1, held), answers(wholes[at], LAYER, turn + 1, held))
    step_all([*wholes, *shards.values()], 4)  # what came with another form's state takes steps, too
    for shard, whole in zip(shards.values(), wholes, strict=True):
        assert torch.equal(
            answers(shard, LAYER, 4, shard.experts[LAYER]), answers(whole, LAYER, 4, shard.experts[LAYER])
        )


def test_where_they_serve_the_checkpoint_is_read_for_what_no_other_shard_has():
    shards, source = mixed_shards(None), Load(seed=5, training=False)
    for name, form in (("shard-0", "int8"), ("shard-1", None)):
        shard, there = shards[name], "shard-1" if name == "shard-0" else "shard-0"
        new = shards[there].experts[LAYER][0]
        copy = Copy(LAYER, (new,), (there,), 0, FOREVER)
        with pytest.raises(StepConflict, match="in no checkpoint"):
            migrate_in(shard, copy, LocalTransport(shards), None)
        migrate_in(shard, copy, LocalTransport(shards), source)
        held = shard.experts[LAYER]
        assert torch.equal(answers(shard, LAYER, 0, held), answers(shard_of("w", range(NUM), form), LAYER, 0, held))


def test_an_older_version_without_its_master_is_not_made_into_another_form():
    """Its bits would be those of weights that were rounded before."""
    shards = mixed_shards(OptimConfig(), MODEL.model_copy(update={"dtype": "bfloat16"}), ("int8", "bfloat16"))
    step_all(shards.values(), 1)
    expert = shards["shard-1"].experts[LAYER][0]
    with pytest.raises(VersionGone, match="without its fp32 master, of which int8 is made"):
        migrate_in(shards["shard-0"], Copy(LAYER, (expert,), ("shard-1",), 0, FOREVER), LocalTransport(shards), None)
    migrate_in(shards["shard-0"], Copy(LAYER, (expert,), ("shard-1",), 1, FOREVER), LocalTransport(shards), None)


def test_forms_that_nobody_asked_for_are_refused_by_name():
    model, load = MODEL, Load(seed=5, training=False)
    table = PlacementTable.spread(model.moe_layers, NUM, ["a", "b"])
    shards = {
        name: ExpertShard(ShardSpec(name, model, table.experts_of(name), backend="torch", expert_dtype=form))
        for name, form in (("a", "int8"), ("b", None))
    }
    message = "experts as float32 on b; int8 on a, which was not asked for.*expert_dtype, which is {}"
    for asked, said in (((), "not set"), (("int8",), "int8"), (("int8", "fp8"), "int8, fp8")):
        pool = ExpertPool(StaticView(table), LocalTransport(shards), 10.0, expert_dtypes=asked)
        with pytest.raises(ConfigError, match=message.format(said)):
            pool.load(load)
    assert {shard.version for shard in shards.values()} == {-1}
    assert (
        ExpertPool(StaticView(table), LocalTransport(shards), 10.0, expert_dtypes=("int8", "float32")).load(load) == 0
    )


def test_experts_that_are_frozen_have_the_form_of_those_that_serve():
    frozen = shard_of("a", range(NUM), "int8", OptimConfig(freeze=("experts",)))
    assert torch.equal(
        answers(frozen, LAYER, 0, range(NUM)), answers(shard_of("b", range(NUM), "int8"), LAYER, 0, range(NUM))
    )


@pytest.mark.parametrize("name", [None, *ODD])
@pytest.mark.parametrize(
    "optim", [None, *(OptimConfig(**each) for each in ({}, {"matrices": "adamw"}, {"freeze": ("experts",)}, LORA))]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_account_of_a_replicas_memory_is_what_a_shard_has(name, optim, dtype, monkeypatch):
    """And the shard refuses, before it reads, what would not fit by it."""
    if optim is not None and optim.lora.rank and name is not None:
        return
    model = MODEL.model_copy(update={"dtype": dtype})
    shard = ExpertShard(ShardSpec("a", model, all_experts(model), optim, backend="torch", expert_dtype=name))
    found, num = replica_bytes(model, optim, name), NUM * len(model.moe_layers)
    for free in (num * found.most - 1, num * found.most):
        monkeypatch.setattr("trinity.experts.loading.free_and_total", lambda device, free=free: (free, free))
        if free < num * found.most:
            with pytest.raises(ConfigError, match=f"{num} experts take .* is free on the node"):
                shard.load(Load(seed=5, training=optim is not None))
    assert shard.load(Load(seed=5, training=optim is not None)) == 0
    assert sum(tensor.nbytes for tensor in shard.store.current.tensors.values()) == num * found.total
    assert (found.step > 0) == (optim is not None and optim.trains_experts)
    values, training = experts_bytes(model, optim, (name,) if name else ())
    assert values + training == num * found.most
    assert (f"{name} {found.form:,} bytes" in found.described(1, name)) == (found.form > 0)
