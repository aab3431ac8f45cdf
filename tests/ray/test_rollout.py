"""Rollouts and policy steps through shard actors give what shards in this process give."""

import uuid

import torch

from trinity.config import Config
from trinity.data.prepare import prepare
from trinity.engine.request import SamplingParams
from trinity.pool.local import local_pool
from trinity.rl.policy_trainer import PolicyTrainer
from trinity.rl.rollout import Rollout
from trinity.rpc.messages import Load
from trinity.train.collectives import Alone

SMALL = dict(vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, head_dim=8, num_experts=6)
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True, seed=5)


def rounds(config, pool, folder):
    """Two policy steps; every sample, and scores at the end."""
    trainer = PolicyTrainer(config, pool, prepare(config.data, config.train, config.model, folder), Alone())
    trainer.start()
    rollout, samples = Rollout.following(trainer), []
    for _ in range(2):
        samples += rollout.generate([[0, 65, 66], [0, 70]], PARAMS, num_samples=2)
        trainer.learn(samples[-4:], [1.0, -1.0, 0.5, -0.5])
    return samples, rollout.score([[0, 65, 66, 67]], top=3)[0]


def test_policy_steps_over_actors_equal_those_in_one_process(ray_session, tmp_path):
    from actors import pool as pools

    (tmp_path / "text.txt").write_text(" ".join(f"word{i % 37} is {i * i}" for i in range(600)))
    config = Config.from_tree(
        {
            "model": {"preset": "tiny", **SMALL},
            "data": {"train": [str(tmp_path / "text.txt")], "val_fraction": 0},
            "train": dict(steps=4, seq_len=32, global_batch_size=4, micro_batch_size=4, out_dir=str(tmp_path)),
            "placement": {"pool": f"p-{uuid.uuid4().hex[:8]}", "backend": "torch"},
            "engine": {"max_model_len": 64, "kv_cache_bytes": 8 << 20},
        }
    )
    local = local_pool(config.model, Load(), num_shards=2, optim=config.optim, backend="torch")
    want, want_score = rounds(config, local, tmp_path)
    pool = pools.create(config.placement, "trinity", config.model, config.optim, str(tmp_path / "placement"))
    try:
        got, score = rounds(config, pool, tmp_path)
        assert pool.versions() == {"shard-0": 2, "shard-1": 2}
    finally:
        pools.destroy(config.placement.pool, "trinity")
    for a, b in zip(got, want, strict=True):
        assert (a.token_ids, a.versions) == (b.token_ids, b.versions)
        assert torch.equal(a.experts_TLK, b.experts_TLK)
        torch.testing.assert_close(a.logprobs_N, b.logprobs_N, atol=1e-5, rtol=0)
    assert {version for sample in got for version in sample.versions} == {0, 1}
    assert score.version == want_score.version == 2
    torch.testing.assert_close(score.logprobs_T, want_score.logprobs_T, atol=1e-5, rtol=0)
