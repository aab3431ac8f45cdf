"""Shard actors are found by name, answer as shards in this process do, and come back by themselves."""

import os
import re
import signal
import uuid
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.dataplane import arithmetic
from tests.parity.test_invariance import answers
from tests.ray.nodes import another_node
from tests.waiting import sooner_than, until
from trinity import native
from trinity.cli import main
from trinity.commands import doctor
from trinity.commands.placement import show
from trinity.config import Config, OptimConfig, PlacementConfig, preset
from trinity.errors import ConfigError, DeadlineExceeded, StepConflict, Unavailable
from trinity.models.registry import build, family_of
from trinity.pool.local import local_pool
from trinity.rpc import messages
from trinity.rpc.messages import PROTOCOL, Load

MODEL = preset("tiny").model_copy(update=dict(hidden_size=32, moe_intermediate_size=16, num_experts=6))
LAYER = MODEL.moe_layers[0]


@pytest.fixture(scope="module")
def plain_node(ray_session):
    """-> the id of a second node, whose processes do without the extension."""
    with another_node(ray_session, {"TRINITY_NATIVE": "0"}, expert_shard=1) as node_id:
        yield node_id


@pytest.fixture(scope="module")
def kept_pool(ray_session, plain_node, tmp_path_factory):
    """-> (pool, settings, folder), a shard on either node. Its first test finds it without weights, its last leaves experts
    elsewhere."""
    from actors import pool as pools

    name, each_has = f"p-{uuid.uuid4().hex[:8]}", {"expert_shard": 1}
    settings = PlacementConfig(pool=name, num_shards=2, call_timeout_s=60, resources=each_has, data_host="node")
    folder = tmp_path_factory.mktemp("pool") / "placement"
    yield pools.create(settings, "trinity", MODEL, OptimConfig(), str(folder)), settings, folder
    pools.destroy(settings.pool, "trinity")
    assert not pools.exists(settings.pool, "trinity")


@pytest.fixture
def pool(kept_pool):
    """As somebody else finds it; experts are where they were."""
    from actors import pool as pools

    made, settings, _ = kept_pool
    found = pools.connect(settings, "trinity")
    assert found.table.replicas == made.table.replicas
    return found


def batch(num_tokens=50):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, MODEL.hidden_size, generator=rng, requires_grad=True)
    ids = torch.rand(num_tokens, MODEL.num_experts, generator=rng).topk(2).indices
    return x, ids, torch.rand(num_tokens, 2, generator=rng, requires_grad=True)


def test_a_pool_of_actors_is_a_pool_of_shards(kept_pool, ray_session):
    from actors import pool as pools

    pool, _, folder = kept_pool
    before, pool.timeout_s = pool.timeout_s, 0.5
    dispatcher = pool.dispatcher()
    with pytest.raises(StepConflict, match="has no weights"):
        dispatcher(LAYER, *batch())
    pool.timeout_s = before
    local = local_pool(MODEL, Load(seed=3), num_shards=2, optim=OptimConfig(), backend="torch")
    assert pool.load(Load(seed=3)) == 0
    found = pools.connect(PlacementConfig(pool=pool.name), "trinity")
    assert found.table == pool.table

    answers = []
    for one in (found, local):
        x, ids, weights = batch()
        y = one.dispatcher()(LAYER, x, ids, weights)
        answers.append((y, *torch.autograd.grad(y.square().sum(), [x, weights])))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    assert {(s.shard, s.version, s.cached_ops) for s in found.status()} == {("shard-0", 0, 1), ("shard-1", 0, 1)}
    assert (folder / "epoch-00000001.json").is_file()
    with pytest.raises(StepConflict, match="the caller wants 7"):
        found.dispatcher(version=7)(LAYER, *batch())


def test_a_node_without_the_extension_serves_the_same_bits_and_is_named(
    pool, plain_node, ray_session, monkeypatch, caplog, capsys
):
    """By the plain path. Its log and the caller's say so once; operators see which shard and which node it is."""
    from actors.control.admin import operator

    monkeypatch.setattr(arithmetic, "_told", set())
    version, local = pool.load(Load(seed=3)), local_pool(MODEL, Load(seed=3), backend="torch")
    prompts = [[20 + n, 30, 40 * n] for n in range(1, 5)]
    served, alone = (
        answers(model_with(experts), prompts) for experts in (pool.dispatcher(version), local.dispatcher())
    )
    assert served == alone
    snapshot = operator(PlacementConfig(pool=pool.name), "trinity").snapshot()
    (plain,) = (shard for shard in snapshot.shards if shard.host == plain_node)
    (other,) = (shard for shard in snapshot.shards if shard.host != plain_node)
    assert (plain.kernels, other.computes) == ("python", native.computes())
    show(snapshot)
    assert re.search(
        rf"^  {plain.name} .* float32 +python .* {plain_node[:12]}$", capsys.readouterr().out, re.MULTILINE
    )
    monkeypatch.setattr(doctor, "cluster_of", lambda arguments: nullcontext())
    assert main(["doctor", "--address", "auto"]) == 0
    without = rf"^  \S+ {plain_node[:12]} +python: float32.*the extension is switched off by TRINITY_NATIVE=0$"
    assert re.search(without, capsys.readouterr().out, re.MULTILINE)
    if native.lib is not None:
        _, pid = ray_session.get(pool.shards[plain.name].where.remote())
        assert len([record for record in caplog.records if "takes the plain path" in record.getMessage()]) == 1
        assert log_of(ray_session, pid).count("takes the plain path") == 1


