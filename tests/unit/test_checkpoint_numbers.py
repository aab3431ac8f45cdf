"""Numbers in a checkpoint that no model has are refused by name, before anything of that size is made."""

import json
import math
import resource

import pytest

from tests.unit.checkpoint_files import model_and_pool, save
from trinity.checkpoint import open_checkpoint
from trinity.errors import CheckpointError
from trinity.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    return save(folder, 1, *model_and_pool(1), Tokenizer.train(iter(["some text"]), 300))


@pytest.fixture
def copied(good, tmp_path):
    """The checkpoint as somebody else would have it: without our manifest."""
    for path in good.iterdir():
        if path.is_file() and path.name != "manifest.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    edit(tmp_path / "model.safetensors.index.json", metadata={})
    return tmp_path


def edit(file, **changes):
    tree = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def small_and_named(folder, says):
    """This process grows by no more than the files are worth."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(folder).tokenizer  # noqa: B018
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_it_is_good_as_it_is(copied):
    assert open_checkpoint(copied).tokenizer.vocab_size >= 269


ODD = [
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", -1),
    ("num_experts", 10**9),
    ("num_experts", 2**40),
    ("vocab_size", 10**12),
    ("vocab_size", 2**24),  # within bounds, and more than the files hold
    ("hidden_size", 10**9),
    ("hidden_size", 2**24),
    ("moe_intermediate_size", 2**20),
    ("intermediate_size", 10**12),
    ("num_attention_heads", 2**31),
    ("head_dim", 2**62),
    ("max_position_embeddings", 2**63),
    ("sliding_window", 10**30),
    ("num_shared_experts", 10**9),
    ("num_dense_layers", 10**9),
    ("eos_token_id", 2**63),
    ("eos_token_id", [1] * 5000),
    ("rms_norm_eps", -1e-5),
    ("rms_norm_eps", math.nan),
    ("rms_norm_eps", math.inf),
    ("rope_theta", math.nan),
    ("rope_theta", -math.inf),
    ("rope_theta", -1.0),
    ("route_scale", math.nan),
    ("layer_types", ["full_attention"] * 1_000_000),
]


@pytest.mark.parametrize(("key", "value"), ODD, ids=[f"{key}-{str(value)[:12]}" for key, value in ODD])
def test_a_number_that_no_model_has(copied, key, value):
    more = {"layer_types": None} if key == "num_hidden_layers" else {}
    if key == "rope_theta":
        more["rope_parameters"] = None
    edit(copied / "config.json", **{key: value}, **more)
    (copied / "generation_config.json").unlink(missing_ok=True)  # its ids would count
    small_and_named(copied, r"config\.json")


@pytest.mark.parametrize("number", [2**32 - 1, 3 * 10**8, 2**22])
def test_an_id_that_no_tokenizer_has(copied, number):
    file = copied / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"]["vocab"]["zzz"] = number
    file.write_text(json.dumps(tree))
    small_and_named(copied, f"token id {number:,}|not a tokenizer")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_key_twice_among_very_many_is_found_at_once(copied, name):
    file = copied / name
    text = file.read_text().rstrip()[:-1]
    file.write_text(text + "".join(f',"k{i}":0' for i in range(200_000)) + ',"k199999":1}')
    small_and_named(copied, "'k199999' is there twice")
