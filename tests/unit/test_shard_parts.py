"""The parts of an expert shard, each alone: the activation cache, the gradient accumulator, what is published, row counts."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from trinity.bench.random_weights import write as write_random
from trinity.checkpoint.tensor_file import TensorFile
from trinity.config import OptimConfig, preset
from trinity.errors import ConfigError, InvalidRequest, StepConflict, Unavailable, VersionGone, WrongEpoch
from trinity.experts.activation_cache import ActivationCache, Activations
from trinity.experts.grad_accumulator import FUTURE_US, GradAccumulator
from trinity.experts.published import PublishedVersions
from trinity.experts.row_counts import RowCounts
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.experts.stacked import empty_stacks, empty_version, kinds_of, restacked, stack_names, with_notes
from trinity.rpc.messages import (
    GRADIENT,
    WEIGHT,
    Abort,
    BytesRead,
    Fetch,
    Forward,
    Install,
    Load,
    Prepare,
    Progress,
    Recover,
    Rows,
    Stage,
    Status,
)  # fmt: skip
from trinity.state.versioned_store import Store
from trinity.utils.lines import named

MODEL = preset("tiny").model_copy(
    update=dict(hidden_size=16, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, num_hidden_layers=3)
)
LAYER = MODEL.moe_layers[0]
FOREVER = 4e9


# -- activations


def op_of(num_bytes):
    return Activations(torch.zeros(1, 2), torch.ones(1, 1), torch.zeros(1, 2), num_bytes)


def test_the_cache_lets_go_of_the_oldest_beyond_its_bytes():
    cache = ActivationCache(100)
    for name in ("a", "b", "c"):
        cache.put(name, op_of(40))
    assert [cache.get(name) is not None for name in ("a", "b", "c")] == [False, True, True]
    assert (len(cache), cache.num_bytes) == (2, 80)
    cache.put("d", op_of(100))
    assert (len(cache), cache.num_bytes) == (1, 100)
    cache.clear()
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_the_newest_activations_stay_however_large():
    """Else a backward whose rows were sent again would never find them."""
    cache = ActivationCache(0)
    for name in ("a", "b"):
        assert cache.put(name, op_of(7)) is cache.get(name)
    assert (len(cache), cache.num_bytes, cache.get("a")) == (1, 7, None)


def test_after_its_backward_an_op_keeps_no_graph():
    x_RD = torch.ones(3, 2, requires_grad=True)
    op = Activations(x_RD, torch.ones(3, 1), x_RD * 2, 1)
    answer = (torch.zeros(3, 2), torch.zeros(3, 1))
    op.keep_only(answer)
    assert op.answer is answer
    assert op.y_RD.grad_fn is None


# -- gradients


def stacks(value):
    return [torch.full((2, 8, 16), float(value)) for _ in range(3)]


def accumulated(attempt=5):
    gathered = GradAccumulator("s", attempt, True)
    gathered.add(f"{attempt:x}.0:1", stack_names(LAYER), stacks(1))
    return gathered


def test_a_newer_attempt_finds_an_empty_accumulator_and_an_older_one_is_refused():
    gathered = accumulated(5)
    assert gathered.of(5) is gathered
    newer = gathered.of(6)
    assert (newer.attempt, newer.num_ops, newer.sums()) == (6, 0, {})
    assert gathered.num_ops == 1, "who shares the old one's gradients goes on with what it has"
    with pytest.raises(StepConflict, match="shard s: attempt 5 was given up for 6"):
        newer.of(5)
    with pytest.raises(StepConflict, match="is of the future"):
        gathered.of(time.time_ns() // 1000 + 2 * FUTURE_US)
    renewed = gathered.renewed()
    assert (renewed.attempt, renewed.num_ops) == (5, 0)


def test_gradients_are_taken_once_and_only_of_the_attempt_that_was_prepared():
    gathered, weights = accumulated(5), {LAYER: dict(zip(stack_names(LAYER), stacks(0), strict=True))}
    with pytest.raises(StepConflict, match="attempt 5 is not prepared"):
        gathered.take(5, weights)
    gathered.close()
    gathered.close()
    with pytest.raises(StepConflict, match="comes after the step was prepared"):
        gathered.add("5.0:2", stack_names(LAYER), stacks(1))
    with pytest.raises(StepConflict, match="attempt 4 is not prepared; 5 is gathering"):
        gathered.take(4, weights)
    assert all(torch.equal(sums, torch.ones(2, 8, 16)) for sums in gathered.take(5, weights).values())
    with pytest.raises(StepConflict):
        gathered.take(5, weights)


def test_the_sum_over_callers_does_not_depend_on_who_was_faster():
    orders = [("0", "1", "2"), ("2", "0", "1"), ("1", "2", "0")]
    parts = {caller: [1e8 * torch.randn(2, 8, 16) for _ in range(3)] for caller in orders[0]}
    found = []
    for order in orders:
        gathered = GradAccumulator("s", 0, True)
        for caller in order:
            gathered.add(f"{caller}:1", stack_names(LAYER), [part.clone() for part in parts[caller]])
        found.append(gathered.sums())
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in stack_names(LAYER))


# -- versions


def versions_of(*numbers):
    """Versions with experts 1 and 3 in every layer, and the store that owns their memory."""
    store, empty, found = Store(), empty_stacks(MODEL, torch.float32, "cpu", False), {}
    for number in numbers:
        found[number] = empty_version(empty, MODEL, number, 0)
        for layer in MODEL.moe_layers:
            rows = [torch.full((24, 16), float(number)) for _ in range(2)]
            found[number] = restacked(store, found[number], MODEL, layer, (), (1, 3), {WEIGHT: rows})
    return found, store


def test_what_is_published_can_be_found_and_nothing_else():
    published, (versions, _) = PublishedVersions("s", MODEL, None), versions_of(2, 3, 4)
    with pytest.raises(Unavailable, match="shard s has no weights yet"):
        published.find(3, LAYER)
    published.publish(versions, 3)
    layer = published.find(3, LAYER)
    assert layer.experts == (1, 3)
    assert layer.position_X.tolist() == [-2, 0, -2, 1, -1]
    assert float(layer.weights.gate_EFD[0, 0, 0]) == 3
    with pytest.raises(StepConflict, match="holds version 3, the caller wants 4"):
        published.find(4, LAYER)
    with pytest.raises(VersionGone, match=r"keeps versions \[2, 3\], the caller wants 1"):
        published.find(1, LAYER)
    with pytest.raises(WrongEpoch, match="holds nothing of layer 99"):
        published.find(3, 99)
    published.publish(versions, 4)
    assert published.find(3, LAYER) is layer, "a version that is the same is not made ready again"
    assert float(published.find(4, LAYER).weights.gate_EFD[0, 0, 0]) == 4


def test_callers_in_cpp_find_a_step_by_its_number_and_by_its_name():
    published, (versions, _), found = PublishedVersions("s", MODEL, None), versions_of(2, 3, 4), []
    published.native = SimpleNamespace(publish=found.append)
    published.publish({n: with_notes(version, line=7) for n, version in versions.items()}, 3)
    assert set(found[-1]) == {2, 3, named(7, 2), named(7, 3)}


def test_a_version_is_withdrawn_when_its_last_reader_has_left():
    published, (versions, _) = PublishedVersions("s", MODEL, None), versions_of(2, 3)
    published.publish(versions, 3)
    first, second = published.lent(2, LAYER), published.lent(2, LAYER)
    first.__enter__()
    second.__enter__()
    leaving = threading.Thread(target=published.withdraw, args=([2],))
    leaving.start()
    for reader in (first, second):
        leaving.join(0.05)
        assert leaving.is_alive()
        with pytest.raises(VersionGone):
            published.find(2, LAYER)
        assert published.find(3, LAYER).experts == (1, 3), "others go on"
        reader.__exit__(None, None, None)
    leaving.join(10)
    assert not leaving.is_alive()


def test_rows_of_a_kind_that_does_not_come_are_zeros():
    """An expert that joins an older version, from which nobody steps, has no optimizer state there."""
    versions, store = versions_of(1)
    tensors = dict(versions[1].tensors)
    for name in stack_names(LAYER):
        tensors[f"{name}::momentum"] = store.empty_like(torch.empty(2, 8, 16)).fill_(5.0)
    store.put(replace(versions[1], tensors=tensors))
    store.commit(1)
    stale = [store.empty_like(torch.empty(3, 8, 16)).fill_(7.0) for _ in range(6)]
    store.discard_staged()  # they are free to be written again
    found = restacked(store, store.get(1), MODEL, LAYER, (0, 1), (1, 3, 2), {WEIGHT: [torch.ones(24, 16)]})
    momenta = [found.tensors[f"{name}::momentum"] for name in stack_names(LAYER)]
    assert {tensor.data_ptr() for tensor in stale} <= {tensor.data_ptr() for tensor in found.tensors.values()}
    assert all((momentum[:2] == 5).all() and (momentum[2] == 0).all() for momentum in momenta)
    assert kinds_of(found) == (WEIGHT, "momentum")


def test_counts_of_rows_are_read_and_reset_at_once():
    counts = RowCounts([0, 1], 4)
    counts.add(0, torch.tensor([1, 3]), torch.tensor([10, 20]))
    counts.add(0, torch.tensor([1, 3]), torch.tensor([1, 0]))
    assert counts.read({0: (3, 1), 1: (2,)}, reset=False) == {0: {3: 20, 1: 11}, 1: {2: 0}}
    counts.forget(0, [3])
    assert counts.read({0: (1, 3)}, reset=True) == {0: {1: 11, 3: 0}}
    assert counts.read({0: (1, 3)}, reset=True) == {0: {1: 0, 3: 0}}


# -- put together


def trained_shard(**options):
    held = dict.fromkeys(MODEL.moe_layers, (0, 1))
    shard = ExpertShard(ShardSpec("s", MODEL, held, OptimConfig(), backend="reference", **options))
    shard.load(Load(seed=2))
    return shard


def forward(op_id, rows=None):
    rows = rows or Rows(torch.ones(3, 16), torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5))
    return Forward(op_id, LAYER, 1, 0, FOREVER, rows, keep=True)


def test_a_newer_attempt_makes_void_what_the_older_one_left_on_a_shard():
    shard = trained_shard()
    shard.infer(forward("5.0:1"))
    shard.gathered.add("5.0:1", stack_names(LAYER), stacks(1))
    shard.prepare(Prepare(1, 5))
    assert shard.stage(Stage(1, {"muon": 0.1, "adamw": 0.1}, 1.0, 5))
    assert shard.store.staged is not None
    shard.infer(forward("6.0:1"))
    assert (shard.gathered.attempt, shard.gathered.num_ops, len(shard.activations)) == (6, 0, 1)
    assert shard.store.staged is None
    for straggler in (lambda: shard.infer(forward("5.0:2")), lambda: shard.prepare(Prepare(1, 5))):
        with pytest.raises(StepConflict, match="attempt 5 was given up for 6"):
            straggler()
    assert shard.abort(Abort(1, 5)) == 0, "of an attempt that is void already"
    assert len(shard.activations) == 1
    shard.abort(Abort(1, 6))
    assert len(shard.activations) == 0


def test_a_caller_of_before_the_run_went_back_gets_nothing_of_the_same_step():
    """Nor does it move anything: it had a staged step committed that nobody had decided on."""
    shard = trained_shard()
    shard.load(Load(seed=2, line=3))
    shard.infer(forward("5.0:1"))
    shard.gathered.add("5.0:1", stack_names(LAYER), stacks(1))
    shard.prepare(Prepare(1, 5))
    assert shard.stage(Stage(1, {"muon": 0.1, "adamw": 0.1}, 1.0, 5))
    asked = replace(forward("of an engine"), keep=False)
    for step in (0, 1):
        with pytest.raises(VersionGone, match=f"the run has gone back: shard s has none of what version {step} was"):
            shard.infer(replace(asked, version=named(2, step)))
    with pytest.raises(StepConflict, match="is not at the line yet that the caller's version 0 is of"):
        shard.infer(replace(asked, version=named(4, 0)))
    assert (shard.version, shard.store.staged is not None) == (0, True)
    assert torch.equal(shard.infer(replace(asked, version=named(3, 0))), shard.infer(asked))
    shard.infer(replace(asked, version=named(3, 1)))
    assert shard.version == 1, "who names the staged one knows that it was decided"
    with pytest.raises(StepConflict, match="the copies are of 1 of another line"):
        shard.install(Install(LAYER, (3,), 1, {WEIGHT: (torch.ones(24, 16),)}, line=4))
    assert [shard.recover(Recover(1, 5, line)) for line in (3, 4)] == [1, -1]
    shard.install(Install(LAYER, (), 1, {}, line=4))
    assert (shard.version, shard.versions.line) == (1, 4)


def test_what_was_gathered_is_void_when_experts_come_or_go():
    """Positions in the stacks are others; the step is tried again."""
    shard = trained_shard()
    shard.infer(forward("5.0:1"))
    shard.gathered.add("5.0:1", stack_names(LAYER), stacks(1))
    kinds = shard.weights.kinds(0)
    with pytest.raises(InvalidRequest, match="this shard needs"):
        shard.install(Install(LAYER, (3,), 0, {WEIGHT: (torch.ones(24, 16),)}))
    shard.install(Install(LAYER, (3,), 0, {kind: (torch.ones(24, 16),) for kind in kinds}))
    assert shard.experts[LAYER] == (0, 1, 3)
    assert (shard.gathered.attempt, shard.gathered.num_ops, len(shard.activations)) == (5, 0, 0)
    gradient_ND = shard.fetch(Fetch(LAYER, 3, 0, FOREVER, GRADIENT))
    assert torch.equal(gradient_ND, torch.zeros(24, 16))
    assert torch.equal(shard.fetch(Fetch(LAYER, 3, 0, FOREVER)), torch.ones(24, 16))


def test_experts_that_do_not_fit_are_refused_before_one_is_read(monkeypatch):
    monkeypatch.setattr("trinity.experts.loading.free_and_total", lambda device: (2000, 2000))
    shard = ExpertShard(ShardSpec("s", MODEL, {LAYER: (0, 1)}, None, backend="reference"))
    said = (
        r"2 experts take 3,072 bytes of memory \(weights 3,072 bytes\), 2,000 bytes is free on the node of this shard"
    )
    with pytest.raises(ConfigError, match=said):
        shard.load(Load(seed=0))
    assert shard.version == -1
    monkeypatch.setattr("trinity.experts.loading.free_and_total", lambda device: (3072, 3072))
    assert shard.load(Load(seed=0)) == 0


def test_how_far_a_load_has_come_is_told_while_it_runs(tmp_path, monkeypatch):
    write_random(model := preset("tiny"), tmp_path, seed=0)
    spec = ShardSpec("s", model, {model.moe_layers[0]: (0, 1)}, None, backend="reference")
    shard, seen = ExpertShard(spec), []
    assert shard.progress(Progress()) == BytesRead(0, 0)
    read = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda *args: (read(*args), seen.append(shard.progress(Progress()))))
    shard.load(Load(str(tmp_path), training=False))
    assert {each.total for each in seen} == {shard.status(Status()).weight_bytes}
    assert len({each.done for each in seen}) > 0
    assert shard.progress(Progress()) == BytesRead(*[seen[0].total] * 2)


def test_whoever_lost_its_weights_has_lost_its_gradients():
    """Weights may come again, so who wants those waits; a step whose gradients are gone is void at once."""
    shard = ExpertShard(ShardSpec("s", MODEL, {LAYER: (0, 1)}, OptimConfig(), backend="reference"))
    with pytest.raises(Unavailable, match="has no weights yet"):
        shard.fetch(Fetch(LAYER, 0, 4, FOREVER, WEIGHT))
    with pytest.raises(StepConflict, match="shard s has lost its weights, and what step 5 gathered"):
        shard.fetch(Fetch(LAYER, 0, 4, FOREVER, GRADIENT))
