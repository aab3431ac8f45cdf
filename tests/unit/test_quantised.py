"""Quantised checkpoints of others: every layout has the numbers of its definition, and what does not fit is refused."""

import json
import re

import pytest
import torch

from tests.unit.checkpoint_files import MODEL, plain, write
from tests.unit.quantised_files import (
    BLOCKS,
    DEEPSEEK,
    LAYOUTS,
    LINEAR,
    MODELOPT,
    change,
    compressed,
    edited,
    write_quantised,
)
from trinity.checkpoint import all_experts, expert_key, open_checkpoint, quantised
from trinity.cli import main
from trinity.errors import CheckpointError
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.models.afmoe.model import Afmoe
from trinity.models.common.keys import PROJECTIONS
from trinity.ops import formats
from trinity.rpc.messages import WEIGHT, Fetch, Load

EXPERT = "model.layers.2.mlp.experts.1.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return plain(write(tmp_path_factory.mktemp("plain"))[1])


def load(path):
    """Read all of a checkpoint's weights, as a server does."""
    checkpoint = open_checkpoint(path)
    backbone = Afmoe(checkpoint.config, lambda *_: None)
    checkpoint.load_backbone(backbone)
    shard = ExpertShard(ShardSpec("a", checkpoint.config, all_experts(checkpoint.config)))
    shard.load(Load(str(path), training=False))
    return backbone.tensors(), shard


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_is_what_the_layout_says(source, tmp_path, layout, monkeypatch):
    seen = []
    monkeypatch.setattr(quantised, "BAND_BYTES", 4 * 32 * 5)  # bands of 3, 5 and 10 rows: blocks are cut
    monkeypatch.setattr(
        formats, "scaled", lambda x, *rest, scaled=formats.scaled: (seen.append(x.nbytes), scaled(x, *rest))[1]
    )
    truth = write_quantised(source, tmp_path / "q", layout)
    backbone, shard = load(tmp_path / "q")
    assert all(torch.equal(found, truth[key]) for key, found in backbone.items())
    checkpoint = open_checkpoint(tmp_path / "q")
    for layer, experts in all_experts(MODEL).items():
        for expert in experts:
            keys = [expert_key(MODEL, layer, expert, projection) for projection in PROJECTIONS]
            wanted = [truth[key] for key in keys]
            assert all(map(torch.equal, checkpoint.expert(layer, expert), wanted))
            assert torch.equal(
                shard.fetch(Fetch(layer, expert, 0, 1e18, WEIGHT)), torch.cat([*wanted[:2], wanted[2].T])
            )
    matrix = truth[f"{EXPERT}.weight"]
    rounded, turned = torch.empty(matrix.shape).bfloat16(), torch.empty(matrix.T.shape).T
    checkpoint.fill([quantised.Part(f"{EXPERT}.weight", target) for target in (rounded, turned)])
    assert torch.equal(rounded, matrix.bfloat16())
    assert torch.equal(turned, matrix)
    assert 0 < max(seen) <= quantised.BAND_BYTES  # nothing larger is there in fp32


