"""A backbone that is kept in another format: the same bits on every path and in any company, read, refused by name."""

import itertools
from functools import partial

import pytest
import torch

from tests.unit import test_engine_llm
from tests.unit.checkpoint_files import plain as plain_folder
from tests.unit.checkpoint_files import write
from tests.unit.quantised_files import edited, write_quantised
from tests.unit.test_engine_llm import PARAMS, SETTINGS
from tests.unit.test_native_step import FAMILIES, model_of
from trinity import native
from trinity.checkpoint import expert_key, open_checkpoint
from trinity.config import preset
from trinity.dispatch.transport import LocalTransport
from trinity.engine.engine import Engine
from trinity.engine.weights import FixedWeights, fingerprint
from trinity.errors import CheckpointError, ConfigError
from trinity.experts.migration import migrate_in
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.llm import LLM
from trinity.models.common.family import Nobody
from trinity.models.common.keys import PROJECTIONS
from trinity.models.registry import build, weight_bytes
from trinity.ops import extension, rounded, stored
from trinity.rpc.messages import Copy, Load

folder = test_engine_llm.folder


EVEN = dict(hidden_size=144, intermediate_size=160, moe_intermediate_size=32, head_dim=16)  # for nvfp4


def rounded_model(name, dtype, weight_dtype):
    plain = model_of(name, dtype, **(EVEN if weight_dtype in ("fp8", "nvfp4") else {}))
    model = build(plain.config, Nobody()).eval()
    model.round_to(weight_dtype)
    model.load(plain.tensors())
    return model, plain


def meant(w, name):
    return stored.FORMATS[name].read(*stored.parts_of(w))


def without(monkeypatch):
    for module in (native, extension):
        monkeypatch.setattr(module, "lib", None)


@torch.inference_mode()
def answers(model, num):
    """All that a model computes of some rows beside attention and experts."""
    h_TD = torch.randn(40, model.config.hidden_size, generator=torch.Generator().manual_seed(0))[:num]
    h_TD, found = h_TD.to(model.model.norm.weight.dtype), []
    table = model.model.table(torch.arange(num), h_TD.dtype)
    for block in model.blocks():
        sent = block.enter(h_TD, table, lambda layer, q, k, v: q + k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))
        assert native.lib is None or block._native_pre._is_usable, "the extension takes it"
        found += [sent.residual_TD, sent.x_TD, block.local(sent.x_TD) if block.local is not None else sent.x_TD]
    return [*found, model.logits(h_TD)]


@pytest.mark.parametrize(
    ("name", "dtype", "weight_dtype"),
    [
        *itertools.product(FAMILIES, ("float32", "bfloat16"), ("int8",)),
        *(("tiny", "float32", form) for form in ("bfloat16", "fp8", "nvfp4")),
        ("tiny", "bfloat16", "fp8"),
    ],
)
def test_every_path_and_any_company_give_the_same_bits(name, dtype, weight_dtype, monkeypatch):
    model, plain = rounded_model(name, dtype, weight_dtype)
    found, one = answers(model, 40), answers(model, 1)
    assert all(torch.equal(a[:1], b) for a, b in zip(found, one, strict=True))
    if weight_dtype != "bfloat16":
        assert sum(p.nbytes for p in model.parameters()) < 0.75 * sum(p.nbytes for p in plain.parameters())
    without(monkeypatch)
    monkeypatch.setattr(rounded, "BAND", 128)  # outputs come in several
    assert all(torch.equal(a, b) for a, b in zip(found, answers(model, 40), strict=True))


def test_products_are_those_of_the_matrices_that_are_kept():
    rng = torch.Generator().manual_seed(0)
    x_TK, w_NK = torch.randn(9, 40, generator=rng), torch.randn(12, 40, generator=rng)
    for name, worst in (("int8", 0.02), ("bfloat16", 0.01)):
        kept = stored.made(w_NK, name)
        y_TN = rounded.side_by_side(x_TK, [kept, kept])[1]
        wrong = (y_TN - x_TK @ meant(kept, name).T).abs().max() / y_TN.abs().max()
        assert 0 < wrong < worst


