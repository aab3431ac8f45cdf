"""Losses and gradients of SFT, DPO, KTO and GRPO, against TRL's own trainers on the same tiny models in float32.

TRL is unmodified, in an environment of its own that sees ours below it: `make interop-trl` makes it, and runs this file there.
Its trainers get the batches that we make, padded as they want them; nothing is downloaded.
"""

import copy

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: make interop-trl")

from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from tests.parity.families import gradients, twin
from trinity.config import Config
from trinity.data.answers import LabelBatch
from trinity.data.chat_tokens import Example
from trinity.data.dataset import IGNORE, Batch
from trinity.rl.policy import Judged, PolicyObjective, policy_batch
from trinity.rl.preferences import LabelObjective, Pair, PairObjective, pair_batch
from trinity.rl.rollout import Sample
from trinity.text.tokenizer import Tokenizer
from trinity.train.loss import Objective

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]
MODELS = {
    "afmoe": {"preset": "tiny", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    | {"moe_intermediate_size": 16, "num_experts": 6, "pad_token_id": None},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 8,
    }
    | {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 3}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}
NUM = 4
both = pytest.mark.parametrize("family", MODELS)


def config_for(family, **sections):
    tree = {"model": {**MODELS[family], "dtype": "float32"}, "optim": {"z_loss": 0.0, "balance_loss": 0.0}}
    return Config.from_tree(tree | {"train": {"global_batch_size": NUM, "micro_batch_size": NUM}, **sections})


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    Tokenizer.train(iter(["what is it? it is so, and so on"]), 300).save(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def made(kind, settings, hf, words, tmp_path, row, **more):
    """A trainer of TRL's, as its users make one."""
    common = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    common |= {"per_device_train_batch_size": NUM, "gradient_checkpointing": False}
    data = Dataset.from_list([row] * NUM)
    trainer = kind(model=hf, args=settings(**common, **more.pop("args", {})), train_dataset=data,
                   processing_class=words, **more)  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps, trainer.aux_loss_enabled = 1, False  # the balance loss is ours to test
    return trainer


def assert_same(hf, ours, experts, theirs, mine):
    """Both losses, and the gradient of every matrix to 1e-5 of its size."""
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5, abs=5e-7)  # of terms around 1
    theirs.backward()
    mine.backward()
    found, want = gradients(hf, ours, experts)
    assert sum(float(grad.norm()) > 1e-6 for grad in want.values()) > len(want) / 2, "an empty comparison"
    largest = max(float(grad.norm()) for grad in want.values())
    for name, grad in want.items():
        gap = float((found[name] - grad).norm())
        assert gap <= 1e-5 * max(float(grad.norm()), 1e-3 * largest), (name, gap, float(grad.norm()))


def documents(seed, lengths):
    """Token ids, the first of them a prompt's, and which are trained: all of the answer, or with gaps."""
    rng = torch.Generator().manual_seed(seed)
    ids = [torch.randint(13, 290, (length,), generator=rng) for length in lengths]
    prompts = [int(torch.randint(1, length - 2, (1,), generator=rng)) for length in lengths]
    kept = []
    for each, prompt in zip(ids, prompts, strict=True):
        mask = torch.arange(len(each)) >= prompt
        if seed % 2:
            mask &= torch.rand(len(each), generator=rng) < 0.6
            mask[-1] = True
        kept.append(mask)
    return ids, kept


def padded(values, side="right"):
    width = max(map(len, values))
    rows = [torch.nn.functional.pad(v, (0, width - len(v)) if side == "right" else (width - len(v), 0)) for v in values]
    return torch.stack(rows)


def theirs_of(ids, kept):
    return {
        "input_ids": padded(ids),
        "attention_mask": padded([torch.ones_like(each) for each in ids]),
        "completion_mask": padded([mask.long() for mask in kept]),
    }


def packed_of(ids, kept):
    targets = [each[1:].where(mask[1:], IGNORE) for each, mask in zip(ids, kept, strict=True)]
    docs = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(each) - 1 for each in ids]))
    return Batch(torch.cat([each[:-1] for each in ids])[None], torch.cat(targets)[None], docs[None])


