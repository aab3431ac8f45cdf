"""Rollouts against a direct forward of the same weights, and policy steps on the pool that they sample from."""

import importlib.util
import math
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from trinity.config import Config, EngineConfig, RLConfig, merge
from trinity.data.prepare import prepare
from trinity.engine.request import SamplingParams
from trinity.errors import InvalidRequest, PromptTooLong
from trinity.llm import LLM
from trinity.models.common.attention import PackedAttention, packed_positions
from trinity.pool.local import local_pool
from trinity.rl.policy import Judged, policy_batch, replayed, surrogate
from trinity.rl.policy_trainer import PolicyTrainer, group_advantages
from trinity.rl.rollout import Rollout
from trinity.rpc.messages import Load
from trinity.train.collectives import Alone
from trinity.train.loss import packed_inputs, target_logprobs

SMALL = dict(vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, head_dim=8, num_experts=6)
ENGINE = EngineConfig(max_model_len=128, block_size=4, kv_cache_bytes=8 << 20, max_num_seqs=8)
PROMPTS = [[0, 65, 66, 67], [0, 70], [0, *range(50, 75)]]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, seed=3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"word{i % 37} is {i * i}" for i in range(600)))
    return file


def trainer_for(texts, out_dir, dtype="float32", batch=6, micro=2, adamw_lr=3e-3, **policy):
    config = Config.from_tree(
        {
            "model": {"preset": "tiny", **SMALL, "dtype": dtype},
            "data": {"train": [str(texts)], "val_fraction": 0},
            "train": dict(steps=20, seq_len=32, global_batch_size=batch, micro_batch_size=micro, out_dir=str(out_dir)),
            "optim": {"warmup_steps": 0, "balance_loss": 1e-2, "muon_lr": 2e-2, "adamw_lr": adamw_lr},
            "rl": policy,
        }
    )
    pool = local_pool(config.model, Load(), num_shards=2, optim=config.optim, backend="torch")
    data = prepare(config.data, config.train, config.model, out_dir)
    trainer = PolicyTrainer(config, pool, data, Alone())
    trainer.start()
    return trainer


@pytest.fixture
def trainer(texts, tmp_path):
    trainer = trainer_for(texts, tmp_path)
    for bias in trainer.model.expert_bias.values():  # so that choices are not those of the scores alone
        bias.copy_(torch.linspace(-0.05, 0.05, len(bias)))
    return trainer


@torch.no_grad()
def direct(trainer, ids):
    """log-probabilities [T, V] and experts [T, L, K] of a whole sequence: one forward pass without the engine."""
    trainer.dispatcher.use(trainer.version)
    attend = PackedAttention(trainer.config.model, None, 1, len(ids) - 1)
    out = trainer.model(torch.tensor(ids[:-1]), packed_positions(1, len(ids) - 1), attend)
    logprobs_TV = trainer.model.logits(out.hidden_TD).log_softmax(-1)
    return logprobs_TV, torch.stack([routing.ids_TK for routing in out.routing], 1)


def assert_is_direct(trainer, sample):
    ids = sample.prompt_ids + sample.token_ids
    logprobs_TV, experts_TLK = direct(trainer, ids)
    want_N = logprobs_TV[len(sample.prompt_ids) - 1 :].gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(sample.logprobs_N, want_N, atol=2e-5, rtol=0)
    assert sample.experts_TLK.dtype == torch.uint8
    assert torch.equal(sample.experts_TLK.long(), experts_TLK)


def test_samples_carry_what_a_direct_forward_gives(trainer):
    samples = Rollout.following(trainer, ENGINE).generate(PROMPTS, PARAMS, num_samples=2)
    assert [s.prompt_ids for s in samples] == [tuple(p) for p in PROMPTS for _ in range(2)]
    assert len({s.token_ids for s in samples}) == 6  # the answers to one prompt have seeds of their own
    for sample in samples:
        assert_is_direct(trainer, sample)
        torch.testing.assert_close(sample.drawn_N, sample.logprobs_N, atol=1e-5, rtol=0)
        assert (sample.versions, sample.finish_reason) == ((0,) * 12, "length")
        assert sample.text == trainer.data.tokenizer.decode(sample.token_ids, skip_special=True)


