"""Unusual architectures, trained here through two shards: transformers loads the checkpoint and continues alike."""

import pytest
import torch
from transformers import AfmoeForCausalLM

from tests.unit.test_trainer import config_for, trainer_for
from trinity import LLM
from trinity.engine.request import SamplingParams

MODELS = [
    {"num_dense_layers": 4},
    {"num_dense_layers": 0},
    {"num_shared_experts": 0},
    {"num_experts_per_tok": 4, "mup_enabled": False},
    {
        "num_shared_experts": 2,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "sliding_window": 5,
        "num_key_value_heads": 4,
    },
]
PROMPT = [0, 5, 9, 20, 33, 7] * 3


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_trained_checkpoints_go_on_alike_in_transformers(tmp_path, model):
    for n in range(12):
        (tmp_path / f"{n}.txt").write_text(" ".join(f"word{(n * i) % 37} is {i * n}" for i in range(300)))
    trainer = trainer_for(config_for(tmp_path, tmp_path / "run").replace(model=model), num_shards=2)
    losses = [trainer.step().loss for _ in range(3)]
    assert losses[2] < losses[0]
    checkpoint = trainer.save()

    theirs, info = AfmoeForCausalLM.from_pretrained(checkpoint, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    want = theirs.generate(
        torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=12
    )
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    assert list(LLM(checkpoint).generate([PROMPT], greedy)[0].token_ids) == want[0, len(PROMPT) :].tolist()
