"""Named adapters in one batch with their base: the bits that each row has alone, the numbers of merged weights."""

import dataclasses
import shutil
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from actors.control.adapters import Adapters
from actors.control.files import PoolFiles
from tests.unit.adapter_folders import write_adapter
from tests.unit.test_engine_llm import SETTINGS, folder  # noqa: F401  a fixture
from trinity.checkpoint import backbone_adapter, examined, open_checkpoint
from trinity.config import AdapterRef, AdapterSet, OptimConfig
from trinity.engine.adapters import AdapterStore
from trinity.engine.deltas import joined
from trinity.engine.engine import Engine
from trinity.engine.request import SamplingParams
from trinity.engine.weights import FixedWeights
from trinity.errors import (
    AdapterLost,
    AdapterMissing,
    CheckpointError,
    InvalidRequest,
    ModelNotFound,
    TrinityError,
    Unavailable,
)
from trinity.experts.base import Assignments, LayerWeights
from trinity.experts.reference import ReferenceBackend
from trinity.llm import LLM
from trinity.pool.local import local_pool
from trinity.rpc.messages import Adapt, Commit, Forget, Forward, Load, Prepare, Rows, Stage
from trinity.utils.trying import tried

SCORED = SamplingParams(max_tokens=0, prompt_logprobs=0)
DRAWN = SamplingParams(temperature=0, max_tokens=6, logprobs=2, ignore_eos=True)
PROMPT = [5, 17, 40, 301, 9, 77, 120, 33, 8, 256, 64]


@pytest.fixture(scope="module")
def refs(folder, tmp_path_factory):  # noqa: F811
    """Two adapters of everything, and one of experts alone."""
    base, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, options) in enumerate(
        {"poet": {}, "clerk": {"rank": 2}, "expert": {"roles": ("experts",), "rank": 1}}.items()
    ):
        path = write_adapter(base / name, folder, seed, **options)
        content = examined(str(path), open_checkpoint(folder).config, str(folder)).adapter.content
        found[name] = AdapterRef(name, content, str(path))
    return found


class World:
    """An engine over local shards, that knows adapters."""

    def __init__(self, folder, num_shards=2, **settings):  # noqa: F811
        source = open_checkpoint(folder)
        self.model = source.config
        self.pool = local_pool(self.model, Load(str(folder), training=False), num_shards=num_shards)
        self.shards = self.pool.transport.shards
        weights = FixedWeights(source.load_model(self.pool.dispatcher(source.version), "cpu"), source.version)
        self.store = AdapterStore(partial(backbone_adapter, model=self.model, device="cpu"))
        settings = SETTINGS.model_copy(update={"max_num_seqs": 8, "max_num_waiting": 8} | settings)
        self.engine = Engine(weights, self.model, settings, source.tokenizer, adapters=self.store)

    def run(self, requests, params):
        """What each request is told, all in the same passes; a request is (prompt, AdapterRef or None)."""
        for number, (prompt, ref) in enumerate(requests):
            own = None if ref is None else self.store.get(ref)
            self.engine.add(str(number), prompt, params, adapter=own)
        found = {str(number): [] for number in range(len(requests))}
        while self.engine.has_work:
            for delta in self.engine.step():
                found[delta.request_id].append(delta)
        self.engine.check()
        return [told(joined(deltas)) for deltas in found.values()]


def told(delta):
    """What must be the same bits."""
    scores = None if delta.prompt_logprobs is None else delta.prompt_logprobs.logprob_S.tobytes()
    return delta.token_ids, delta.logprobs, scores, delta.error


@pytest.fixture(scope="module")
def world(folder):  # noqa: F811
    return World(folder)


@pytest.fixture(scope="module")
def mixed(refs):
    prompts = [PROMPT, PROMPT[3:], PROMPT[::-1], PROMPT[:4], PROMPT[2:7]]
    names = [None, "poet", "clerk", "poet", "expert"]
    return [(prompt, refs.get(name)) for prompt, name in zip(prompts, names, strict=True)]


@pytest.mark.parametrize("params", [SCORED, DRAWN], ids=["prompts", "decoding"])
def test_each_row_has_the_bits_that_it_has_alone(world, folder, mixed, params):  # noqa: F811
    plain = World(folder, num_shards=1)
    want = [world.run([request], params)[0] for request in mixed]
    assert world.run(mixed, params) == want
    assert plain.run([mixed[0]], params) == [want[0]], "a server that knows no adapters"
    overlapped = World(folder, num_overlapped_microbatches=3, min_part_tokens=1, max_num_batched_tokens=64)
    assert overlapped.run(mixed, params) == want
    assert len({repr(each) for each in world.run([(PROMPT, ref) for _, ref in mixed[:3]], params)}) == 3