def test_chunked_prefill_parts_and_preemption_leave_the_experts_in_place(trainer):
    want = Rollout.following(trainer, ENGINE).generate(PROMPTS * 2, PARAMS)
    scarce = dict(max_model_len=40, kv_cache_bytes=1 << 15, max_num_batched_tokens=7)  # room for one of the longest
    tight = ENGINE.model_copy(update=dict(**scarce, num_overlapped_microbatches=2, min_part_tokens=2))
    rollout = Rollout.following(trainer, tight)
    got = rollout.generate(PROMPTS * 2, PARAMS)
    assert rollout.llm.engine.stats().num_preemptions > 0
    for a, b in zip(got, want, strict=True):
        assert a.token_ids == b.token_ids
        assert_is_direct(trainer, a)


def test_drawn_log_probabilities_are_those_after_temperature_and_filters(trainer):
    rollout = Rollout.following(trainer, ENGINE)
    params = [PARAMS.model_copy(update=how) for how in (dict(temperature=0.5, top_k=5), dict(temperature=0.0))]
    warm, greedy = rollout.generate([[0, 65, 66]] * 2, params)
    logprobs_TV, _ = direct(trainer, warm.prompt_ids + warm.token_ids)
    best = (logprobs_TV[2:] / 0.5).topk(5)
    place_N1 = (best.indices == torch.tensor(warm.token_ids)[:, None]).nonzero()[:, 1:]
    torch.testing.assert_close(warm.drawn_N, best.values.log_softmax(-1).gather(1, place_N1)[:, 0], atol=1e-4, rtol=0)
    assert not greedy.drawn_N.any()
    assert (greedy.logprobs_N < 0).all()


def test_requests_that_are_not_traced_carry_nothing(trainer):
    engine = Rollout.following(trainer, ENGINE).llm.engine
    engine.add("plain", [0, 65], SamplingParams(max_tokens=2, ignore_eos=True, logprobs=0))
    engine.add("traced", [0, 65], SamplingParams(max_tokens=2, ignore_eos=True, trace=True))
    last = {}
    while engine.has_work:
        last |= {delta.request_id: delta for delta in engine.step()}
    assert last["plain"].experts_TLK is None
    assert last["plain"].logprobs[0].drawn is None
    assert last["traced"].experts_TLK.shape == (3, 3, 2)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_step_is_what_the_next_rollout_uses(texts, tmp_path, dtype, atol):
    trainer = trainer_for(texts, tmp_path, dtype=dtype, replay=True)
    rollout = Rollout.following(trainer, ENGINE)
    before = rollout.generate(PROMPTS, PARAMS, num_samples=2)
    trainer.step()
    after = rollout.generate(PROMPTS, PARAMS, num_samples=2)
    assert rollout.version == trainer.version == 1
    assert {s.versions for s in after} == {(1,) * 12}
    assert max(float((a.logprobs_N - b.logprobs_N).abs().max()) for a, b in zip(after, before, strict=True)) > 1e-3
    trainer.learn(after, [1.0, -1.0] * 3)
    third = rollout.generate(PROMPTS, PARAMS, num_samples=2)
    assert {s.versions for s in third} == {(2,) * 12}
    trainer.dispatcher.use(2)
    for sample in third:  # the trainer's ratio p / p_drawn is 1: both compute with the same weights, of the same type
        batch = policy_batch([Judged(sample, 1.0)])
        with torch.no_grad():
            assert float(trainer.objective([batch], batch.num_trained)[0].ce) == pytest.approx(-1, abs=atol)
        if dtype == "float32":
            assert_is_direct(trainer, sample)


def test_scores_are_the_trainers_log_probabilities(trainer):
    rollout = Rollout.following(trainer, ENGINE.model_copy(update=dict(max_num_batched_tokens=30)))
    sequences = [[0, 65, 66], list(range(100, 160)), [0, 9], [7, 8, 9, 10]]
    scores = rollout.score(sequences, top=4)
    assert [s.token_ids for s in scores] == [tuple(ids) for ids in sequences]
    for ids, score in zip(sequences, scores, strict=True):
        logprobs_TV, experts_TLK = direct(trainer, ids)
        want_T = logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(score.logprobs_T, want_T, atol=2e-5, rtol=0)
        torch.testing.assert_close(score.top_logprobs_TC, logprobs_TV.topk(4).values, atol=2e-5, rtol=0)
        torch.testing.assert_close(logprobs_TV.gather(1, score.top_ids_TC), score.top_logprobs_TC, atol=2e-5, rtol=0)
        assert torch.equal(score.experts_TLK.long(), experts_TLK)
    trainer.step()
    again = rollout.score(sequences[:1])[0]
    assert (again.version, again.top_ids_TC.shape) == (1, (2, 0))
    assert float((again.logprobs_T - scores[0].logprobs_T).abs().max()) > 1e-3


