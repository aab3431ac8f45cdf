"""Adapters as files: PEFT's format, the merged checkpoint, and what is refused before a step."""

import json
import shutil

import pytest
import torch

from tests.unit.test_lora import RANK, base, lora_config  # noqa: F401  a fixture
from tests.unit.test_trainer import all_weights, config_for, texts, trainer_for  # noqa: F401  a fixture
from trinity.checkpoint import open_checkpoint
from trinity.checkpoint.export import card_of, export
from trinity.checkpoint.tensor_file import TensorFile
from trinity.cli import main
from trinity.config import Config, OptimConfig, Sequences
from trinity.errors import CheckpointError, ConfigError
from trinity.launch import check_out_dir
from trinity.stages import read_stages
from trinity.train.loss import token_logprobs

PREFIX = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):  # noqa: F811
    """A trained adapter's folder, and log p of some text by the model that it was saved of."""
    trainer = trainer_for(lora_config(base, tmp_path_factory.mktemp("adapter")))
    for _ in range(3):
        trainer.step()
    ids_BS = trainer.data.train.batch(Sequences.nth(0, 4), 0, 1, 0, 4).ids_BS
    trainer.dispatcher.use(trainer.version)
    return trainer.save(), ids_BS, token_logprobs(trainer.model, ids_BS)


def logprobs(checkpoint, base, ids_BS, out_dir):  # noqa: F811
    """By a run that begins from a checkpoint."""
    config = base[1].replace(train={"out_dir": str(out_dir), "init_from": str(checkpoint)})
    trainer = trainer_for(config)
    trainer.dispatcher.use(trainer.version)
    return token_logprobs(trainer.model, ids_BS), all_weights(trainer)


def test_the_files_are_pefts(adapter, base):  # noqa: F811
    path, *_ = adapter
    tree = json.loads((path / "adapter_config.json").read_text())
    assert (tree["peft_type"], tree["r"], tree["lora_alpha"], tree["bias"]) == ("LORA", RANK, 16.0, "none")
    assert tree["base_model_name_or_path"] == str(base[0].resolve())
    assert {"q_proj", "o_proj", "gate_proj", "down_proj"} <= {*tree["target_modules"]}
    assert {"mlp.up_proj.weight", "shared_experts.down_proj.weight"} <= {*tree["target_parameters"]}
    assert "self_attn.gate_proj.weight" in tree["target_parameters"], "else PEFT would take it for an expert's"
    file, model = TensorFile(path / "adapter_model.safetensors"), base[1].model
    last, f, d = model.moe_layers[-1], model.moe_intermediate_size, model.hidden_size
    for module, (n, k) in {f"mlp.experts.{model.num_experts - 1}.down_proj": (d, f), "self_attn.q_proj": (None, d),
                           "mlp.shared_experts.up_proj": (f, d)}.items():  # fmt: skip
        a, b = (file.entry(f"{PREFIX}.{last}.{module}.lora_{part}.weight").shape for part in "AB")
        assert (a, b[1]) == ((RANK, k), RANK)
        assert n in (None, b[0])


def test_merged_is_the_adapter(adapter, base, tmp_path, capsys):  # noqa: F811
    path, ids_BS, want = adapter
    assert main(["convert", str(path), str(tmp_path / "merged")]) == 0
    merged = open_checkpoint(tmp_path / "merged")
    assert merged.adapter is None
    for number, source in enumerate((path, tmp_path / "merged")):
        got, weights = logprobs(source, base, ids_BS, tmp_path / str(number))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        for name, tensor in weights.items():
            assert torch.equal(tensor, merged.tensor(name))
    plain, _ = logprobs(base[0], base, ids_BS, tmp_path / "plain")
    assert (plain - want).abs().max() > 1e-3, "the adapter says something"


def test_an_adapter_that_adds_nothing_is_its_base_bit_for_bit(base, tmp_path):  # noqa: F811
    trainer = trainer_for(lora_config(base, tmp_path / "run"))
    fresh, plain = open_checkpoint(trainer.save()), open_checkpoint(base[0])
    names = plain.weight_map
    assert fresh.adapter is not None
    assert all(bytes(fresh.tensor(n).numpy().data) == bytes(plain.tensor(n).numpy().data) for n in names)


def test_training_goes_on_from_an_adapter_with_fresh_state(adapter, base, tmp_path):  # noqa: F811
    path, ids_BS, want = adapter
    config = lora_config(base, tmp_path, init_from=str(path))
    check_out_dir(config)
    trainer = trainer_for(config)
    assert torch.equal(token_logprobs(trainer.model, ids_BS), want)
    trainer.step()
    assert open_checkpoint(trainer.save()).base.path == base[0]


# -- what is refused, before a step


def changed(path, target, tensors=None, **fields):
    """A copy of an adapter's folder as somebody else may have written it, with other fields or tensors."""
    shutil.copytree(path, target, ignore=shutil.ignore_patterns("manifest.json", "training"))
    tree = json.loads((target / "adapter_config.json").read_text()) | fields
    (target / "adapter_config.json").write_text(json.dumps(tree))
    if tensors is not None:
        from safetensors.torch import load_file, save_file

        save_file(tensors(load_file(path / "adapter_model.safetensors")), target / "adapter_model.safetensors")
    return target


