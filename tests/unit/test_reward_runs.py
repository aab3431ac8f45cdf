"""Runs on rewards, as `trinity rl` makes them: what counts, what is told, and the same bits after a kill."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch

from tests.unit.test_preference_runs import Told
from tests.unit.test_trainer import SMALL, all_weights
from trinity.config import Config, RLConfig, Sequences
from trinity.data.prepare import prepare
from trinity.errors import ConfigError, DataError
from trinity.pool.local import local_pool
from trinity.rl.drawing import told
from trinity.rl.kinds import check, trainer_kind
from trinity.rl.policy import SAMPLED, Judged, k3, policy_batch, surrogate
from trinity.rl.policy_trainer import group_advantages
from trinity.rl.rewards import Rewards
from trinity.rpc.messages import Load
from trinity.text.tokenizer import Tokenizer
from trinity.train.collectives import Alone
from trinity.train.loss import token_logprobs

GRADES = """
import math, os, sys, time

def early(answer, row):
    print("what a function prints is no reply")
    return sum(ord(letter) % 2 for letter in answer) / max(1, len(answer)) + row["bonus"]

def moody(answer, row):
    if answer == "slow":
        time.sleep(60)
    if answer == "gone":
        os._exit(3)
    return {"nan": math.nan, "text": "much", "raises": 1 / (answer != "raises")}.get(answer, len(answer))