def test_a_checkpoint_and_its_live_trainer_give_the_same(trainer):
    trainer.step()
    live, stored = Rollout.following(trainer, ENGINE), Rollout(LLM(trainer.save(), engine=ENGINE, backend="torch"))
    assert live.version == stored.version == 1
    for a, b in zip(live.generate(PROMPTS, PARAMS), stored.generate(PROMPTS, PARAMS), strict=True):
        assert (a.token_ids, a.versions) == (b.token_ids, b.versions)
        assert torch.equal(a.experts_TLK, b.experts_TLK)
    a, b = (rollout.score([[0, 65, 66, 67]], top=3)[0] for rollout in (live, stored))
    torch.testing.assert_close(a.top_logprobs_TC, b.top_logprobs_TC, atol=1e-5, rtol=0)


def test_bad_scores_and_samples_are_refused_before_anything_runs(trainer):
    rollout = Rollout.following(trainer, ENGINE)
    for bad, error in (
        ([], InvalidRequest),
        ([5], InvalidRequest),
        ([5, 300], InvalidRequest),
        ([5] * 130, PromptTooLong),
    ):
        with pytest.raises(error):
            rollout.score([[1, 2], bad])
    assert len(rollout.score([[5] * 128])[0].logprobs_T) == 127
    with pytest.raises(InvalidRequest, match="top is 301"):
        rollout.score([[1, 2]], top=301)
    with pytest.raises(InvalidRequest, match="2 sampling parameters for 3 prompts"):
        rollout.generate(PROMPTS, [PARAMS] * 2)
    with pytest.raises(InvalidRequest, match="3 samples and 3 advantages for a step of 6"):
        trainer.learn(rollout.generate(PROMPTS, PARAMS), [1.0] * 3)
    assert trainer.version == 0


def test_a_policy_step_follows_the_gradient_of_reinforce(texts, tmp_path):
    """On samples of the present weights: the gradient of -mean(advantage * log p) over all generated tokens."""
    trainer = trainer_for(texts, tmp_path)
    samples = Rollout.following(trainer, ENGINE).generate(PROMPTS, PARAMS, num_samples=2)
    advantages = [0.5, -1.0, 2.0, 0.0, -0.25, 1.0]
    trainer.config = trainer.config.replace(optim={"balance_loss": 0.0})
    trainer.objective.config = trainer.config
    grads = {}
    trainer._stage = lambda *_: bool(
        grads.update({n: g.clone() for n, g in trainer._grads().items()})
    )  # the step is skipped
    trainer.learn(samples, advantages)
    trainer, loss = trainer_for(texts, tmp_path), torch.zeros(())  # the same weights, on shards that have seen no step
    trainer.dispatcher.use(0)
    for sample, advantage in zip(samples, advantages, strict=True):
        ids = sample.prompt_ids + sample.token_ids
        attend = PackedAttention(trainer.config.model, None, 1, len(ids) - 1)
        out = trainer.model(torch.tensor(ids[:-1]), packed_positions(1, len(ids) - 1), attend)
        answer_NV = trainer.model.logits(out.hidden_TD)[len(sample.prompt_ids) - 1 :]
        loss = loss + advantage * F.cross_entropy(answer_NV, torch.tensor(sample.token_ids), reduction="sum")
    (loss / (12 * len(samples))).backward()
    for name, parameter in trainer.model.weights().items():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_learning_makes_rewarded_tokens_likelier(texts, tmp_path):
    trainer = trainer_for(texts, tmp_path, batch=64, micro=64, adamw_lr=3e-2)
    rollout = Rollout.following(trainer, ENGINE.model_copy(update=dict(max_num_seqs=64)))
    shares = []
    for step in range(8):
        params = SamplingParams(max_tokens=1, ignore_eos=True, seed=64 * step)
        samples = rollout.generate([[0, 65]], params, num_samples=64)
        rewards = [float(sample.token_ids[0] < 150) for sample in samples]
        shares.append(sum(rewards) / 64)
        trainer.learn(samples, group_advantages(rewards, 64))
    assert shares[0] < 0.7 < 0.9 < shares[-1], shares