def with_nan(tensors):
    key = next(name for name in tensors if ".experts." in name)
    return {**tensors, key: torch.full_like(tensors[key], float("nan"))}


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"fields": {"r": 8}}, r"lora_A.weight is F32 \[4, .*r 8 want \[8"),
        ({"fields": {"use_dora": True}}, "use_dora True is not implemented"),
        (
            {"fields": {"target_parameters": ["gate_up_proj"]}},
            r"target_parameters \['gate_up_proj'\] are stacks of experts",
        ),
        ({"fields": {"init_lora_weights": "pissa"}}, "init_lora_weights 'pissa' is not implemented"),
        ({"fields": {"peft_type": "IA3"}}, "peft_type 'IA3' is not implemented"),
        ({"fields": {"r": 0}}, "r 0 and lora_alpha 16.0 are no rank"),
        ({"fields": {"base_model_name_or_path": "nowhere"}}, "nowhere"),
        ({"tensors": with_nan}, "numbers that are not finite"),
        ({"tensors": renamed("layers.1.", "layers.9.")}, r"the model has no matrix 'model.layers.9"),
        ({"tensors": renamed("lora_A", "lora_C")}, "is no part of an adapter"),
    ],
)
def test_a_bad_adapter_is_named(adapter, base, tmp_path, what, words):  # noqa: F811
    bad = changed(adapter[0], tmp_path / "bad", what.get("tensors"), **what.get("fields", {}))
    with pytest.raises(CheckpointError, match=words):
        check_out_dir(base[1].replace(train={"out_dir": str(tmp_path / "out"), "init_from": str(bad)}))


def test_an_adapter_of_another_base_is_named(adapter, base, tmp_path, texts):  # noqa: F811
    other = trainer_for(config_for(texts, tmp_path / "other", seed=7)).save()
    moved = changed(adapter[0], tmp_path / "moved", base_model_name_or_path=str(other))
    with pytest.raises(CheckpointError, match=r"is an adapter to other weights than .*other.* has"):
        open_checkpoint(moved)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 8}, "an adapter of rank 4 and alpha 16, optim.lora has 8 and 16"),
        ({"alpha": 8}, "of rank 4 and alpha 16, optim.lora has 4 and 8"),
        ({"targets": ["experts"]}, "an adapter of other matrices than optim.lora.targets experts"),
    ],
)
def test_a_run_of_another_shape_does_not_go_on_from_an_adapter(adapter, base, tmp_path, lora, words):  # noqa: F811
    config = lora_config(base, tmp_path, lora, init_from=str(adapter[0]))
    for begin in (check_out_dir, trainer_for):
        with pytest.raises(ConfigError, match=words):
            begin(config)


def test_an_adapter_and_whole_weights_do_not_resume_each_other(adapter, base, tmp_path):  # noqa: F811
    whole = base[1].replace(train={"out_dir": str(adapter[0].parent), "resume": True})
    with pytest.raises(ConfigError, match=r"is an adapter of rank 4, and optim\.lora\.rank is 0"):
        check_out_dir(whole)
    lora = lora_config(base, base[0].parent, resume=True)
    with pytest.raises(ConfigError, match=r"is whole weights, and optim\.lora\.rank is 4"):
        check_out_dir(lora)


def test_settings_that_contradict_each_other_are_named(base, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match=r"optim.lora without train.init_from"):
        check_out_dir(lora_config(base, tmp_path, init_from=None))
    for optim, words in (
        ({"lora": {"rank": 2}, "freeze": ["router"]}, "freeze and lora exclude each other"),
        ({"freeze": ["embedding", "head", "norm", "router", "attention", "dense", "shared", "experts"]}, "all parts"),
        ({"lora": {"targets": ["attention", "router"]}}, "optim.lora.targets.1"),
        ({"freeze": ["routers"]}, "optim.freeze.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            Config.from_tree({"model": "tiny", "optim": optim})
    assert not OptimConfig().lora.rank


# -- stages


def test_a_stage_of_adapters_ends_with_weights_that_everybody_loads(base, tmp_path):  # noqa: F811
    """Between stages that train other parts weights go on alone; the export is merged, in the stage's context."""
    begun = base[1].replace(train={"out_dir": str(tmp_path), "init_from": str(base[0]), "steps": 2})
    lora, wide = {"lora": {"rank": RANK}}, {"max_position_embeddings": 2 * begun.model.max_position_embeddings}
    own = [{"name": "tune", "optim": lora}, {"name": "wider", "optim": lora, "model": wide}, {"name": "whole"}]
    stages = read_stages({**begun.model_dump(mode="json"), "stages": own})
    assert [stage.config.train.carry for stage in stages] == ["weights", "all", "weights"]
    versions = []
    for stage in stages:
        trainer = trainer_for(stage.config)
        versions.append(trainer.version)
        for _ in range(2):
            trainer.step()
        assert trainer.save() == stage.checkpoint
        assert check_out_dir(stage.config.replace(train={"resume": True})) == stage.checkpoint
        exported = open_checkpoint(export(stage.checkpoint, stage.export, card_of(stage.name, {})))
        assert (exported.adapter, exported.config) == (None, stage.config.model)
    assert versions == [0, 2, 0]
    assert all(torch.equal(exported.tensor(name), tensor) for name, tensor in all_weights(trainer).items())
    assert sorted(path.name for path in stages[0].export.iterdir() if path.is_dir()) == []
