"""Checkpoints from elsewhere, odd ones and hostile ones: refused with the file and the reason, and quickly."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.checkpoint_files import edit_json, plain, write
from trinity.checkpoint import CheckpointWriter, open_checkpoint
from trinity.checkpoint.layout import own_hash
from trinity.cli import main
from trinity.config import preset
from trinity.errors import CheckpointError
from trinity.models.afmoe.model import Afmoe
from trinity.models.registry import read_config, write_config
from trinity.text.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def foreign(tmp_path):
    return plain(write(tmp_path)[1])


@pytest.fixture
def single(foreign, tmp_path):
    """A folder with a config.json; what else belongs in it, the test says."""
    folder = tmp_path / "single"
    folder.mkdir()
    shutil.copy(foreign / "config.json", folder)
    return folder


def load(path):
    checkpoint = open_checkpoint(path)
    checkpoint.load_backbone(Afmoe(checkpoint.config, lambda *_: None))
    return checkpoint


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
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method .awq.; read are compressed-tensors"),
        ({"quantization_config": ["fp8"]}, "quantization_config has quant_method"),
        ({"hidden_size": 64}, "has shape"),
    ],
)
def test_other_architectures_are_refused(foreign, changes, message):
    load(foreign)
    edit_json(foreign / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load(foreign)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "glm-4.5-air"])
def test_layers_that_slide_are_refused_by_families_whose_layers_do_not(name):
    known = preset(name)
    tree = write_config(known)
    assert read_config({**tree, "layer_types": ["full_attention"] * known.num_hidden_layers}, "here") == known
    for odd, message in (
        (["full_attention", "sliding_attention"], "layer_types has 'sliding_attention'"),
        (["full_attention", 3, None], "layer_types has 3"),
        ([["full_attention"]], "layer_types has"),
        (7, "layer_types has 7"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_config({**tree, "layer_types": odd}, "here")


def test_several_ends_of_a_text_are_kept_and_those_for_generation_count(foreign):
    config = load(foreign).config
    assert config.eos_token_ids == (config.eos_token_id,)
    (foreign / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3]}))
    assert load(foreign).config.eos_token_ids == (5, 3)
    for odd in ('{"eos_token_id": ["x", 3]}', '{"eos_token_id": {}}', "[3]", "{"):
        (foreign / "generation_config.json").write_text(odd)
        with pytest.raises(CheckpointError, match=r"eos_token_id|generation_config\.json"):
            load(foreign)
    (foreign / "generation_config.json").unlink()
    edit_json(foreign / "config.json", eos_token_id=[3, 4])
    found = load(foreign).config
    assert found.eos_token_ids == (3, 4)
    assert read_config(write_config(found), "here") == found


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "a\\..\\b", "", "n" * 5000])
def test_an_index_may_not_leave_the_folder(foreign, file):
    edit_json(foreign / INDEX, weight_map={"model.norm.weight": file})
    with pytest.raises(CheckpointError, match=f"{INDEX} names a file outside the checkpoint"):
        open_checkpoint(foreign)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd"])
def test_a_manifest_may_not_leave_the_folder_even_if_its_hash_is_right(tmp_path, file):
    path = write(tmp_path)[1] / "manifest.json"
    tree = json.loads(path.read_text())
    tree["files"][file] = {"bytes": 1, "sha256": "0", "tensors": []}
    path.write_text(json.dumps({**tree, "sha256": own_hash(tree)}))
    with pytest.raises(CheckpointError, match=r"manifest\.json names a file outside the checkpoint"):
        open_checkpoint(path.parent)


@pytest.mark.parametrize("changes", [{"files": [1]}, {"files": {"config.json": 3}}, {"format": 3}, {"step": "3"}])
def test_a_manifest_of_another_kind_is_refused_even_if_its_hash_is_right(tmp_path, changes):
    path = write(tmp_path)[1] / "manifest.json"
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**tree, "sha256": own_hash(tree)}))
    with pytest.raises(CheckpointError, match=r"manifest\.json (is not of format 2|does not list 'config\.json')"):
        open_checkpoint(path.parent)


def test_a_file_that_the_manifest_does_not_know_is_not_read(tmp_path):
    path = write(tmp_path)[1]
    tree = json.loads((path / "manifest.json").read_text())
    del tree["files"]["model-backbone-00.safetensors"]
    (path / "manifest.json").write_text(json.dumps({**tree, "sha256": own_hash(tree)}))
    with pytest.raises(CheckpointError, match=r"model-backbone-00\.safetensors is not in the manifest"):
        load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "key 'a' is there twice"),
        ('{"weight_map": {}, "weight_map": {}}', "key 'weight_map' is there twice"),
        ('{"weight_map": ["a"]}', "not a mapping"),
        ('{"weight_map": {"a": 1}}', "not a mapping"),
        ('{"weight_map": {"a": "pytorch_model-00.bin"}}', "safetensors files only"),
        ('{"a":' * 100_000, "recursion"),
        ("\x00", "Expecting value"),
        ("", "Expecting value"),
        ("[]", "does not hold a JSON object"),
    ],
)
def test_an_odd_index_is_refused(foreign, text, message):
    (foreign / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=f"{INDEX}.*{message}"):
        open_checkpoint(foreign)


def test_an_index_of_gigabytes_is_not_read(foreign):
    with (foreign / INDEX).open("r+b") as file:
        file.truncate(3 << 30)  # a hole: it takes no room
    with pytest.raises(CheckpointError, match=f"{INDEX}.*3,221,225,472 bytes"):
        open_checkpoint(foreign)


def test_a_tensor_that_its_file_lacks_or_whose_file_is_not_there_is_named(foreign):
    where = json.loads((foreign / INDEX).read_text())["weight_map"]
    edit_json(foreign / INDEX, weight_map={**where, "model.norm.weight": "model-experts-shard-0-00.safetensors"})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' in .*model-experts-shard-0-00\.safetensors"):
        load(foreign)
    edit_json(foreign / INDEX, weight_map={**where, "model.norm.weight": "nowhere.safetensors"})
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors is missing"):
        load(foreign)
    del where["model.norm.weight"]
    edit_json(foreign / INDEX, weight_map=where)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is missing"):
        load(foreign)


def test_pickles_are_refused(single):
    (single / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\.bin/\.pt files"):
        open_checkpoint(single)
    (single / "pytorch_model.bin").rename(single / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        open_checkpoint(single)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_types_that_are_not_the_weights_themselves_are_refused(single, dtype):
    save_file({"model.norm.weight": torch.zeros(32).to(dtype)}, single / "model.safetensors")
    with pytest.raises(CheckpointError, match="weights are floating point"):
        open_checkpoint(single).tensor("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing"):
        open_checkpoint(single).tensor("lm_head.weight")


def entry(start, end, *shape):
    return f'{{"dtype": "F32", "shape": {list(shape)}, "data_offsets": [{start}, {end}]}}'


@pytest.mark.parametrize(
    ("header", "num_bytes"),
    [
        (f'{{"a": {entry(0, 8, 2)}, "b": {entry(4, 12, 2)}}}', 12),  # they overlap
        (f'{{"a": {entry(0, 8, 2)}, "b": {entry(0, 8, 2)}}}', 8),
        (f'{{"a": {entry(0, 8, 2)}, "a": {entry(0, 8, 1, 2)}}}', 8),  # twice
        (f'{{"a": {entry(8, 16, 2)}, "a": {entry(0, 8, 2)}}}', 8),  # only one of the two is in the file
        (f'{{"a": {entry(0, 8, 2)}}}', 12),  # bytes that nobody names
        (f'{{"a": {entry(0, 8, 2)}}}', 4),  # truncated
        (f'{{"a": {entry(0, 8, 3)}}}', 8),
        (f'{{"a": {entry(0, 8, 2**62, 2**62)}}}', 8),
        (f'{{"a": {entry(-8, 0, 2)}}}', 8),
        ('{"a": ' * 100_000, 8),
        ("[]", 0),
        ("", 0),
    ],
)
def test_a_header_that_says_two_things_or_more_than_there_is_is_refused(single, header, num_bytes):
    path = single / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(num_bytes))
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        open_checkpoint(single)


@pytest.mark.parametrize("claimed", [1 << 31, 1 << 40, (1 << 64) - 1])
def test_a_giant_header_is_refused_unread(single, claimed):
    path = single / "model.safetensors"
    with path.open("wb") as file:
        file.write(claimed.to_bytes(8, "little") + b"{}")
        file.truncate(min(claimed, 3 << 30))
    with pytest.raises(CheckpointError, match=f"header claims {claimed:,} bytes"):
        open_checkpoint(single)


def test_code_that_comes_with_a_checkpoint_is_neither_imported_nor_copied(foreign, tmp_path):
    Tokenizer.train(iter(["some text"]), 300).save(foreign)
    for file in ("config.json", "tokenizer_config.json"):
        edit_json(foreign / file, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]})
    (foreign / "evil.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    checkpoint = load(foreign)
    checkpoint.expert(1, 0)
    assert checkpoint.tokenizer.encode("some")
    assert main(["convert", str(foreign), str(tmp_path / "out")]) == 0
    assert not (tmp_path / "it-ran").exists()
    assert "evil" not in sys.modules
    assert not (tmp_path / "out" / "evil.py").exists()
    for file in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (tmp_path / "out" / file).read_text()


def test_a_shard_that_forgot_an_expert_or_wrote_one_twice_makes_no_checkpoint(tmp_path):
    from tests.unit.checkpoint_files import MODEL, model_and_pool

    _, pool = model_and_pool()
    writer = CheckpointWriter(tmp_path / "step-000001", 1)
    parts = pool.save(str(writer.folder), 0)()
    with pytest.raises(CheckpointError, match="nobody wrote 'model"):
        writer.finish(parts[2:], MODEL, None, {})
    assert list(tmp_path.iterdir()) == []
    writer = CheckpointWriter(tmp_path / "step-000001", 1)
    parts = pool.save(str(writer.folder), 0)()
    with pytest.raises(CheckpointError, match="was written twice"):
        writer.finish([*parts, parts[0]], MODEL, None, {})
    writer = CheckpointWriter(tmp_path / "step-000001", 1)
    parts = pool.save(str(writer.folder), 0)()
    (writer.folder / parts[0].file).unlink()
    with pytest.raises(CheckpointError, match="do all nodes see the same file system"):
        writer.finish(parts, MODEL, None, {})
    assert list(tmp_path.iterdir()) == []