def test_replayed_routing_is_the_engines_whatever_the_router_would_choose(texts, tmp_path):
    trainer = trainer_for(texts, tmp_path, replay=True)
    samples = Rollout.following(trainer, ENGINE).generate(PROMPTS, PARAMS)
    halves = [policy_batch([Judged(sample, 1.0) for sample in part]) for part in (samples[:2], samples[2:])]
    for bias in trainer.model.expert_bias.values():
        bias.copy_(torch.tensor([9.0, 9.0, 0, 0, 0, 0]))  # now every token would go to the first two
    trainer.dispatcher.use(0)
    inputs = [packed_inputs(trainer.config.model, half.ids_BS, half.docs_BS) for half in halves]
    with replayed(trainer.model, [half.experts_BSLK[0] for half in halves]):
        outs = trainer.model.forward_all(inputs)
    for half, out in zip(halves, outs, strict=True):
        assert torch.equal(torch.stack([r.ids_TK for r in out.routing], 1), half.experts_BSLK[0].long())
        logprobs_T = target_logprobs(trainer.model.lm_head.weight, out.hidden_TD, half.targets_BS[0], True, chunk=5)
        drawn_T = half.counts_BS[0]
        torch.testing.assert_close(logprobs_T[drawn_T], half.logprobs_BS[0][drawn_T], atol=2e-5, rtol=0)
    assert all(set(r.ids_TK.unique().tolist()) == {0, 1} for r in trainer.model.forward_all(inputs)[0].routing)
    counts_LE = sum(losses.counts_LE for losses in trainer.objective(halves, 1))
    assert counts_LE[:, 2:].sum() > 0
    trainer.objective.config = trainer.config.replace(rl={"replay": False})
    assert not sum(losses.counts_LE for losses in trainer.objective(halves, 1))[:, 2:].any()


def test_the_surrogate_is_clipped_the_way_its_weight_points():
    new_T = torch.tensor([0.0, math.log(2), math.log(2), math.log(0.5), math.log(0.5), 5.0], requires_grad=True)
    weights_T = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 0.0])
    loss_T, is_clipped_T = surrogate(new_T, weights_T, RLConfig(clip_high=0.2))
    assert is_clipped_T.tolist() == [False, True, False, False, True, False]
    loss = loss_T.sum()
    assert loss.item() == pytest.approx(-(1 + 1.2 - 2 + 0.5 - 0.8))
    loss.backward()
    torch.testing.assert_close(new_T.grad, -torch.tensor([1.0, 0.0, -2.0, 0.5, 0.0, 0.0]))


def test_advantages_are_relative_to_the_group():
    assert group_advantages([1, 1, 0, 0, 5, 5, 5, 5], 4) == pytest.approx([1, 1, -1, -1, 0, 0, 0, 0], abs=1e-4)
    with pytest.raises(InvalidRequest, match="3 rewards"):
        group_advantages([1, 2, 3], 2)


@pytest.fixture(scope="module")
def example():
    file = Path(__file__).parents[2] / "examples" / "balanced_brackets.py"
    spec = importlib.util.spec_from_file_location("balanced_brackets", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_examples_reward_is_for_balanced_lines_alone(example):
    for line in ("()", "([{}])", "()[]{}", "{[()()]}", ""):
        assert example.reward(line) == 1.0, line
    for line in ("(", ")", "(]", "([)]", "())", "(()", "() ", "(a)"):
        assert example.reward(line) == 0.0, line
    rng = random.Random(0)
    assert all(example.reward("".join(example.brackets(rng))) for _ in range(200))
    spoilt = [example.reward("".join(example.brackets(rng, share_random=0.4))) for _ in range(400)]
    assert 0.3 < sum(spoilt) / 400 < 0.7


def test_the_example_runs(example, tmp_path):
    own = {"data": {"train": [str(tmp_path / "lines.jsonl")]}, "train": {"steps": 2, "out_dir": str(tmp_path)}}
    small = {"train": {"global_batch_size": 8, "micro_batch_size": 8}, "model": {"vocab_size": 269}}
    config = Config.from_tree(merge(merge(example.TREE, small), own))
    with pytest.MonkeyPatch.context() as patch, example.pool_of(config, in_ray=False) as pool:
        patch.setattr(example, "NUM_PROMPTS", 2)
        patch.setattr(example, "GROUP", 4)
        rewards = example.run(config, pool, num_steps=2)
        assert pool.versions() == {"shard-0": 4}
    assert len(rewards) == 2
    assert all(0 <= mean <= 1 and (8 * mean).is_integer() for mean in rewards)
