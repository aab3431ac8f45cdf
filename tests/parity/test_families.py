"""Each family against transformers' own class: logits, gradients, checkpoints both ways, published shapes. CPU fp32.

AFMoE has a file of its own besides (test_model.py).
"""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.parity.configs import FAMILIES, random_config, random_ids
from tests.parity.families import diff, gradients, our_logits, twin
from trinity.checkpoint import CheckpointWriter, open_checkpoint, write_tensors
from trinity.config import preset
from trinity.errors import CheckpointError
from trinity.models.registry import build, family_of, read_config, write_config
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load

SEEDS = range(16)
ROUNDING = {False: 1e-5, True: 3e-5}  # with `batch_invariant` sums are in an order of our own
each = pytest.mark.parametrize("family", FAMILIES)
both = pytest.mark.parametrize("invariant", [False, True])


@each
def test_random_configs_cover_the_family(family):
    """The oracle is only as good as its configurations."""
    configs = [random_config(family, seed) for seed in SEEDS]
    assert len({config.num_experts_per_tok for config in configs}) >= 3
    assert {bool(config.moe_layers) for config in configs} >= {True}
    assert any(0 < len(config.moe_layers) < config.num_hidden_layers for config in configs)
    wanted = {
        "afmoe": {"mup_enabled": {True, False}, "num_shared_experts": {0, 1, 2}},
        "qwen3_moe": {"norm_topk_prob": {True, False}, "decoder_sparse_step": {1, 2}, "attention_bias": {True, False}},
        "glm4_moe": {
            "use_qk_norm": {True, False}, "attention_bias": {True, False}, "n_group": {1, 2, 4},
            "norm_topk_prob": {True, False}, "partial_rotary_factor": {0.5, 1.0}, "num_shared_experts": {1, 2},
        },
    }  # fmt: skip
    for field, values in wanted[family].items():
        assert {getattr(config, field) for config in configs} >= values, field
    if family == "qwen3_moe":
        assert any(config.mlp_only_layers for config in configs)
    if family == "glm4_moe":
        assert any(config.topk_group < config.n_group for config in configs)


@each
@both
@pytest.mark.parametrize("seed", SEEDS)
def test_logits_equal_transformers(family, seed, invariant):
    config = random_config(family, seed).model_copy(update={"batch_invariant": invariant})
    hf, ours, _ = twin(config, seed)
    ids_BS = random_ids(config, seed, 2, 19)
    with torch.no_grad():
        theirs, mine = hf(ids_BS).logits, our_logits(ours, ids_BS)
        hf.set_experts_implementation("eager")  # grouped_mm has no fp64
        truth = hf.double()(ids_BS).logits
    assert theirs.std() > 0.2
    assert diff(mine, theirs) <= ROUNDING[invariant]
    assert diff(mine, truth) <= max(ROUNDING[invariant], 2 * diff(theirs, truth)), (
        "as near to the exact numbers as transformers is"
    )


@each
@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_equal_transformers(family, seed):
    config = random_config(family, seed)
    hf, ours, experts = twin(config, seed)
    ids_BS = random_ids(config, seed, 2, 19)
    probe_BSV = torch.randn(2, 19, config.vocab_size, generator=torch.Generator().manual_seed(seed)) / 38**0.5
    (hf(ids_BS).logits * probe_BSV).sum().backward()
    (our_logits(ours, ids_BS) * probe_BSV).sum().backward()
    mine, theirs = gradients(hf, ours, experts)
    assert sum(grad.abs().max() > 1e-3 for grad in theirs.values() if grad.numel()) > len(theirs) / 2
    for name, grad in theirs.items():
        if grad.numel():
            assert diff(mine[name], grad) <= 1e-4 * max(1.0, grad.abs().max().item()), name


@each
def test_config_json_is_read_as_it_was_written(family):
    for seed in SEEDS:
        config = random_config(family, seed)
        tree = json.loads(json.dumps(write_config(config)))
        assert read_config(tree, "x") == config.model_copy(update={"batch_invariant": True})