def test_settings_may_stand_in_a_file_of_their_own(source, tmp_path):
    truth = write_quantised(source, tmp_path / "q", "nvfp4-modelopt")
    tree = {key: value for key, value in MODELOPT.items() if key != "quant_method"}
    tree["exclude_modules"] = tree.pop("ignore")
    (tmp_path / "q" / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": tree}))
    change(tmp_path / "q" / "config.json", quantization_config=None)
    assert torch.equal(open_checkpoint(tmp_path / "q").tensor(f"{EXPERT}.weight"), truth[f"{EXPERT}.weight"])
    tree["exclude_modules"] = ["vision*"]
    (tmp_path / "q" / "hf_quant_config.json").write_text(json.dumps({"quantization": tree}))
    with pytest.raises(CheckpointError, match=r"hf_quant_config.json: quantization: ignore names 'vision\*'"):
        open_checkpoint(tmp_path / "q")


def test_converting_gives_plain_weights(source, tmp_path, capsys):
    truth = write_quantised(source, tmp_path / "q", "fp8-block")
    assert main(["convert", str(tmp_path / "q"), str(tmp_path / "out")]) == 0
    made = open_checkpoint(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(torch.equal(made.tensor(key), tensor) for key, tensor in truth.items())


def test_settings_say_nothing_of_what_is_stored_plainly(source, tmp_path):
    """Headers count: weights that somebody has converted back load, whatever config.json still says."""
    write_quantised(source, tmp_path / "q", "fp8-deepseek")
    edited(tmp_path / "q", lambda tensors: [_plain(tensors, key) for key in list(tensors) if LINEAR.fullmatch(key)])
    load(tmp_path / "q")


def _plain(tensors, key):
    tensors[key] = tensors[key].float()
    del tensors[f"{key}_scale_inv"]


def without(part):
    return lambda tensors: tensors.pop(f"{EXPERT}.{part}")


def with_(part, make):
    return lambda tensors: tensors.update({f"{EXPERT}.{part}": make(tensors)})


def poked(part, value):
    def poke(tensors):
        tensors[f"{EXPERT}.{part}"].view(-1)[-1] = value

    return poke


def moved(tensors):
    tensors["model.layers.2.mlp.experts.9.down_proj.weight_scale"] = torch.ones(2)


def halved(tensors):
    tensors[f"{EXPERT}.weight"] = tensors.pop(f"{EXPERT}.weight_scale") * tensors[f"{EXPERT}.weight"].float()


def test_one_matrix_of_many_is_plain_where_settings_say_so(source, tmp_path):
    """As where a layer that suffers is left out; it may be named by what it is in."""
    write_quantised(source, tmp_path / "q", "int8-channel")
    edited(tmp_path / "q", halved)
    for name in (EXPERT, "re:.*down_proj", EXPERT.rpartition(".")[0]):
        said = LAYOUTS["int8-channel"][2]
        change(tmp_path / "q" / "config.json", quantization_config={**said, "ignore": [*said["ignore"], name]})
        if name.startswith("re:"):
            with pytest.raises(CheckpointError, match=r"ignore names .*down_proj.*stored as int8"):
                load(tmp_path / "q")
        else:
            load(tmp_path / "q")


ODD_TENSORS = {
    "half": ("int8-channel", halved, "down_proj is stored plainly, others of that name are quantised, and ignore does not"),
    "missing": ("fp8-block", without("weight_scale"), "down_proj.weight has type F8_E4M3 and no scale beside it"),
    "missing-global": ("nvfp4", without("weight_global_scale"), "down_proj.weight_global_scale is missing"),
    "missing-shape": ("int4", without("weight_shape"), "down_proj.weight_shape is missing"),
    "missing-data": ("int4", without("weight_packed"), "weight_scale is there, and no weight that it belongs to"),
    "extra": ("fp8-block", with_("weight_scale_inv", lambda _: torch.ones(4, 2)), "weight_scale_inv is there, which"),
    "order": ("int4", with_("weight_g_idx", lambda _: torch.arange(16)), "weight_g_idx is there, which"),
    "plain": ("fp8-block", with_("weight", lambda _: torch.ones(32, 16)), "has type F32.*; what is weight_scale beside it"),
    "foreign": ("int8-channel", moved, "experts.9.down_proj.weight_scale is there, and no weight"),
    "nan": ("fp8-block", poked("weight_scale", float("nan")), "weight_scale has a scale that is no positive number"),
    "inf": ("int8-channel", poked("weight_scale", float("inf")), "weight_scale has a scale that is no positive number"),
    "zero": ("nvfp4", poked("weight_scale", 0.0), "weight_scale has a scale that is no positive number"),
    "zero-global": ("nvfp4", poked("weight_global_scale", 0.0), "weight_global_scale has a scale that is no positive"),
    "negative": ("fp8-deepseek", poked("weight_scale_inv", -1.0), "weight_scale_inv has a scale that is no positive"),
    "scale-shape": ("fp8-block", with_("weight_scale", lambda _: torch.ones(4, 1)), r"scale for 8 x 12 .* has \[4, 2\]"),
    "scale-type": ("fp8-block", with_("weight_scale", lambda _: torch.ones(4, 2).char()), r"weight_scale is I8 \[4, 2\]"),
    "data-shape": ("nvfp4", with_("weight_packed", lambda _: torch.ones(32, 9).byte()), r"has shape \[32, 9\], 2 numbers"),
    "shape": ("int4", poked("weight_shape", 15), r"weight_shape is \[32, 15\], the matrix is one of \[32, 16\]"),
    "zero-missing": ("int8-zeros", without("weight_zero_point"), "weight_zero_point is missing; .* symmetric: false"),
    "zero-missing-packed": ("int4-zeros", without("weight_zero_point"), "down_proj.weight_zero_point is missing"),
    "nan-data": ("fp8-block", poked("weight", float("nan")), "down_proj.weight has NaN in it"),
    "large": ("fp8-block", poked("weight_scale", 1e37), "weight_scale has a scale that is no positive number, or too large"),
    "zeros": ("int4-zeros", with_("weight_zero_point", lambda _: torch.ones(4, 3).int()), r"zero_point is I32 \[4, 3\]"),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD_TENSORS)
def test_tensors_that_do_not_fit_are_refused(source, tmp_path, odd):
    layout, edit, message = ODD_TENSORS[odd]
    write_quantised(source, tmp_path / "q", layout)
    edited(tmp_path / "q", edit)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "q")


def block_of(*sizes):
    return {**BLOCKS, "config_groups": compressed("float", 8, "block", block_structure=list(sizes))["config_groups"]}


ODD_SETTINGS = {
    "method": ({"quant_method": "gptq"}, "quant_method 'gptq'; read are compressed-tensors, fp8, modelopt"),
    "no-mapping": (["fp8"], r"quant_method \['fp8'\]"),
    "format": ({**BLOCKS, "format": "marlin-24"}, "format 'marlin-24'"),
    "sparse": ({**BLOCKS, "sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config is not implemented"),
    "turned": ({**BLOCKS, "transform_config": {"config_groups": {}}}, "transform_config is not implemented"),
    "groups": ({**BLOCKS, "config_groups": None}, "config_groups is NoneType"),
    "no-groups": ({**BLOCKS, "config_groups": {}}, "config_groups is empty"),
    "bits": ({**BLOCKS, "config_groups": compressed("int", 3, "channel")["config_groups"]}, "3 bits of type 'int'"),
    "kind": ({**BLOCKS, "config_groups": compressed("int", 8, "channel")["config_groups"]}, "said to be int8 and stored as"),
    "few-bits": ({**BLOCKS, "config_groups": compressed("int", 4, "channel")["config_groups"]}, "F8_E4M3, .* says 4 bits"),
    "strategy": ({**BLOCKS, "config_groups": compressed("float", 8, "row")["config_groups"]}, "strategy 'row'"),
    "block": (block_of(16, 12), r"scale for 16 x 12 of its numbers has \[2, 3\]"),
    "block-zero": (block_of(0, 12), r"strategy 'block' with \[0, 12\]"),
    "block-text": ({**DEEPSEEK, "weight_block_size": "128"}, "weight_block_size is '128'"),
    "fmt": ({**DEEPSEEK, "fmt": "e5m2"}, "fmt is 'e5m2'"),
    "algorithm": ({**MODELOPT, "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'"),
    "ignore-none": ({**BLOCKS, "ignore": ["lm_head", "model.vision"]}, "ignore names 'model.vision', which no module"),
    "ignore-re": ({**BLOCKS, "ignore": ["re:.*[.]visual[.].*"]}, r"ignore names 're:.*visual.*', which no module"),
    "ignore-odd": ({**BLOCKS, "ignore": ["re:(?=x)"]}, "no expression without looking around"),
    "ignore-bomb": ({**BLOCKS, "ignore": ["re:(m|o|d|e|l|.)*(a|a)*(m+)+[.]no$"]}, "which no module"),
    "ignore-kept": ({**BLOCKS, "ignore": ["re:.*experts[.]1[.].*"]}, "ignore names .*experts.1.gate_proj .*stored as float8"),
    "ignore-list": ({**BLOCKS, "ignore": [1]}, r"ignore is \[1\], not a list of names"),
    "targets": (
        {**BLOCKS, "config_groups": {"a": {**BLOCKS["config_groups"]["group_0"], "targets": ["re:.*attn.*"]}}},
        "no group of quantization_config is for model.layers.0.mlp",
    ),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD_SETTINGS)
def test_settings_that_do_not_fit_are_refused(source, tmp_path, odd):
    said, message = ODD_SETTINGS[odd]
    write_quantised(source, tmp_path / "q", "fp8-block")
    change(tmp_path / "q" / "config.json", quantization_config=said)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "q")


def test_a_stack_of_quantised_experts_is_refused(source, tmp_path):
    write_quantised(source, tmp_path / "q", "fp8-block")

    def stack(tensors):
        prefix = "model.layers.2.mlp.experts."
        for key in [key for key in tensors if key.startswith(prefix)]:
            del tensors[key]
        tensors[f"{prefix}gate_up_proj"] = torch.zeros(4, 32, 32).to(torch.float8_e4m3fn)
        tensors[f"{prefix}down_proj"] = torch.zeros(4, 32, 16).to(torch.float8_e4m3fn)

    edited(tmp_path / "q", stack)
    with pytest.raises(CheckpointError, match=re.escape("gate_up_proj has type F8_E4M3 and no scale beside it")):
        load(tmp_path / "q")


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_what_is_quantised_here_is_near_and_loads(source, tmp_path, form, capsys):
    assert main(["convert", str(source), str(tmp_path / "q"), "--to", form, "--dtype", "bfloat16"]) == 0
    assert f"{form}, the rest bfloat16" in capsys.readouterr().out
    load(tmp_path / "q")
    plain, made = open_checkpoint(source), open_checkpoint(tmp_path / "q")
    for key in plain.weight_map:
        before, after = plain.tensor(key), made.tensor(key).float()
        if not LINEAR.fullmatch(key):
            assert torch.equal(before if "bias" in key else before.bfloat16().float(), after)
            continue
        amax = before.abs().amax(1, keepdim=True) if form == "int8" else before.abs().amax()  # one block
        worst = amax / 254 if form == "int8" else torch.maximum(before.abs() / 16, amax / 448 / 1024)
        assert ((after - before).abs() <= worst * 1.001).all()
    ignored = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == [*(f"model.layers.{i}.mlp.router.gate" for i in MODEL.moe_layers), "lm_head"]
    again = tmp_path / "again"
    assert main(["convert", str(tmp_path / "q"), str(again)]) == 0  # and back
    assert all(
        torch.equal(open_checkpoint(again).tensor(key), made.tensor(key).bfloat16()) for key in (f"{EXPERT}.weight",)
    )


@pytest.mark.parametrize("shape", [(5, 7), (128, 256), (130, 300), (1, 1)])
def test_rows_and_blocks_have_their_own_scales(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, shape[0]).unsqueeze(1)
    w[-1] = 0
    q, scale = formats.to_int8(w)
    assert q.abs().amax(1).tolist() == [127] * (shape[0] - 1) + [0]
    assert (scale > 0).all()
    q, scale = formats.to_fp8(w, (128, 128))
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i, j in ((i, j) for i in range(scale.shape[0]) for j in range(scale.shape[1])):
        rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        own, theirs = formats.to_fp8(w[rows, columns], (128, 128)), (q[rows, columns], scale[i, j])
        assert torch.equal(own[0].float(), theirs[0].float())
        assert own[1] == theirs[1]
        assert own[0].float().abs().max() == (448 if w[rows, columns].any() else 0)