@both
@pytest.mark.parametrize("seed", [0, 1])
def test_sft(family, seed, words, tmp_path):
    config = config_for(family, data={"format": "chats"})
    hf, ours, experts = twin(config.model, seed)
    row = {"prompt": "what is it?", "completion": " it is so"}
    trainer = made(SFTTrainer, SFTConfig, hf, words, tmp_path, row)
    ids, kept = documents(seed, (9, 14, 6, 11))
    batch, inputs = packed_of(ids, kept), theirs_of(ids, kept)
    labels = inputs["input_ids"].masked_fill(inputs.pop("completion_mask") == 0, IGNORE)
    theirs = trainer.compute_loss(hf, {**inputs, "labels": labels})
    mine = Objective(ours, config)([batch], batch.num_trained)[0].ce
    assert_same(hf, ours, experts, theirs, mine)


@both
@pytest.mark.parametrize(("seed", "beta", "nll"), [(0, 0.1, 0.0), (1, 0.5, 0.0), (2, 0.1, 0.3)])
def test_dpo(family, seed, beta, nll, words, tmp_path):
    config = config_for(family, preferences={"beta": beta, "nll": nll})
    hf, ours, experts = twin(config.model, seed)
    row = {"prompt": "what is it?", "chosen": " it is so", "rejected": " no"}
    kinds = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, nll]} if nll else {}
    trainer = made(DPOTrainer, DPOConfig, hf, words, tmp_path, row, args={"beta": beta, **kinds},
                   ref_model=copy.deepcopy(hf))  # fmt: skip
    trainer.precompute_ref_logps = True
    ids, kept = documents(seed, (9, 14, 6, 11, 8, 12, 10, 7))  # chosen, then rejected
    reference = -torch.arange(30.0, 38.0)
    chosen, rejected = reference[:NUM], reference[NUM:]
    inputs = theirs_of(ids, kept) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    theirs = trainer.compute_loss(hf, inputs)
    answers = [Example(each.tolist(), mask.tolist()) for each, mask in zip(ids, kept, strict=True)]
    pairs = [Pair(answers[n], answers[NUM + n], (float(chosen[n]), float(rejected[n]))) for n in range(NUM)]
    batch = pair_batch(pairs)
    mine = PairObjective(ours, config)([batch], batch.num_trained)[0].ce
    assert_same(hf, ours, experts, theirs, mine)


@both
@pytest.mark.parametrize(("seed", "lift"), [(0, 0.0), (1, 5.0), (3, -5.0)])
def test_kto(family, seed, lift, words, tmp_path):
    """`lift` moves the divergence to either side of its bound, 0."""
    weights = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    config = config_for(family, preferences=weights)
    hf, ours, experts = twin(config.model, seed)
    row = {"prompt": "what is it?", "completion": " it is so", "label": True}
    trainer = made(KTOTrainer, KTOConfig, hf, words, tmp_path, row, args=weights, ref_model=copy.deepcopy(hf))
    trainer.precompute_ref_logps = True
    ids, kept = documents(seed, (9, 14, 6, 11))
    other_ids, other_kept = documents(seed + 10, (8, 12, 10, 7))
    is_wanted = torch.tensor([True, False, True, True])
    with torch.no_grad():
        other = packed_of(other_ids, other_kept)
        scores = LabelObjective(ours, config).scores(other)
    reference_P2 = torch.stack([-torch.arange(30.0, 34.0), scores - lift], 1)
    inputs = theirs_of(ids, kept) | {f"KL_{name}": value for name, value in theirs_of(other_ids, other_kept).items()}
    inputs |= {"label": is_wanted, "ref_logps": reference_P2[:, 0], "ref_KL_logps": reference_P2[:, 1]}
    theirs = trainer.compute_loss(hf, inputs)
    batch = LabelBatch(*packed_of(ids, kept), *other, is_wanted, reference_P2)
    [found] = LabelObjective(ours, config)([batch], batch.num_trained)
    assert float(found.measures[2, 0]) == pytest.approx(max(0.0, lift), abs=1e-4)
    assert_same(hf, ours, experts, theirs, found.ce)