@each
def test_a_checkpoint_of_transformers_loads_with_the_same_answers(family, tmp_path):
    """Backbone and experts from disk, both layouts of the experts."""
    config = random_config(family, 7)
    hf, _, _ = twin(config, 7)
    hf.save_pretrained(tmp_path / "each")
    stacked(hf, tmp_path / "each", tmp_path / "stacked")
    ids_BS = random_ids(config, 7, 2, 12)
    for folder in (tmp_path / "each", tmp_path / "stacked"):
        found = open_checkpoint(folder)
        pool = local_pool(found.config, Load(str(folder), training=False), num_shards=2, backend="reference")
        ours = build(found.config, pool.dispatcher())
        found.load_backbone(ours)
        with torch.no_grad():
            assert diff(our_logits(ours, ids_BS), hf(ids_BS).logits) <= 3e-5, folder


def stacked(hf, source, target):
    """The same checkpoint as trainers write it that save `model.state_dict()`."""
    from safetensors.torch import save_file

    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = {name: tensor.contiguous() for name, tensor in hf.state_dict().items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


@each
def test_a_checkpoint_of_ours_loads_in_transformers(family, tmp_path):
    config = random_config(family, 9).model_copy(update={"batch_invariant": True})
    pool = local_pool(config, Load(seed=3), num_shards=2, backend="reference")
    ours = build(config, pool.dispatcher())
    family_of(config).init_weights(ours, 3)
    writer = CheckpointWriter(tmp_path / "ours", 0)
    parts = [*pool.save(str(writer.folder), 0)(), *write_tensors(writer.folder, "model", ours.tensors().items())]
    writer.finish(parts, config, None, None)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids_BS = random_ids(config, 9, 2, 12)
    with torch.no_grad():
        assert diff(our_logits(ours, ids_BS), theirs.eval()(ids_BS).logits) <= 3e-5
    assert open_checkpoint(tmp_path / "ours").config == config


# What the cards say: billions of parameters. Embedding and head are counted, layers for multi-token prediction are not.
PUBLISHED = {"qwen3-30b-a3b": 30.5, "glm-4.5": 355, "glm-4.5-air": 106, "nano": 6.12, "mini": 26.1, "large": 398.6}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_published_shapes_have_as_many_parameters(name, billions):
    """Exactly those of transformers' own class, and what the card says to 1 %."""
    config = preset(name)
    counts = family_of(config).count_params(config)
    tree = {k: v for k, v in write_config(config).items() if k not in ("architectures", "dtype", "rope_theta")}
    hf_config = AutoConfig.for_model(**tree)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(hf_config)
    theirs = sum(p.numel() for key, p in hf.named_parameters() if not key.endswith("expert_bias"))
    assert counts.total == theirs
    assert abs(counts.total / 1e9 - billions) <= 0.01 * billions
    assert counts.total == sum(counts.by_role.values())


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ("qwen3_moe", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("glm4_moe", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("glm4_moe", {"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic'"),
        ("glm4_moe", {"n_group": 3}, "n_group 3"),
        ("afmoe", {"rope_parameters": {"rope_type": "default", "mscale": 2}}, "'mscale'"),
        ("afmoe", {"model_type": "mixtral"}, "'mixtral' model; Trinity runs 'afmoe', 'glm4_moe', 'qwen3_moe'"),
    ],
)
def test_what_we_lack_is_refused_by_name(family, change, words):
    tree = {**write_config(random_config(family, 1)), **change}
    with pytest.raises(CheckpointError, match=words):
        read_config(tree, "x")


def test_layers_for_multi_token_prediction_are_left_out_and_said_to_be(caplog):
    config = random_config("glm4_moe", 1)
    with caplog.at_level("INFO"):
        assert read_config({**write_config(config), "num_nextn_predict_layers": 1}, "x") == config
    assert "multi-token prediction" in caplog.text


def test_names_of_published_files_are_understood():
    """Published config.json files of Qwen3 say num_experts; of GLM rope_theta and partial_rotary_factor at the top."""
    config = random_config("qwen3_moe", 1)
    tree = write_config(config)
    assert read_config({k: v for k, v in tree.items() if k != "rope_parameters"}, "x") == config
    config = random_config("glm4_moe", 2).model_copy(update={"partial_rotary_factor": 0.5})
    tree = {k: v for k, v in write_config(config).items() if k != "rope_parameters"}
    assert tree["partial_rotary_factor"] == 0.5
    assert read_config(tree, "x") == config
