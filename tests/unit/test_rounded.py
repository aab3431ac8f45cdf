"""A backbone that is kept in int8 or bfloat16: the same bits on every path and in any company, read, refused by name."""

import itertools

import pytest
import torch

from tests.unit import test_engine_llm
from tests.unit.test_engine_llm import PARAMS, SETTINGS
from tests.unit.test_native_step import FAMILIES, model_of
from trinity import native
from trinity.checkpoint import open_checkpoint
from trinity.checkpoint.forms import FORMS as WRITTEN
from trinity.checkpoint.rewrite import rewrite
from trinity.config import preset
from trinity.engine.engine import Engine
from trinity.engine.weights import FixedWeights, fingerprint
from trinity.errors import ConfigError
from trinity.llm import LLM
from trinity.models.common.family import Nobody
from trinity.models.registry import build, weight_bytes
from trinity.ops import extension, rounded

folder = test_engine_llm.folder


def rounded_model(name, dtype, weight_dtype):
    plain = model_of(name, dtype)
    model = build(plain.config, Nobody()).eval()
    model.round_to(weight_dtype)
    model.load(plain.tensors())
    return model, plain


def meant(w):
    return w.values.float() if w.scale is None else w.values.float() * w.scale[:, None]


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
    [*itertools.product(FAMILIES, ("float32", "bfloat16"), ("int8",)), ("tiny", "float32", "bfloat16")],
)
def test_every_path_and_any_company_give_the_same_bits(name, dtype, weight_dtype, monkeypatch):
    model, plain = rounded_model(name, dtype, weight_dtype)
    found, one = answers(model, 40), answers(model, 1)
    assert all(torch.equal(a[:1], b) for a, b in zip(found, one, strict=True))
    if weight_dtype == "int8":
        assert sum(p.nbytes for p in model.parameters()) < 0.75 * sum(p.nbytes for p in plain.parameters())
    without(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(found, answers(model, 40), strict=True))


def test_products_are_those_of_the_matrices_that_are_kept():
    rng = torch.Generator().manual_seed(0)
    x_TK, w_NK = torch.randn(9, 40, generator=rng), torch.randn(12, 40, generator=rng)
    for dtype, worst in ((torch.int8, 0.02), (torch.bfloat16, 0.01)):
        kept = rounded.made(w_NK, dtype)
        y_TN = rounded.side_by_side(x_TK, [kept, kept])[1]
        wrong = (y_TN - x_TK @ meant(kept).T).abs().max() / y_TN.abs().max()
        assert 0 < wrong < worst


def test_it_is_read_as_it_is_rounded_and_int8_of_a_checkpoint_stays_as_it_is(folder, tmp_path):
    source = open_checkpoint(folder)
    plain, kept = source.load_model(Nobody(), "cpu"), source.load_model(Nobody(), "cpu", "int8")
    names = set(kept.rounded())
    assert names == {n for n, w in plain.weights().items() if w.ndim == 2 and "embed" not in n and "router" not in n}
    for name, part in kept.rounded().items():
        want = rounded.made(plain.weights()[name], torch.int8)
        assert all(torch.equal(a, b) for a, b in zip(part.kept, want, strict=True))
    rewrite(source, tmp_path / "int8", form=WRITTEN["int8"])
    stored = open_checkpoint(tmp_path / "int8")
    again = stored.load_model(Nobody(), "cpu", "int8")
    key = "model.layers.0.self_attn.q_proj.weight"
    q_NK = torch.empty(again.rounded()[key].weight.shape, dtype=torch.int8)
    stored._file(stored.weight_map[key]).read_bytes(key, q_NK.view(torch.uint8))
    assert torch.equal(again.rounded()[key].weight, q_NK)
    sizes = [weight_bytes(source.config, dtype)[0] for dtype in ("auto", "int8")]
    assert sizes[0] == sum(w.nbytes for w in plain.parameters())
    assert sizes[1] == sum(w.nbytes for w in kept.parameters()) + 8 * sum(
        len(w.weight) for w in kept.rounded().values()
    )
    assert len({fingerprint(model) for model in (plain, kept)}) == 2


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
