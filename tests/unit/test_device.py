"""What lies on a device never meets what lies on the host: the life of shards, on a device that is pretended."""

from collections import Counter

import pytest
import torch

from actors.dataplane.server import RequestQueue, _Job
from tests.unit.pretended_device import DEVICE, PretendedDevice, is_pretended
from trinity.config import OptimConfig, preset
from trinity.dispatch.transport import Done, LocalTransport
from trinity.dispatch.view import StaticView
from trinity.experts.migration import migrate_in
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.placement.table import PlacementTable
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Backward, Copy, Fetch, Forward, Load, PruneTo, Recover, Rows, Stage
from trinity.state.versioned_store import Store

MODEL = preset("tiny").model_copy(
    update=dict(hidden_size=16, moe_intermediate_size=8, num_experts=8, num_experts_per_tok=3)
)
LAYER, LAST = MODEL.moe_layers[0], MODEL.moe_layers[-1]
FOREVER = 4e9


@pytest.fixture
def device():
    with PretendedDevice():
        yield DEVICE


def test_a_tensor_of_the_device_and_one_of_the_host_do_not_mix(device):
    there, here = torch.zeros(3, device=device), torch.ones(3)
    for mix in (
        lambda: there + here,
        lambda: here.add_(there),
        lambda: torch.cat([here, there]),
        lambda: here[there.long()],
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises(TypeError, match="convert"):
        there.numpy()
    assert (here.to(device) + there).device == here.to(there).device == there.view(3, 1).unbind()[0].device == device
    assert (there + here.sum()).device == there.copy_(here).device == device
    assert there.tolist() == there.cpu().tolist() == [1.0, 1.0, 1.0]
    assert there.cpu().device == here.device != device
    assert not is_pretended(here)


class Arriving(LocalTransport):
    """Peers as a socket shows them: what they answer lies in the host's memory."""

    def send(self, shard, verb, message):
        value = super().send(shard, verb, message).result()
        return Done(value.cpu() if verb == "fetch" else value)


def replicated_pool(device, folder=None, model=MODEL, backend="reference"):
    """Three shards that train; every expert is on two of them."""
    held = tuple((e % 3, (e + 1) % 3) for e in range(model.num_experts))
    table = PlacementTable(1, ("a", "b", "c"), model.moe_layers, (held,) * len(model.moe_layers))
    shards = {}
    for name in table.shards:
        spec = ShardSpec(name, model, table.experts_of(name), OptimConfig(), backend=backend, device=str(device))
        shards[name] = ExpertShard(spec, Store(None if folder is None else folder / name, str(device)))
        shards[name].peers = Arriving(shards)
    pool = ExpertPool(StaticView(table), LocalTransport(shards), timeout_s=60)
    pool.load(Load(seed=5))
    return pool, shards


def trained_rows(shard, device, step, num_tokens, layers=(LAYER, LAST)):
    """-> what a forward and a backward of each layer answer. Only experts of this shard are asked for."""
    rng, found = torch.Generator().manual_seed(step), []
    for layer in layers:
        held = torch.tensor(shard.experts[layer])
        ids_RK = held[torch.randint(len(held), (num_tokens, 2), generator=rng)].to(device)
        x_RD, dy_RD = torch.randn(2, num_tokens, shard.spec.model.hidden_size, generator=rng).to(device)
        weights_RK, names = torch.rand(num_tokens, 2, generator=rng).to(device), (layer, 1, step - 1, FOREVER)
        rows, op = Rows(x_RD, ids_RK, weights_RK), f"test:{layer}"
        found += [shard.infer(Forward("", *names, rows)), shard.infer(Forward(op, *names, rows, keep=True))]
        found += shard.backward(Backward(op, *names, dy_RD))
    return found


def life(device, folder=None, model=MODEL, backend="reference"):
    """Two steps of training over replicas, each with a move and a pruning after it; -> all that came out, as host memory, by
    kind: answers, norms, experts."""
    pool, shards = replicated_pool(device, folder, model, backend)
    answers, norms, experts = [], [], []
    for step in (1, 2):
        busy = ["a", "c"] if step == 2 else list(shards)  # then only replicas have a gradient of the experts of b
        for name in busy:
            answers += trained_rows(shards[name], device, step, num_tokens=20)
        reports = pool.prepare(step, Counter(dict.fromkeys(busy, 2)))
        norms.append(torch.tensor([report.sq_norm for report in reports]))
        assert pool.stage(Stage(step, {"muon": 0.02, "adamw": 0.01}, 1.0))()
        pool.commit(step)
        call = Copy(LAYER, (0,), ("a",), step, FOREVER, num_updates=step)
        assert migrate_in(shards["c"], call, shards["c"].peers, None) > 0
        shards["c"].prune_to(PruneTo(pool.table.experts_of("c")))
    for shard in shards.values():
        held = [(expert, kind) for expert in shard.experts[LAYER] for kind in shard.weights.kinds(2)]
        experts += [shard.fetch(Fetch(LAYER, expert, 2, FOREVER, kind)) for expert, kind in held]
    found = {"answers": answers, "norms": norms, "experts": experts}
    return {kind: [tensor.detach().cpu() for tensor in tensors] for kind, tensors in found.items()}


@pytest.mark.parametrize("in_folder", [False, True])
def test_replicated_experts_train_and_move_on_a_device(tmp_path, in_folder):
    want = life("cpu")
    with PretendedDevice():
        got = life(DEVICE, tmp_path if in_folder else None)
        assert not any(is_pretended(tensor) for tensors in got.values() for tensor in tensors)
    for kind, tensors in want.items():
        assert all(torch.equal(a, b) for a, b in zip(got[kind], tensors, strict=True)), kind


def test_a_store_in_a_folder_is_taken_up_on_the_device(tmp_path):
    """Stacks of no experts, too, which have no memory to take up."""
    with PretendedDevice():
        _, shards = replicated_pool(DEVICE, tmp_path)
        shards["a"].prune_to(PruneTo({LAYER: (0, 2)}))
        again = ExpertShard(shards["a"].spec, Store(tmp_path / "a", str(DEVICE)))
        again.recover(Recover(0, None))
        assert again.experts[LAST] == ()
        assert {tensor.device for tensor in again.store.current.tensors.values()} == {DEVICE}
        answers = [trained_rows(shard, DEVICE, 1, 9, layers=(LAYER,)) for shard in (shards["a"], again)]
        assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_rows_of_the_host_and_of_the_device_are_not_multiplied_as_one():
    """Ray brings the ones, the direct transport the others; both callers are answered."""
    with PretendedDevice():
        _, shards = replicated_pool(DEVICE)
        queue = RequestQueue(shards["a"])
        held = torch.tensor(shards["a"].experts[LAYER])
        calls = []
        for place in ("cpu", DEVICE, "cpu", DEVICE):
            rows = Rows(torch.ones(2, MODEL.hidden_size).to(place), held[:4].view(2, 2), torch.ones(2, 2))
            calls.append(Forward("", LAYER, 1, 0, FOREVER, rows))
        waiting = [_Job(call) for call in calls[:3]]
        queue._waiting += waiting
        last = queue.run(calls[3])
        assert queue.num_merged == 4
        assert all(torch.equal(job.value.cpu(), last.cpu()) for job in waiting)
