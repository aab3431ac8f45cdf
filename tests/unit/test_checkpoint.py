"""Checkpoints: what is written loads, in transformers too; what is damaged is named and never loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from trinity.checkpoint import CheckpointWriter, list_checkpoints, open_checkpoint, prune, step_path, write_tensors
from trinity.config import OptimConfig, preset
from trinity.errors import CheckpointError
from trinity.messages import Load
from trinity.model.afmoe import Afmoe
from trinity.model.attention import PackedAttention, packed_positions
from trinity.model.init import init_weights
from trinity.pool import local_pool

MODEL = preset("tiny").model_copy(
    update=dict(vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, head_dim=8, num_experts=4,
                sliding_window=6, pad_token_id=None)
)  # fmt: skip


def logits_of(model, ids):
    with torch.no_grad():
        out = model(ids, packed_positions(1, len(ids)), PackedAttention(MODEL, None, 1, len(ids)))
        return model.logits(out.hidden_TD)


def write(out_dir, step=3, num_shards=2):
    pool = local_pool(MODEL, Load(seed=1), num_shards=num_shards, optim=OptimConfig(), backend="torch")
    model = Afmoe(MODEL, pool.dispatcher())
    init_weights(model, MODEL, seed=1)
    with torch.no_grad():
        for bias in model.expert_bias.values():
            bias.normal_(std=0.1)
    writer = CheckpointWriter(step_path(out_dir, step), step)
    parts = [
        *pool.save(str(writer.folder)),
        *write_tensors(writer.folder, "model-backbone", model.state_dict().items()),
    ]
    return model, writer.finish(parts, MODEL, None, {"num_updates": 0})


@pytest.fixture
def saved(tmp_path):
    return write(tmp_path)


def test_another_number_of_shards_loads_the_same_model(saved):
    model, path = saved
    source = open_checkpoint(path)
    assert source.config == MODEL
    pool = local_pool(source.config, Load(str(path)), num_shards=3, backend="torch")
    again = Afmoe(MODEL, pool.dispatcher(version=3))
    assert source.load_backbone(again) == 3
    ids = torch.arange(20) % MODEL.vocab_size
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids), atol=1e-6, rtol=0)


def test_transformers_loads_it_with_no_missing_or_unexpected_key_and_we_load_what_it_saves(saved, tmp_path):
    from transformers import AfmoeForCausalLM

    model, path = saved
    theirs, info = AfmoeForCausalLM.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(0, MODEL.vocab_size, (24,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(ids[None]).logits[0]
    torch.testing.assert_close(logits_of(model, ids), want, atol=1e-5, rtol=0)

    theirs.save_pretrained(tmp_path / "hf")
    back = open_checkpoint(tmp_path / "hf")
    assert back.version == 0
    ours = Afmoe(back.config, local_pool(back.config, Load(str(back.path)), backend="torch").dispatcher())
    back.load_backbone(ours)
    torch.testing.assert_close(logits_of(ours, ids), want, atol=1e-5, rtol=0)


def test_large_parts_are_split_and_nothing_is_lost(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(10)}
    parts = write_tensors(tmp_path, "x", tensors.items(), max_file_bytes=900)
    assert [part.file for part in parts] == [f"x-{i:02d}.safetensors" for i in range(5)]
    read = {k: v for part in parts for k, v in load_file(tmp_path / part.file).items()}
    assert all(torch.equal(read[k], v) for k, v in tensors.items())


def test_unfinished_saves_are_not_listed_and_old_ones_are_pruned(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    CheckpointWriter(step_path(tmp_path, 4), 4)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001", "step-000002", "step-000003"]
    with pytest.raises(CheckpointError, match="did not finish"):
        open_checkpoint(tmp_path / "step-000004.partial")
    prune(tmp_path, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000003"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: flip(p / "model-backbone-00.safetensors"), "does not match its SHA-256"),
        (lambda p: (p / "model-backbone-00.safetensors").write_bytes(b"x" * 100), "the manifest says"),
        (lambda p: (p / "model-backbone-00.safetensors").unlink(), "is missing"),
        (lambda p: flip(p / "config.json"), "does not match its SHA-256"),
        (lambda p: (p / "config.json").unlink(), "is missing"),
        (lambda p: edit_json(p / "manifest.json", files={"config.json": 3}), "does not list files"),
        (lambda p: (p / "manifest.json").write_text("[1]"), "does not hold a JSON object"),
    ],
)
def test_damage_is_named(saved, damage, message):
    model, path = saved
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path).load_backbone(model)


def test_a_large_checkpoint_is_measured_ahead_and_hashed_when_it_is_read(saved, monkeypatch):
    model, path = saved
    open_checkpoint(path).verify()
    flip(path / "model-backbone-00.safetensors")
    with pytest.raises(CheckpointError, match="SHA-256"):
        open_checkpoint(path).verify()
    monkeypatch.setattr("trinity.checkpoint.HASH_AHEAD_BYTES", 0)
    open_checkpoint(path).verify()
    with pytest.raises(CheckpointError, match="SHA-256"):
        open_checkpoint(path).load_backbone(model)
    (path / "model-backbone-00.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(path).verify()


def test_a_shard_whose_load_fails_holds_no_version(saved, tmp_path):
    _, path = saved
    pool = local_pool(MODEL, Load(str(path)), num_shards=1, backend="torch")
    _, other = write(tmp_path / "other")
    flip(other / "model-experts-shard-1-00.safetensors")
    with pytest.raises(CheckpointError, match="SHA-256"):
        pool.load(Load(str(other)))
    assert pool.versions() == {"shard-0": -1}
    assert pool.load(Load(str(path))) == 3


def plain(path):
    """The same checkpoint as somebody else would have written it: no manifest."""
    (path / "manifest.json").unlink()
    return path


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "'llama' model; Trinity runs 'afmoe'"),
        ({"score_func": "softmax"}, "only 'sigmoid'"),
        ({"rope_parameters": [1]}, "not an object"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta"),
        ({"num_hidden_layers": "abc", "layer_types": None}, "num_hidden_layers"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type 'yarn'"),
        ({"num_experts_per_tok": 50}, "num_experts_per_tok 50 > num_experts 4"),
        ({"hidden_size": "32x"}, "hidden_size"),
        ({"hidden_size": 64}, "has shape"),
    ],
)
def test_other_architectures_are_refused(saved, changes, message):
    path = plain(saved[1])
    edit_json(path / "config.json", **changes)

    def load():
        checkpoint = open_checkpoint(path)
        checkpoint.load_backbone(Afmoe(checkpoint.config, lambda *_: None))

    with pytest.raises(CheckpointError, match=message):
        load()


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "a\\..\\b"])
def test_an_index_may_not_leave_the_folder(saved, file):
    path = plain(saved[1])
    edit_json(path / "model.safetensors.index.json", weight_map={"model.norm.weight": file})
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(path)


def test_pickles_integers_and_missing_tensors_are_refused(saved, tmp_path):
    path = plain(saved[1])
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(path / "config.json", other)
    (other / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\.bin/\.pt files"):
        open_checkpoint(other)
    save_file({"model.norm.weight": torch.zeros(32, dtype=torch.int64)}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="weights are floating point"):
        open_checkpoint(other).tensor("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing"):
        open_checkpoint(other).tensor("lm_head.weight")
    (other / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        open_checkpoint(other)