number = 7
"""
ROWS = [{"prompt": f"{n}?", "bonus": n % 2} for n in range(8)]


def config_for(folder, rows=ROWS, **sections):
    Tokenizer.train(iter(["is it so? it is. no, no, really"]), SMALL["vocab_size"]).save(folder / "tokenizer")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "grades.py").write_text(GRADES)
    data = {"train": [str(folder / "rows.jsonl")], "format": "prompts", "tokenizer": str(folder / "tokenizer")}
    tree = {
        "model": {"preset": "tiny", **SMALL},
        "data": {**data, "val_fraction": 0.25},
        "train": dict(steps=4, seq_len=24, global_batch_size=8, micro_batch_size=4, eval_every=0, eval_sequences=2)
        | {"out_dir": str(folder / "run")},
        "optim": {"warmup_steps": 0, "decay": "none", "muon_lr": 1e-2, "adamw_lr": 3e-3},
        "rl": {"rewards": f"{folder}/grades.py:early", "group_size": 4, "max_tokens": 6, "mask_truncated": False}
        | {"reward_processes": 1},
        "engine": {"kv_cache_bytes": 8 << 20, "max_num_seqs": 8, "block_size": 4},
    }
    return Config.from_tree(tree).replace(**sections)


def trainer_for(config):
    pool = local_pool(config.model, Load(), num_shards=2, optim=config.optim, backend="torch")
    data = prepare(config.data, config.train, config.model, config.train.out_dir)
    trainer = trainer_kind(config)(config, pool, data, Alone())
    trainer.start()
    return trainer


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    whole, told = trainer_for(config_for(tmp_path, train={"out_dir": str(tmp_path / "whole")})), Told()
    whole.logs = [told]
    result = whole.run()
    assert math.isnan(result["val_loss"])
    [(step, loss, measures)] = told.validations
    assert (step, math.isnan(loss)) == (4, True)
    assert measures.keys() == {"reward", "length", "truncated", "unjudged"}
    first, config = told.steps[0], config_for(tmp_path)
    assert 0 <= first.measures["reward"] <= 2
    assert 1 <= first.measures["length"] <= 6
    assert first.measures["staleness"] == first.measures["staleness_max"] == first.measures["unjudged"] == 0
    assert not (tmp_path / "whole" / "rollouts").exists(), "nothing is drawn ahead"
    assert first.measures["divergence"] == pytest.approx(0, abs=1e-6), "the engine computes what the trainer does"
    assert 0 < first.measures["entropy"] <= math.log(SMALL["vocab_size"])
    assert "kl" not in first.measures
    part = trainer_for(config)
    losses = [part.step().loss for _ in range(2)]
    part.save()
    rest = trainer_for(config.replace(train={"resume": True}))
    losses += [rest.step().loss for _ in range(2)]
    assert losses == [metrics.loss for metrics in told.steps]
    mine, theirs = all_weights(rest), all_weights(whole)
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []


def test_what_does_not_count_moves_nothing(tmp_path, monkeypatch):
    trainer = trainer_for(config_for(tmp_path, rl={"mask_truncated": True}))
    prompts, first = trainer.prompts_at(0)
    samples = trainer.drawing.drawn(prompts, first)
    rewards = [1.0, None, 0.0, 0.0, 3.0, 3.0, None, 3.0]
    monkeypatch.setattr(trainer.drawing.judge.functions, "of", lambda answers, rows: rewards)
    cut = [sample.finish_reason == "length" for sample in samples]
    verdict = trainer.drawing.verdict(prompts, samples)
    judged, told_M2 = verdict.judged, told(verdict, 0, trainer.config)
    assert [each.counts for each in judged[:4]] == [not cut[0], False, not cut[2], not cut[3]]
    assert not any(each.counts for each in judged[4:]), "a group without spread says nothing"
    want = group_advantages([1.0, 0.0, 0.0], 3)
    assert [each.advantage for each in judged[:4]] == pytest.approx([want[0], 0, want[1], want[2]])
    assert told_M2[SAMPLED.index("unjudged")].tolist() == [2, 8]
    assert told_M2[SAMPLED.index("uniform")].tolist() == [1, 2]
    batch = policy_batch([Judged(samples[0], 1.0), Judged(samples[1], 1.0, counts=False)])
    assert batch.num_trained == len(samples[0].token_ids)
    assert int(batch.docs_BS.max()) == 0
    before = all_weights(trainer)
    metrics = trainer.learn_from([each._replace(counts=False) for each in judged], told_M2)
    assert metrics.loss == 0
    assert (metrics.skipped, trainer.version, trainer.position) == (1, 0, 1), "Muon would make a step of nothing"
    assert all(torch.equal(tensor, before[name]) for name, tensor in all_weights(trainer).items())
    assert metrics.measures["reward"] == pytest.approx(10 / 6)


def test_rewards_are_asked_elsewhere_and_failures_are_counted(tmp_path, caplog):
    (tmp_path / "grades.py").write_text(GRADES)
    spec = f"{tmp_path}/grades.py:moody"
    rewards = Rewards(RLConfig(rewards=spec, reward_timeout_s=2.0, reward_processes=1))
    began_s = time.monotonic()
    answers = ["four", "slow", "nan", "text", "raises", "gone", "fifth"]
    assert rewards.of(answers, [{}] * len(answers)) == [4, None, None, None, None, None, 5]
    assert time.monotonic() - began_s < 50, "nobody waits for who hangs"
    for why in (
        "took longer than 2 s",
        "returned nan, which is no finite number",
        "returned much",
        "ZeroDivisionError",
    ):
        assert why in caplog.text
    both = RLConfig(rewards=(spec, f"{tmp_path}/grades.py:early"), reward_weights=(0.5, 2.0), reward_processes=1)
    assert Rewards(both).of(["ab"], [{"bonus": 1}]) == [0.5 * 2 + 2.0 * 1.5]


@pytest.mark.parametrize(
    ("rl", "train", "says"),
    [
        ({"rewards": ()}, {}, r"rl\.rewards is empty"),
        ({"rewards": "nowhere.to.be:found"}, {}, "nowhere.to.be:found cannot be imported: ModuleNotFoundError"),
        ({"rewards": "{folder}/grades.py:number"}, {}, "number is a int, no function"),
        ({"rewards": "{folder}/grades.py:nobody"}, {}, "no attribute 'nobody'"),
        (
            {"rewards": (), "environment": "nowhere.to.be:found"},
            {},
            "environment nowhere.to.be:found cannot be imported",
        ),
        ({"group_size": 3}, {}, r"8 answers are no groups of rl\.group_size 3"),
        ({"kl": 0.1}, {}, r"rl\.kl holds to the weights of train\.init_from"),
    ],
)
def test_runs_that_could_take_no_step_are_refused(tmp_path, rl, train, says):
    if isinstance(rl.get("rewards"), str):
        rl = {"rewards": rl["rewards"].format(folder=tmp_path)}
    with pytest.raises(ConfigError, match=says):
        check(config_for(tmp_path, rl=rl, train=train))


@pytest.mark.parametrize(
    ("rl", "says"),
    [
        ({"rewards": "nothing"}, "'nothing' names no function; write module:function"),
        ({"reward_weights": (1.0, 2.0)}, "2 reward_weights for 1 rewards"),
        ({"icepop_band": (2.0, 5.0)}, "does not have 1 inside"),
        ({"teacher": "somewhere"}, "rewards, a teacher and an environment each judge"),
        ({"rewards": (), "environment": "somewhere"}, "'somewhere' names no function"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path, rl, says):
    with pytest.raises(ConfigError, match=says):
        config_for(tmp_path, rl=rl)


def test_prompts_are_texts_or_messages(tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    chat = [{"role": "user", "content": "so?"}]
    rows = [
        {"prompt": "so?", "answer": 7},
        {"messages": chat, "tools": tools},
        {"prompt": chat},
        {"prompt": "x?! " * 30},
    ]
    config = config_for(tmp_path, rows, data={"val_fraction": 0})
    config = config.replace(train={"seq_len": 60})
    data = prepare(config.data, config.train, config.model, tmp_path)
    found = {
        json.dumps(prompt.row): prompt.ids for prompt in data.train.take(data.train.sequences(Sequences.nth(0, 2)))
    }
    decode = data.tokenizer.decode
    assert data.train.num_sequences == len(found) == 2, "one leaves no room, and so does one with tools"
    assert decode(found[json.dumps(rows[2])]).endswith("so?<|im_end|>\n<|im_start|>assistant\n")
    assert found[json.dumps(rows[0])] == data.tokenizer.encode("so?", add_special=True)
    for bad, says in (
        ({"answer": 1}, "has answer; it is to have messages, or a prompt"),
        ({"messages": [*chat, {"role": "assistant", "content": "so"}]}, "ends with an answer"),
        (3, "is a int"),
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps(bad))
        with pytest.raises(DataError, match=says):
            prepare(config.data, config.train, config.model, tmp_path)


def test_corrections_weigh_tokens_as_their_papers_say():
    logprobs_T = torch.log(torch.tensor([0.1, 0.4, 0.5, 0.9])).requires_grad_()
    drawn_T, advantages_T = torch.log(torch.tensor([0.9, 0.4, 0.2, 0.1])), torch.tensor([1.0, -2.0, 1.0, -1.0])
    rho_T = torch.tensor([1 / 9, 1.0, 2.5, 9.0])
    for correction, weights_T in (
        ("tis", rho_T.clamp(max=2)),
        ("icepop", torch.tensor([0.0, 1.0, 2.5, 0.0])),
        ("clip", torch.tensor([1 / 9, 1.0, 0.0, 9.0])),  # 2.5 > 1.28 the way its advantage points; 9 is not
    ):
        loss_T, is_clipped_T = surrogate(logprobs_T - drawn_T, advantages_T, RLConfig(correction=correction))
        [grad_T] = torch.autograd.grad(loss_T.sum(), logprobs_T)
        torch.testing.assert_close(grad_T, -weights_T * advantages_T)
        assert is_clipped_T.any()
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    estimate = (p * k3(p.log(), q.log())).sum()
    torch.testing.assert_close(estimate, (p * (p / q).log()).sum())


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"divisor": "constant"},
        {"kl": 0.5},
        {"correction": "tis", "tis_cap": 1.1},
        {"ratio": "sequence", "divisor": "answers"},
    ],
    ids=str,
)
def test_the_loss_is_the_formula_token_by_token(tmp_path, how):
    """Written out from the papers, of each answer alone; the second of them does not count."""
    trainer = trainer_for(config_for(tmp_path, rl={name: value for name, value in how.items() if name != "kl"}))
    trainer.config = trainer.config.replace(rl=how)
    trainer.objective.config = trainer.config
    prompts, first = trainer.prompts_at(0)
    rng, judged, want = torch.Generator().manual_seed(3), [], 0.0
    samples = [trainer.drawing.drawn(prompts, first)[at] for at in (0, 3, 4)]
    settings = trainer.config.rl
    for sample, advantage, counts in zip(samples, (0.8, 1.0, -1.5), (True, False, True), strict=True):
        now_N = sample.logprobs_N
        drawn_N, reference_N = (now_N + 0.8 * (torch.rand(len(now_N), generator=rng) - 0.5) for _ in range(2))
        prompt = torch.zeros(len(sample.prompt_ids) - 1)
        sample = replace(sample, logprobs_N=drawn_N)
        judged.append(Judged(sample, advantage, counts, torch.cat([prompt, reference_N])))
        by_answer, share = settings.ratio == "sequence", len(now_N) if settings.divisor == "answers" else 1
        for now, drawn, reference in zip(now_N.tolist(), drawn_N.tolist(), reference_N.tolist(), strict=True):
            ratio = math.exp(float((now_N - drawn_N).mean()) if by_answer else now - drawn)
            gain = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
            gain = min(ratio, 1.1) * advantage if settings.correction == "tis" else gain
            away = math.exp(reference - now) - (reference - now) - 1
            want += (settings.kl * away - gain) * counts / share
    batch = policy_batch(judged)
    num = {"constant": 8 * settings.max_tokens, "answers": 8}.get(settings.divisor, batch.num_trained)
    trainer.dispatcher.use(0)
    [found] = trainer.objective([batch], batch.num_trained)
    assert found.ce.item() == pytest.approx(want / num, rel=1e-4, abs=1e-6)
    found.ce.backward()
    assert float(trainer.model.lm_head.weight.grad.norm()) > 0


def test_a_teacher_is_followed_where_the_student_goes(tmp_path):
    """On-policy distillation: the divergence from another model falls, and its word is log p_teacher - log p."""
    other = trainer_for(config_for(tmp_path, train={"out_dir": str(tmp_path / "other"), "seed": 5}))
    rl = {"rewards": (), "teacher": str(other.save())}
    student = trainer_for(config_for(tmp_path, rl=rl, train={"global_batch_size": 16, "micro_batch_size": 16}))
    prompts, first = student.prompts_at(0)
    verdict = student.drawing.verdict(prompts, student.drawing.drawn(prompts, first))
    judged, told_M2 = verdict.judged, told(verdict, 0, student.config)
    for sample, gain_N, counts, _ in judged[:3]:
        other.dispatcher.use(0)
        scores = token_logprobs(other.model, torch.tensor([sample.prompt_ids + sample.token_ids]))[0]
        torch.testing.assert_close(gain_N, scores[len(sample.prompt_ids) - 1 :] - sample.logprobs_N, atol=2e-5, rtol=0)
        assert counts
    gains = [student.step().measures["reward"] for _ in range(6)]
    assert gains[0] == pytest.approx(float(told_M2[0, 0] / told_M2[0, 1]))
    assert gains[-1] > gains[0]
    Tokenizer.train(iter(["other words"]), 290).save(tmp_path / "words")
    config = config_for(tmp_path, rl=rl).replace(data={"tokenizer": str(tmp_path / "words")})
    with pytest.raises(ConfigError, match="has another tokenizer than the model"):
        trainer_for(config)