def test_it_is_read_as_it_is_rounded(folder):
    source = open_checkpoint(folder)
    plain, kept = source.load_model(Nobody(), "cpu"), source.load_model(Nobody(), "cpu", "int8")
    names = set(kept.rounded())
    assert names == {n for n, w in plain.weights().items() if w.ndim == 2 and "embed" not in n and "router" not in n}
    for name, part in kept.rounded().items():
        want = stored.made(plain.weights()[name], "int8")
        assert all(torch.equal(a, b) for a, b in zip(part.kept, want, strict=True))
    sizes = [weight_bytes(source.config, dtype)[0] for dtype in ("auto", "int8")]
    assert sizes[0] == sum(w.nbytes for w in plain.parameters())
    assert sizes[1] == sum(w.nbytes for w in kept.parameters()) + 8 * sum(
        len(w.weight) for w in kept.rounded().values()
    )
    assert len({fingerprint(model) for model in (plain, kept)}) == 2


def poke(key, tensors):
    tensors[key].view(-1)[-1] = 0


@pytest.mark.parametrize(("layout", "name"), [("int8-channel", "int8"), ("fp8-blocks", "fp8"), ("nvfp4", "nvfp4")])
def test_what_a_checkpoint_has_in_that_format_keeps_its_numbers(tmp_path, layout, name):
    """Made anew, they would be others: the greatest of those that share a scale need not be the format's greatest."""
    truth = write_quantised(plain_folder(write(tmp_path)[1]), tmp_path / "q", layout)
    model = open_checkpoint(tmp_path / "q").load_model(Nobody(), "cpu", name)
    key = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(meant(model.rounded()[key].kept, name), truth[key])
    assert not torch.equal(meant(stored.made(truth[key], name), name), truth[key])
    other = "fp8" if name == "int8" else "int8"
    made = open_checkpoint(tmp_path / "q").load_model(Nobody(), "cpu", other).rounded()[key].kept
    assert torch.equal(made.values, stored.made(truth[key], other).values)
    shard = ExpertShard(ShardSpec("a", model.config, {2: (0, 1)}, backend="torch", expert_dtype=name))
    load = Load(str(tmp_path / "q"), training=False)
    shard.load(load)
    migrate_in(shard, Copy(2, (3,), ("",), shard.version, 4e9), LocalTransport({}), load)
    derived = shard.versions.ready[2].derived
    for at, expert in enumerate((0, 1, 3)):
        for parts, projection in zip(derived[1:], PROJECTIONS, strict=True):
            wanted = truth[expert_key(model.config, 2, expert, projection)]
            assert torch.equal(derived.form.read(*(part[at] for part in parts)), wanted)
    edited(tmp_path / "q", partial(poke, f"{key}_scale"))
    with pytest.raises(CheckpointError, match=f"{key}_scale has a scale that is no positive number"):
        open_checkpoint(tmp_path / "q").load_model(Nobody(), "cpu", name)


def test_a_newer_version_is_copied_into_what_is_there():
    model, plain = rounded_model("tiny", "float32", "int8")
    before, places = answers(model, 3), [part.weight.data_ptr() for part in model.rounded().values()]
    other = {name: tensor * 1.5 for name, tensor in plain.tensors().items()}
    model.load(other)
    assert places == [part.weight.data_ptr() for part in model.rounded().values()]
    fresh = build(plain.config, Nobody()).eval()
    fresh.round_to("int8")
    fresh.load(other)
    assert all(torch.equal(a, b) for a, b in zip(answers(model, 3), answers(fresh, 3), strict=True))
    assert not torch.equal(answers(model, 3)[-1], before[-1])


@pytest.mark.parametrize(("weights", "experts"), [("int8", "int8"), ("int8", "bfloat16"), ("auto", "int8")])
def test_an_engine_answers_from_it_whatever_else_it_computes(folder, weights, experts, monkeypatch):
    def engine():
        return LLM(folder, engine=SETTINGS, backend="torch", device="cpu", weight_dtype=weights, expert_dtype=experts)

    prompts = ["def f(", "x + 1", "return x"]
    found = engine().generate(prompts, PARAMS)
    assert engine().generate(prompts[1], PARAMS) == found[1:2]
    without(monkeypatch)
    assert engine().generate(prompts, PARAMS) == found


def test_what_cannot_be_is_refused_by_name(folder):
    with pytest.raises(ConfigError, match=r"engine[.]weight_dtype int8 is computed on CPUs, not on cuda"):
        build(preset("tiny"), Nobody(), device="meta").round_to("int8", "cuda")
    source = open_checkpoint(folder)
    settings = SETTINGS.model_copy(update={"weight_dtype": "int8"})
    plain = FixedWeights(source.load_model(Nobody(), "cpu"), 7)
    with pytest.raises(ConfigError, match="as they are trained; leave it out"):
        Engine(plain, source.config, settings, source.tokenizer)