def test_an_adapter_says_what_the_merged_checkpoint_does(world, refs, folder):  # noqa: F811
    scores = []
    for ref in (None, *refs.values()):
        world.engine.add("a", PROMPT, SCORED, adapter=None if ref is None else world.store.get(ref))
        [delta] = world.engine.step()
        scores.append(torch.from_numpy(delta.prompt_logprobs.logprob_S))
        merged = LLM(folder if ref is None else ref.source, engine=SETTINGS, device="cpu")
        [answer] = merged.generate([PROMPT], SCORED)
        want = torch.tensor([each.logprob for each in answer.prompt_logprobs[1:]])
        torch.testing.assert_close(scores[-1], want, atol=1e-4 if ref else 0.0, rtol=0)
    assert all((scores[0] - other).abs().max() > 0.05 for other in scores[1:])


def test_a_shard_that_lost_its_adapters_takes_them_up_again(world, mixed, refs):
    want = world.run(mixed, DRAWN)
    for shard in world.shards.values():
        for ref in refs.values():
            assert shard.forget(Forget(ref.content))
            assert not shard.forget(Forget(ref.content))
    assert world.run(mixed, DRAWN) == want


def test_experts_that_move_have_their_factors_where_they_go(folder, refs):  # noqa: F811
    """The layer's stacks are others then; those of a version before stay as they are."""
    [shard] = World(folder, num_shards=1).shards.values()
    layer, ref = shard.spec.model.moe_layers[0], refs["poet"]
    shard.adapt(Adapt(ref.source, time.monotonic() + 60, ref.content))
    whole, part, turned = (shard.adapters.of([ref.content], layer, held)[0] for held in ((0, 1, 2, 3), (2,), (3, 0)))
    for pairs, held in ((part, [2]), (turned, [3, 0])):
        for mine, all_of in zip(pairs[:3], whole[:3], strict=True):
            assert all(torch.equal(a, b[held]) for a, b in zip(mine, all_of, strict=True))


@pytest.mark.parametrize("lora", [{}, {"rank": 2}], ids=["whole", "adapters"])
def test_an_adapter_is_on_top_of_whatever_version_is_asked(folder, refs, lora):  # noqa: F811
    """Of a run that goes on, and of one that trains an adapter itself."""
    model = open_checkpoint(folder).config
    optim = OptimConfig.model_validate({"adamw_lr": 0.1, "lora": lora} | ({} if lora else {"matrices": "adamw"}))
    pool = local_pool(model, Load(str(folder), training=False), optim=optim)
    [shard], layer, ref = pool.transport.shards.values(), model.moe_layers[0], refs["poet"]
    first, trained = shard.version, shard.versions.trained[layer]
    for sign in (1, -1):  # B is zero until a step has been taken
        step = shard.version + 1
        rng = torch.Generator().manual_seed(step)
        gradients = [sign * torch.randn(stack.shape, generator=rng) for stack in trained.values()]
        shard.gathered.add(f"test:{step}", tuple(trained), gradients)
        shard.prepare(Prepare(step))
        shard.stage(Stage(step, {"muon": 0.1, "adamw": 0.1}, 1.0, keep=(step - 1,)))
        shard.commit(Commit(step))
    x_RD = torch.randn(3, model.hidden_size, generator=rng)
    rows = Rows(
        x_RD, torch.tensor([[0], [2], [2]]), torch.full((3, 1), 0.5), torch.tensor([ref.content, 0, ref.content])
    )
    answers = []
    for version in (first + 1, first + 2):
        dispatcher = pool.dispatcher(version)
        told = (rows.adapter_R, {ref.content: ref.source})
        with torch.no_grad():
            answers.append(dispatcher.begin(layer, x_RD, rows.ids_RK, rows.weights_RK, told).result())
        ready = shard.versions.find(layer, version, time.monotonic() + 60)
        [named] = shard.adapters.of([ref.content], layer, ready.experts)
        assigned = Assignments(torch.arange(3), rows.ids_RK[:, 0], rows.weights_RK[:, 0])
        with torch.no_grad():
            for own_R, adapters in (([1], (ready.adapters,)), ([0, 2], (ready.adapters, named))):
                weights = LayerWeights(*(with_all(stack, i, adapters) for i, stack in enumerate(ready.weights)))
                want = ReferenceBackend()(x_RD, assigned, weights)[own_R]
                torch.testing.assert_close(answers[-1][own_R], want, atol=1e-5, rtol=1e-5)
    assert not torch.equal(*answers)


def with_all(stack_EFD, i, adapters):
    """A stack with these adapters merged in."""
    changes = [each.scale * each[i][1] @ each[i][0] for each in adapters if each is not None]
    return stack_EFD + sum(change.mT if i == 2 else change for change in changes)


def test_a_shard_without_an_adapter_never_answers_with_the_base(world, refs):
    shard = next(iter(world.shards.values()))
    layer = shard.spec.model.moe_layers[0]
    x_RD = torch.randn(2, shard.spec.model.hidden_size)
    ids_RK = torch.tensor([[shard.experts[layer][0]]] * 2)
    rows = Rows(x_RD, ids_RK, torch.ones(2, 1), torch.tensor([0, 12345]))
    call = Forward("a:1", layer, 1, shard.version, time.monotonic() + 60, rows)
    with pytest.raises(AdapterMissing, match="does not have adapter 3039"):
        shard.infer(call)
    with pytest.raises(InvalidRequest, match="for inference"):
        shard.infer(dataclasses.replace(call, keep=True))


