"""Dispatch equals dense: whatever the number of shards and replicas, and whatever is lost on the way."""

import gc
import random
import weakref

import pytest
import torch

from actors.chaos.faulty_transport import FaultyTransport
from trinity.config import OptimConfig, preset
from trinity.dispatch.transport import LocalTransport
from trinity.dispatch.view import StaticView
from trinity.errors import InputGone, StepConflict, WrongEpoch
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.models.rules.init import init_expert
from trinity.placement.table import PlacementTable
from trinity.pool.local import local_pool
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Abort, Commit, Load, Prepare, Stage
from trinity.utils import trying

MODEL = preset("tiny").model_copy(
    update=dict(hidden_size=16, moe_intermediate_size=8, num_experts=8, num_experts_per_tok=3)
)
LAYER = MODEL.moe_layers[0]


def pool_of(num_shards, **options):
    return local_pool(MODEL, Load(seed=5), num_shards=num_shards, optim=OptimConfig(), backend="torch", **options)


def batch(num_tokens=13, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, MODEL.hidden_size, generator=rng, requires_grad=True)
    scores = torch.rand(num_tokens, MODEL.num_experts, generator=rng)
    ids = scores.topk(MODEL.num_experts_per_tok).indices
    weights = torch.rand(num_tokens, MODEL.num_experts_per_tok, generator=rng, requires_grad=True)
    return x, ids, weights


def dense(x, ids, weights):
    """The formula, expert by expert, differentiable in the expert matrices too."""
    experts = [
        [m.requires_grad_() for m in init_expert(MODEL, LAYER, e, 5, torch.float32)] for e in range(MODEL.num_experts)
    ]
    rows = []
    for t in range(len(x)):
        parts = [
            weights[t, k] * ((torch.nn.functional.silu(g @ x[t]) * (u @ x[t])) @ d.mT)
            for k, (g, u, d) in enumerate(experts[e] for e in ids[t].tolist())
        ]
        rows.append(sum(parts))
    return torch.stack(rows), experts


def gradients_of(pool):
    """(expert, projection) -> gradient, from whichever shard holds it."""
    found = {}
    for shard in pool.transport.shards.values():
        for e in shard.spec.experts[LAYER]:
            at = shard.experts[LAYER].index(e)
            gate, up, down = shard.gathered.rows(LAYER, at, shard.versions.trained[LAYER]).chunk(3)
            found[e] = (gate, up, down.mT)
    return found


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
def test_remote_layer_equals_dense_forward_and_backward(num_shards):
    x, ids, weights = batch()
    want, experts = dense(x, ids, weights)
    dy = torch.randn_like(want)
    want_dx, want_dw = torch.autograd.grad(want, [x, weights], dy, retain_graph=True)
    want_experts = torch.autograd.grad(want, [m for e in experts for m in e], dy)

    pool = pool_of(num_shards)
    dispatcher = pool.dispatcher()
    got = dispatcher(LAYER, x, ids, weights)
    got_dx, got_dw = torch.autograd.grad(got, [x, weights], dy)

    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got_dx, want_dx, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got_dw, want_dw, atol=1e-6, rtol=1e-5)
    for e, gradients in gradients_of(pool).items():
        for got_m, want_m in zip(gradients, want_experts[3 * e : 3 * e + 3], strict=True):
            torch.testing.assert_close(got_m, want_m, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(dispatcher(LAYER, x, ids, weights), want, atol=1e-6, rtol=1e-5)


def test_replicas_share_the_rows_and_the_answer_is_the_same():
    x, ids, weights = batch(40)
    x, weights = x.detach(), weights.detach()
    want = pool_of(1).dispatcher()(LAYER, x, ids, weights)
    table = PlacementTable.spread(MODEL.moe_layers, MODEL.num_experts, ["a", "b"])
    for e in range(MODEL.num_experts):
        for shard in ("a", "b"):
            if table.shards.index(shard) not in table.holders((LAYER, e)):
                table = table.with_replica((LAYER, e), shard)
    shards = {s: ExpertShard(ShardSpec(s, MODEL, table.experts_of(s), backend="torch")) for s in table.shards}
    pool = ExpertPool(StaticView(table), LocalTransport(shards), timeout_s=10)
    pool.load(Load(seed=5))
    torch.testing.assert_close(pool.dispatcher()(LAYER, x, ids, weights), want, atol=1e-6, rtol=1e-5)
    rows = [sum(status.rows[LAYER].values()) for status in pool.status()]
    assert sum(rows) == ids.numel()
    assert min(rows) > ids.numel() // 3


def train_once(pool, transport=None):
    """One step of forward, backward and commit; -> all weights, by expert."""
    if transport is not None:
        pool.transport = transport
    dispatcher = pool.dispatcher()
    dispatcher.use(0)
    for seed in range(3):
        x, ids, weights = batch(seed=seed)
        for layer in MODEL.moe_layers:
            dispatcher(layer, x, ids, weights).square().sum().backward()
    pool.prepare(1, dispatcher.num_sent_ops)
    assert pool.stage(Stage(1, {"muon": 1e-2, "adamw": 1e-3}, 0.5))()
    assert pool.commit(1) == 1
    return pool


def weights_of(shards):
    return {
        (name, layer): [m.detach().clone() for m in w]
        for name, shard in shards.items()
        for layer, w in shard.versions.present.items()
    }


@pytest.mark.parametrize("seed", range(5))
def test_lost_requests_and_replies_change_nothing(seed, monkeypatch):
    monkeypatch.setattr(trying, "FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr(trying, "LAST_PAUSE_S", 0.01)
    clean, faulty = pool_of(2), pool_of(2)
    shards = faulty.transport.shards
    train_once(clean)
    transport = FaultyTransport(LocalTransport(shards), random.Random(seed), lose_request=0.3, lose_reply=0.3)
    train_once(faulty, transport)
    assert transport.lost > 5
    want = weights_of(clean.transport.shards)
    for key, matrices in weights_of(shards).items():
        assert all(torch.equal(a, b) for a, b in zip(matrices, want[key], strict=True)), key


def test_evicted_activations_are_recomputed_to_the_same_bits():
    kept, evicted = pool_of(2), pool_of(2)
    for shard in evicted.transport.shards.values():
        shard.activations.max_bytes = 0
    outs = []
    for pool in (kept, evicted):
        dispatcher = pool.dispatcher()
        x, ids, weights = batch()
        y = sum(dispatcher(layer, x, ids, weights) for layer in MODEL.moe_layers)
        outs.append(torch.autograd.grad(y.square().sum(), [x, weights]))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert sum(s.cache_misses for s in evicted.transport.shards.values()) > 0
    for e, gradients in gradients_of(evicted).items():
        assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_of(kept)[e], strict=True))


