"""Unusual architectures, trained here through two shards: transformers loads the checkpoint and continues alike."""

import pytest
import torch
from transformers import AfmoeForCausalLM

from tests.unit.test_trainer import config_for, trainer_for
from trinity import LLM
from trinity.checkpoint import open_checkpoint
from trinity.checkpoint.rewrite import rewrite
from trinity.engine.request import SamplingParams
from trinity.train.loss import token_logprobs

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


def texts_in(folder):
    for n in range(12):
        (folder / f"{n}.txt").write_text(" ".join(f"word{(n * i) % 37} is {i * n}" for i in range(300)))
    return folder


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_trained_checkpoints_go_on_alike_in_transformers(tmp_path, model):
    trainer = trainer_for(config_for(texts_in(tmp_path), tmp_path / "run").replace(model=model), num_shards=2)
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


def test_an_adapter_merged_is_the_same_model_in_transformers_and_served_as_it_is(tmp_path):
    base = trainer_for(config_for(texts_in(tmp_path), tmp_path / "base"))
    optim = {"lora": {"rank": 4}, "adamw_lr": 3e-2, "warmup_steps": 0}
    train = {"out_dir": str(tmp_path / "run"), "init_from": str(base.save())}
    trainer = trainer_for(base.config.replace(train=train, optim=optim), num_shards=2)
    for _ in range(3):
        trainer.step()
    adapter = trainer.save()
    rewrite(open_checkpoint(adapter), tmp_path / "merged")

    theirs = AfmoeForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids_BS = torch.tensor([PROMPT])
    trainer.dispatcher.use(trainer.version)
    mine = token_logprobs(trainer.model, ids_BS)
    want = theirs(ids_BS).logits[:, :-1].log_softmax(-1).gather(-1, ids_BS[:, 1:, None])[..., 0]
    torch.testing.assert_close(mine, want.detach(), atol=1e-4, rtol=0)
    tokens = theirs.generate(ids_BS, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=12)
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    assert list(LLM(adapter).generate([PROMPT], greedy)[0].token_ids) == tokens[0, len(PROMPT) :].tolist()
    logged = greedy.model_copy(update={"logprobs": 1})
    folders = adapter, tmp_path / "merged"
    said = [LLM(each, weight_dtype="int8").generate([PROMPT], logged)[0].logprobs for each in folders]
    assert said[0] == said[1], "rounded once, with the adapter in"