def test_files_that_changed_are_no_ones_adapter(folder, refs, tmp_path):  # noqa: F811
    path = tmp_path / "poet"
    shutil.copytree(refs["poet"].source, path)
    ref, world = refs["poet"]._replace(source=str(path)), World(folder)
    assert world.run([(PROMPT, ref)], SCORED)
    weights = path / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.unlink()
    weights.write_bytes(raw)
    with pytest.raises(AdapterLost, match="'poet' cannot be read any more"):
        World(folder).store.get(ref)
    for shard in world.shards.values():
        shard.forget(Forget(ref.content))
    [(*_, error)] = world.run([(PROMPT, ref)], SCORED)
    assert "files of this adapter cannot be read any more" in error
    assert str(path) not in error


def test_numbers_that_overflow_end_the_adapters_requests_alone(folder, tmp_path):  # noqa: F811
    """They say nothing of the weights: no version is quarantined for them."""
    world, path = World(folder), write_adapter(tmp_path / "huge", folder, 1, size=1e20)
    content = examined(str(path), world.model, str(folder)).adapter.content
    [base, huge] = world.run([(PROMPT, None), (PROMPT, AdapterRef("huge", content, str(path)))], DRAWN)
    assert base[-1] is None
    assert "the logits of adapter 'huge' are not finite" in huge[-1]
    assert world.engine.stats().num_quarantined == 0


BAD = {"bad": {"size": float("nan")}, "other": {"r": 9}}


class Control:
    """The placement service's shards, without a service: those of a world."""

    def __init__(self, world, source, state_dir):
        table, load = world.pool.table, Load(str(source))
        files, spec = PoolFiles(state_dir), SimpleNamespace(trains=False)
        files.set_source(load)
        self.state = SimpleNamespace(files=files, spec=spec, table=table)
        self.shards, self.away = world.shards, set()

    def ask(self, shard, verb, message):
        if shard in self.away:
            raise Unavailable(f"{shard} is away")
        return getattr(self.shards[shard], verb)(message)

    def ask_all(self, verb, message):
        found = [tried(partial(self.ask, shard, verb, message), TrinityError) for shard in self.state.table.shards]
        return [each for each in found if isinstance(each, TrinityError)]

    def deadline(self, verb=""):
        return time.monotonic() + 60


def test_a_pool_lists_what_its_shards_have_and_knows_it_after_a_restart(folder, refs, tmp_path):  # noqa: F811
    world = World(folder)
    control, poet, clerk = Control(world, folder, tmp_path), refs["poet"], refs["clerk"]
    pool, held = Adapters(control), lambda: [sorted(shard.adapters._found) for shard in world.shards.values()]
    assert pool.add("poet", poet.source) == AdapterSet(1, (poet,)) == pool.add("poet", poet.source)
    assert held() == [[poet.content]] * 2
    bad, other = (write_adapter(tmp_path / name, folder, 0, **fields) for name, fields in BAD.items())
    for name, source, error, words in (
        ("bad", str(bad), CheckpointError, "numbers that are not finite"),
        ("other", str(other), CheckpointError, "r 9 want"),
        ("poet", clerk.source, InvalidRequest, "another adapter is called 'poet'"),
        ("a:b", clerk.source, InvalidRequest, "is no adapter's name"),
        ("clerk", str(tmp_path / "nowhere"), CheckpointError, "nowhere does not exist"),
        ("clerk", str(folder), CheckpointError, "adapter_config.json is missing"),
    ):
        with pytest.raises(error, match=words):
            pool.add(name, source)
        assert (pool.now.refs, held()) == ((poet,), [[poet.content]] * 2)
    control.away = {"shard-0"}
    assert pool.add("clerk", clerk.source).refs == (poet, clerk), "who is away is told when rows come to it"
    control.away = set()
    again = pool.add("verse", poet.source)
    assert Adapters(control).now == again
    assert pool.remove("poet").refs == (clerk, poet._replace(name="verse"))
    assert held()[1] == sorted((poet.content, clerk.content)), "another name has the same"
    pool.remove("verse")
    assert held() == [[], [clerk.content]]
    with pytest.raises(ModelNotFound, match="no adapter is called 'verse'"):
        pool.remove("verse")
    control.state.files.forget()
    assert Adapters(control).now == AdapterSet(6, ()), (
        "a new pool of that name: what is heard of the old one is old news"
    )


def test_an_adapter_of_other_weights_is_named(folder, refs, tmp_path):  # noqa: F811
    model = open_checkpoint(folder).config
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for file in other.glob("model-backbone*"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    (other / "manifest.json").unlink()
    index = other / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"manifest"', '"was"'))
    with pytest.raises(CheckpointError, match="is an adapter to other weights"):
        examined(refs["poet"].source, model, str(other))
    with pytest.raises(CheckpointError, match="has an adapter of its own merged in"):
        examined(refs["poet"].source, model, refs["clerk"].source)
