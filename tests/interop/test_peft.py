"""Adapters' folders of ours in PEFT, and of PEFT's in ours: the same log-probabilities over the same base in float32.

PEFT is unmodified, in an environment of its own that sees ours below it: `make interop-peft` makes it, and runs this file
there. transformers keeps the experts of a layer in two tensors; PEFT reads adapters of each expert, as we write them, into
adapters of these, and writes those, which we refuse by name.
"""

import pytest
import torch

pytest.importorskip("peft", reason="PEFT is not installed: make interop-peft")

import peft
from transformers import AutoModelForCausalLM

from tests.parity.families import our_logits
from tests.unit.adapter_folders import ROLES, write_adapter
from tests.unit.test_adapter_files import RANK
from tests.unit.test_lora import base, lora_config  # noqa: F401  a fixture
from tests.unit.test_named_adapters import SCORED, World
from tests.unit.test_trainer import texts, trainer_for  # noqa: F401  a fixture
from trinity.checkpoint import examined, open_checkpoint
from trinity.config import AdapterRef
from trinity.errors import CheckpointError
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]
IDS = [5, 17, 40, 101, 9, 77, 120, 33, 8, 56, 64]


@pytest.fixture
def hf(base):  # noqa: F811
    return AutoModelForCausalLM.from_pretrained(base[0], dtype=torch.float32).eval()


@torch.no_grad()
def theirs(model):
    """Log-probabilities of the tokens after the first."""
    logprobs_SV = model(torch.tensor([IDS])).logits[0, :-1].log_softmax(-1)
    return logprobs_SV.gather(1, torch.tensor(IDS)[1:, None])[:, 0]


def served(base, path):  # noqa: F811
    """The same, by an engine beside whose weights the adapter is."""
    world = World(base[0])
    content = examined(str(path), world.model, str(base[0])).adapter.content
    own = world.store.get(AdapterRef("it", content, str(path)))
    world.engine.add("a", IDS, SCORED, adapter=own)
    [delta] = world.engine.step()
    return torch.from_numpy(delta.prompt_logprobs.logprob_S)


@torch.no_grad()
def merged(path):
    """The same, by a model that has the adapter merged in."""
    source = open_checkpoint(path)
    pool = local_pool(source.config, Load(str(path), training=False))
    logits = our_logits(source.load_model(pool.dispatcher(source.version), "cpu"), torch.tensor([IDS]))[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(IDS)[1:, None])[:, 0]


def assert_same(wanted, base, path, plain):  # noqa: F811
    for mine in (served(base, path), merged(path)):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=0)
    assert (wanted - plain).abs().max() > 1e-3, "the adapter says something"


def test_a_folder_of_a_run_is_pefts(hf, base, tmp_path):  # noqa: F811
    trainer = trainer_for(lora_config(base, tmp_path))
    for _ in range(4):
        trainer.step()
    path, plain = trainer.save(), theirs(hf)
    loaded = peft.PeftModel.from_pretrained(hf, path)
    assert loaded.peft_config["default"].r == RANK
    assert_same(theirs(loaded), base, path, plain)


@pytest.mark.parametrize("roles", [["attention"], ["dense"], ["shared"], ["experts"], ROLES])
def test_every_matrix_is_where_peft_has_it(hf, base, tmp_path, roles):  # noqa: F811
    """Also where a name, as `gate_proj`, is that of matrices which have no adapter."""
    plain, path = theirs(hf), write_adapter(tmp_path / "own", base[0], 0, roles=roles)
    assert_same(theirs(peft.PeftModel.from_pretrained(hf, path)), base, path, plain)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = [f"{part}.{name}_proj.weight" for part in ("mlp", "shared_experts") for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("modules", "parameters"),
    [(["q_proj", "v_proj"], []), (ATTENTION, ["self_attn.gate_proj.weight"]), (["q_proj"], FEED_FORWARD)],
)
def test_pefts_own_folder_is_served_and_merged(hf, base, tmp_path, modules, parameters):  # noqa: F811
    plain, torch_seed = theirs(hf), torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, lora_alpha=12, target_modules=modules, target_parameters=parameters)
    model = peft.get_peft_model(hf, settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2, generator=torch_seed)
    model.save_pretrained(tmp_path)
    assert_same(theirs(model.eval()), base, tmp_path, plain)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora True is not implemented"),
        ({"use_rslora": True}, "use_rslora True is not implemented"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' is not implemented"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["gate_proj", "up_proj", "down_proj"]}, "target_parameters .* are stacks of experts"),
    ],
)
def test_what_we_would_compute_otherwise_is_refused_by_name(hf, base, tmp_path, settings, words):  # noqa: F811
    asked = {"r": 4, "target_modules": ["q_proj"]} | settings
    peft.get_peft_model(hf, peft.LoraConfig(**asked)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        examined(str(tmp_path), open_checkpoint(base[0]).config, None)