@pytest.mark.parametrize("version", [0, 1], ids=["computed", "refused"])
def test_what_a_caller_holds_goes_with_it(version):
    """Its transport's sockets and shared memory, too: neither autograd's graph nor an error keeps them for the collector."""
    dispatcher, (x, ids, weights) = pool_of(2).dispatcher(), batch()
    dispatcher.use(version, attempt=1)
    dispatcher(LAYER, x, ids, weights).sum().backward()
    assert (dispatcher.failure is None) == (version == 0)
    seen = weakref.ref(dispatcher)
    gc.disable()
    try:
        del dispatcher
        assert seen() is None
    finally:
        gc.enable()


def test_a_step_follows_its_predecessor_or_is_refused():
    pool = train_once(pool_of(2))
    shard = pool.transport.shards["shard-0"]
    assert shard.commit(Commit(1)) == 1, "a repeated commit is harmless"
    with pytest.raises(StepConflict, match="step 3 does not follow"):
        shard.prepare(Prepare(3))
    x, ids, weights = batch()
    with pytest.raises(StepConflict, match="a step on 0 is void"):
        pool.dispatcher(version=0)(LAYER, x, ids, weights)
    with pytest.raises(StepConflict, match="holds version 1, the caller wants 2"):
        pool.dispatcher(version=2)(LAYER, x, ids, weights)


def test_a_step_with_missing_ops_is_not_prepared_and_an_aborted_one_leaves_no_trace():
    pool = pool_of(2)
    dispatcher = pool.dispatcher()
    x, ids, weights = batch()
    dispatcher(LAYER, x, ids, weights).sum().backward()
    num_sent_ops = dispatcher.num_sent_ops.copy()
    num_sent_ops["shard-1"] += 1
    with pytest.raises(StepConflict, match="shard-1 applied 1 backward ops of 2 sent"):
        pool.prepare(1, num_sent_ops)
    assert pool.abort(1) == 0
    assert pool.abort(1) == 0
    assert all(not s.gathered.num_ops and not len(s.activations) for s in pool.transport.shards.values())


def test_strangers_are_refused_by_name():
    pool = pool_of(2)
    pool.transport.shards["shard-0"], pool.transport.shards["shard-1"] = (
        pool.transport.shards["shard-1"],
        pool.transport.shards["shard-0"],
    )
    x, ids, weights = batch()
    with pytest.raises(WrongEpoch, match=r"does not hold expert \(1, \d\) of placement epoch 1"):
        pool.dispatcher()(LAYER, x, ids, weights)


def test_backward_without_its_forward_asks_for_the_rows():
    shard = pool_of(1).transport.shards["shard-0"]
    from trinity.rpc.messages import Backward

    with pytest.raises(InputGone, match="send the rows again"):
        shard.backward(Backward("nobody:0", LAYER, 1, 0, 4e9, torch.zeros(1, MODEL.hidden_size)))
    assert shard.abort(Abort(1)) == 0