GRPO = {
    "dapo": ({}, {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "dr_grpo": ({"divisor": "constant", "max_tokens": 16}, {"loss_type": "dr_grpo", "epsilon_high": 0.28}),
    "kl": ({"kl": 0.3}, {"loss_type": "dapo", "epsilon_high": 0.28, "use_bias_correction_kl": False}),
    "kl_unbiased": ({"kl": 0.3, "kl_unbiased": True}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "tis": ({"correction": "tis", "tis_cap": 1.2}, {"loss_type": "dapo"}),
    "gspo": (
        {"ratio": "sequence", "divisor": "answers", "clip_low": 0.01, "clip_high": 0.01},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    ),
    "gspo_by_tokens": (
        {"ratio": "sequence", "clip_low": 0.01, "clip_high": 0.01},
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    ),
    "tight": ({"clip_low": 0.01, "clip_high": 0.01}, {"loss_type": "dapo", "epsilon": 0.01}),
}


@both
@pytest.mark.parametrize("case", GRPO)
@pytest.mark.parametrize("seed", [0, 1])
def test_grpo(family, case, seed, words, tmp_path):
    """Samples are off by up to half a nat from what the weights say now; one of them does not count."""
    mine_how, theirs_how = GRPO[case]
    config = config_for(family, rl=mine_how)
    hf, ours, experts = twin(config.model, seed)
    args = {**theirs_how, "num_generations": NUM, "max_completion_length": 16}
    trainer = made(GRPOTrainer, GRPOConfig, hf, words, tmp_path, {"prompt": "what is it?"}, args=args,
                   reward_funcs=lambda completions, **_: [0.0] * len(completions))  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(13, 290, (n,), generator=rng) for n in (3, 5, 2, 4)]
    answers = [torch.randint(13, 290, (n,), generator=rng) for n in (6, 3, 8, 5)]
    advantages = torch.tensor([1.2, -0.7, 0.4, -0.9])
    if "gspo" in case and not seed:  # whole answers are all off to the same side
        advantages[0] = -advantages[0]
    counts = [True, True, True, bool(seed)]
    scores = scored(ours, config, prompts, answers)
    drawn = [score + (torch.rand(len(score), generator=rng) - 0.5) for score in scores]
    reference = [score + (torch.rand(len(score), generator=rng) - 0.5) for score in scores]
    mask = padded([torch.full((len(each),), kept).long() for each, kept in zip(answers, counts, strict=True)])
    inputs = {
        "prompt_ids": padded(prompts, "left"), "prompt_mask": padded([torch.ones_like(p) for p in prompts], "left"),
        "completion_ids": padded(answers), "completion_mask": padded([torch.ones_like(each) for each in answers]),
        "tool_mask": mask, "advantages": advantages, "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": padded(reference),
    }  # fmt: skip
    if case == "tis":
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        inputs["importance_sampling_ratio"] = padded(
            [(s - d).exp().clamp(max=1.2) for s, d in zip(scores, drawn, strict=True)]
        )
    else:
        inputs["old_per_token_logps"] = padded(drawn)
    trainer.beta, trainer.args.steps_per_generation = mine_how.get("kl", 0.0), 1
    theirs = trainer.compute_loss(hf, inputs)
    batch = policy_batch([
        Judged(sample_of(p, a, d), float(advantage), kept, torch.cat([torch.zeros(len(p) - 1), r]))
        for p, a, d, advantage, kept, r in zip(prompts, answers, drawn, advantages, counts, reference, strict=True)
    ])  # fmt: skip
    [found] = PolicyObjective(ours, config)([batch], batch.num_trained)
    clipped = float(found.measures[2, 0])
    assert clipped > 0, "no token is clipped: nothing is shown"
    assert_same(hf, ours, experts, theirs, found.ce)


def scored(ours, config, prompts, answers):
    """log p of each answer's tokens, now."""
    from trinity.train.loss import token_logprobs

    with torch.no_grad():
        found = [token_logprobs(ours, torch.cat(pair)[None])[0] for pair in zip(prompts, answers, strict=True)]
    return [row[len(prompt) - 1 :] for row, prompt in zip(found, prompts, strict=True)]


def sample_of(prompt, answer, drawn):
    num = len(prompt) + len(answer) - 1
    ids = tuple(prompt.tolist()), tuple(answer.tolist())
    return Sample(*ids, "", "stop", drawn, drawn, (0,) * len(answer), torch.zeros(num, 1, 1, dtype=torch.uint8))