def model_with(experts):
    """A backbone, whose weights depend on nothing else, over those experts."""
    made = build(MODEL, experts)
    family_of(MODEL).init_weights(made, 3)
    return made.eval()


def log_of(ray, pid):
    """What that worker has said, in words."""
    (path,) = Path(ray._private.worker._global_node.get_logs_dir_path()).glob(f"worker-*-{pid}.err")
    return path.read_text()


def test_a_killed_shard_comes_back_with_its_weights_while_its_callers_wait(pool, ray_session):
    pool.load(Load(seed=3))
    dispatcher = pool.dispatcher()
    x, ids, weights = (t.detach() for t in batch())
    want = dispatcher(LAYER, x, ids, weights)
    _, pid = ray_session.get(pool.shards["shard-1"].where.remote())
    os.kill(pid, signal.SIGKILL)
    assert torch.equal(dispatcher(LAYER, x, ids, weights), want)
    assert ray_session.get(pool.shards["shard-1"].where.remote())[1] != pid


def test_nobody_waits_past_the_deadline_for_a_stopped_shard(pool, ray_session):
    pool.load(Load(seed=3))
    _, pid = ray_session.get(pool.shards["shard-0"].where.remote())
    pool.timeout_s = 1.0
    x, ids, weights = (t.detach() for t in batch())
    dispatcher = pool.dispatcher()
    os.kill(pid, signal.SIGSTOP)
    try:
        with sooner_than(30), pytest.raises(DeadlineExceeded, match="shard-0 did not answer"):
            dispatcher(LAYER, x, ids, weights)  # it would not, as long as nobody wakes it
    finally:
        os.kill(pid, signal.SIGCONT)
    pool.timeout_s = 60.0
    pool.dispatcher()(LAYER, x, ids, weights)
    assert pool.versions() == {"shard-0": 0, "shard-1": 0}


def test_a_pool_is_used_as_it_is_or_refused(pool, ray_session, tmp_path):
    from actors import pool as pools
    from serving.launch import provide_pool

    settings = PlacementConfig(pool=pool.name, num_shards=2)
    again = pools.provide(settings, "trinity", MODEL, OptimConfig(), str(tmp_path / "other"))
    assert again.table == pool.table
    assert pool.name in pools.names("trinity")
    wider = MODEL.model_copy(update={"moe_intermediate_size": 32})
    for settings_, model, differs in [
        (settings, wider, "model"),
        (settings.model_copy(update={"num_shards": 3}), MODEL, "num_shards"),
        (settings.model_copy(update={"expert_dtype": ("int8",)}), MODEL, "expert_dtype"),
    ]:
        with pytest.raises(ConfigError, match=f"exists with another {differs}"):
            pools.provide(settings_, "trinity", model, OptimConfig(), str(tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"computes experts as float32, placement\.expert_dtype is fp8"):
        pools.connect(settings.model_copy(update={"expert_dtype": ("fp8",)}), "trinity")
    pool.load(Load(seed=3))
    config = Config.from_tree({"model": MODEL.model_dump(), "placement": {"pool": pool.name}})
    other = tmp_path / "another-checkpoint"
    with pytest.raises(ConfigError, match=r"serve from another --placement\.pool"):
        provide_pool(config, str(other))
    assert pool.versions() == {"shard-0": 0, "shard-1": 0}, "somebody may be training: nothing was loaded"


def test_a_pool_that_cannot_start_says_what_is_missing_and_leaves_nothing(ray_session, tmp_path):
    from actors import pool as pools

    settings = PlacementConfig(
        pool="too-big", num_shards=2, num_cpus_per_shard=1000, ready_timeout_s=2, data_host="node"
    )
    for _ in range(2):
        with pytest.raises(
            Unavailable, match=r"2 of 2 shards, which take .*1000.* each, not ready after 2 s; free in the cluster"
        ):
            pools.create(settings, "trinity", MODEL, None, str(tmp_path))
        assert not pools.exists("too-big", "trinity")


def test_a_process_of_another_release_is_refused_by_name(kept_pool, monkeypatch):
    from actors import names
    from actors import pool as pools

    for module in (messages, names):
        monkeypatch.setattr(module, "PROTOCOL", PROTOCOL + 1)
    with pytest.raises(
        ConfigError, match=f"speaks protocol {PROTOCOL}, this process {PROTOCOL + 1}: run one release of Trinity"
    ):
        pools.connect(kept_pool[1], "trinity")


def test_the_placement_service_finds_its_state_again_and_epochs_only_grow(pool, ray_session):
    from actors.names import find

    service = find(pool.name, "placement", "trinity")
    pool.load(Load(seed=3))
    first = pool.table
    grown = first.with_replica((LAYER, 0), "shard-1")
    for _ in range(2):
        assert ray_session.get(service.publish.remote(grown)) == first.epoch + 1
    with pytest.raises(StepConflict, match=f"epoch {first.epoch + 1} does not follow"):
        ray_session.get(service.publish.remote(first.with_replica((LAYER, 1), "shard-1")))
    ray_session.kill(service, no_restart=False)

    def is_back():
        with suppress(ray_session.exceptions.RayActorError):
            return ray_session.get(service.current.remote()) == grown.renewed()

    until(is_back, every_s=0.1)
    assert replace(pool.service.source(), line=0) == Load(seed=3)  # a load begins a line of its own
