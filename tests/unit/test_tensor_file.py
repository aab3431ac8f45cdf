"""Reading weights into place: what the safetensors library reads, without mapped pages, with a bar on terminals."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trinity.checkpoint import open_checkpoint, tensor_file
from trinity.checkpoint.tensor_file import Part, StoredPart, TensorFile, read_all
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.models.common.family import Nobody
from trinity.rpc.messages import WEIGHT, Fetch, Load

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def saved(path, shapes, dtype, seed=0):
    gen = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=gen).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return load_file(path)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_whole_tensors_of_any_type_into_dense_and_transposed_memory(tmp_path, stored, wanted):
    truth = saved(tmp_path / "a", {"x": (5, 7), "y": (3,), "none": (0, 4)}, stored)
    file = TensorFile(tmp_path / "a")
    dense, turned = torch.empty(5, 7, dtype=wanted), torch.empty(7, 5, dtype=wanted).mT
    y, none = torch.empty(3, dtype=wanted), torch.empty(0, 4, dtype=wanted)
    told = []
    parts = [Part("x", dense), Part("x", turned), Part("y", y), Part("none", none)]
    read_all([StoredPart(file, part) for part in parts], told.append)
    assert torch.equal(dense, truth["x"].to(wanted))
    assert torch.equal(turned, truth["x"].to(wanted))
    assert torch.equal(y, truth["y"].to(wanted))
    assert sum(told) == sum(part.target.nbytes for part in parts)


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    cuts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 39), st.integers(1, 40)), max_size=12),
    most=st.integers(1, 64),
)
@settings(deadline=None, max_examples=60)
def test_parts_of_any_tensors_in_any_order_and_by_short_reads(tmp_path_factory, counts, cuts, most):
    path = tmp_path_factory.mktemp("parts") / "a"
    truth = saved(path, {str(i): (count,) for i, count in enumerate(counts)}, torch.float32, seed=len(cuts))
    parts = []
    for which, start, num in cuts:
        found = truth[str(which % len(counts))]
        start %= len(found)
        parts.append(Part(str(which % len(counts)), torch.full((min(num, len(found) - start),), -1.0), start))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "MOST_BYTES", most)
        read_all([StoredPart(file, part) for file in [TensorFile(path)] for part in parts], int)
    for part in parts:
        assert torch.equal(part.target, truth[part.key][part.start : part.start + len(part.target)])


def test_a_file_that_is_cut_after_it_was_opened_is_an_error_and_no_crash(tmp_path):
    saved(tmp_path / "a", {"x": (4096,)}, torch.float32)
    file = TensorFile(tmp_path / "a")
    os.truncate(tmp_path / "a", 9000)
    with pytest.raises(ValueError, match="a ends after 9,000 bytes"):
        file.read(Part("x", torch.empty(4096)))


def test_a_loaded_model_maps_no_file_and_has_the_librarys_values(checkpoint_of_transformers):
    folder, truth = checkpoint_of_transformers
    found = open_checkpoint(folder)
    model = found.load_model(Nobody(), "cpu")
    spec = ShardSpec("s", found.config, dict.fromkeys(found.config.moe_layers, (3, 0)), backend="torch")
    shard = ExpertShard(spec)
    shard.load(Load(str(folder), training=False))
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(folder) not in maps.read_text()
    for key, tensor in model.tensors().items():
        assert torch.equal(tensor, truth[key].to(tensor.dtype)), key
    for layer in found.config.moe_layers:
        for expert in (3, 0):
            names = [f"model.layers.{layer}.mlp.experts.{expert}.{p}_proj.weight" for p in ("gate", "up", "down")]
            gate, up, down = (truth[name] for name in names)
            rows = shard.fetch(Fetch(layer, expert, found.version, 1e18, WEIGHT))
            assert torch.equal(rows, torch.cat([gate, up, down.mT]).to(rows.dtype))


@pytest.fixture(params=["bfloat16", "float32"])
def checkpoint_of_transformers(request, tmp_path):
    from transformers import AfmoeConfig, AfmoeForCausalLM

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, head_dim=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, num_dense_layers=1)
    config = AfmoeConfig(num_experts=4, num_experts_per_tok=2, **sizes, **heads)
    model = AfmoeForCausalLM(config).to(getattr(torch, request.param))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path, {k: v.clone() for path in tmp_path.glob("*.safetensors") for k, v in load_file(path).items()}
