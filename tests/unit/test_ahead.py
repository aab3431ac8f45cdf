"""Answers drawn ahead of the steps that learn from them: from which weights, how old, and the same bits after a kill."""

import json
import threading

import pytest
import torch

from tests.unit.test_preference_runs import Told
from tests.unit.test_reward_runs import config_for, trainer_for
from tests.unit.test_trainer import all_weights
from trinity.checkpoint import step_path
from trinity.data.prepare import prepare
from trinity.errors import VersionGone
from trinity.llm import LLM
from trinity.pool.local import local_pool
from trinity.rl.ahead import Ahead
from trinity.rl.judges import Verdict
from trinity.rl.kept_answers import KeptAnswers
from trinity.rl.kinds import trainer_kind
from trinity.rl.policy import Judged
from trinity.rl.rollout import Rollout, Sample
from trinity.rpc.messages import Load
from trinity.state.versioned_store import Store
from trinity.train.collectives import Alone

STEPS = 5


def ahead_of(folder, out, bound, **train):
    sizes = {"out_dir": str(folder / out), "steps": STEPS, "keep_checkpoints": 10}
    return config_for(folder, train={**sizes, **train}, rl={"max_staleness": bound})


def told_by(trainer):
    trainer.logs = [told := Told()]
    trainer.learned = []
    learn = trainer.learn_from
    trainer.learn_from = lambda judged, told_M2: [trainer.learned.append(judged), learn(judged, told_M2)][1]
    return told


def same_weights(one, other):
    mine, theirs = all_weights(one), all_weights(other)
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """-> (folder, bound, its trainer after a whole run, what it told)."""
    folder, bound = tmp_path_factory.mktemp("ahead"), 2
    trainer = trainer_for(ahead_of(folder, "whole", bound, save_every=1, eval_every=3))
    told = told_by(trainer)
    trainer.run()
    return folder, bound, trainer, told


def test_answers_come_from_the_weights_so_many_steps_before(whole):
    _, bound, trainer, told = whole
    ages = [metrics.measures["staleness"] for metrics in told.steps]
    assert ages == [metrics.measures["staleness_max"] for metrics in told.steps]
    assert ages == [min(position, bound) for position in range(STEPS)]
    assert [step for step, _, _ in told.validations] == [3, STEPS]
    assert all(0 <= metrics.measures["divergence"] < 1 for metrics in told.steps)
    assert told.steps[0].measures["divergence"] == pytest.approx(0, abs=1e-6)
    assert told.steps[-1].measures["divergence"] > 1e-6, "the sampler's log-probabilities, not the trainer's"
    for position in (STEPS - 1,):
        checkpoint = step_path(trainer.config.train.out_dir, position - bound)
        stored = Rollout(LLM(checkpoint, engine=trainer._engine(), device="cpu", backend="torch"))
        prompts, first = trainer.prompts_at(position)
        group = trainer.config.rl.group_size
        params = [trainer.drawing.params(first + at * group, 0, len(each.ids), {}) for at, each in enumerate(prompts)]
        want = stored.generate([each.ids for each in prompts], params, group)
        got = [each.sample for each in trainer.learned[position]]
        assert [each.token_ids for each in got] == [each.token_ids for each in want]
        assert {version for each in got for version in each.versions} == {position - bound}
    assert not any(trainer.backbone.store.versions.keys() - {STEPS, STEPS - 1, STEPS - 2})


def test_a_killed_run_learns_from_the_same_answers(whole):
    folder, bound, before, told = whole
    at = 2
    part = trainer_for(ahead_of(folder, f"part-{at}", bound))
    losses = [part.step().loss for _ in range(at)]
    part.save()
    [part.step() for _ in range(1)]  # what it did after its checkpoint is nobody's
    rest = trainer_for(ahead_of(folder, f"part-{at}", bound, resume=True))
    kept = sorted(path.name for path in rest.ahead._kept.folder.glob("*.npz"))
    assert kept[0] == f"{at:06d}.0of1.npz"
    losses += [rest.step().loss for _ in range(STEPS - at)]
    assert losses == [metrics.loss for metrics in told.steps]
    assert same_weights(rest, before)


def test_who_goes_on_from_a_decision_draws_what_was_promised(whole, caplog):
    """A worker dies with answers under way; its successor finds backbone, shards, and the older version that was promised."""
    folder, bound, before, told = whole
    config = ahead_of(folder, "decided", bound)
    pool = local_pool(config.model, Load(), num_shards=2, optim=config.optim, backend="torch")
    data = prepare(config.data, config.train, config.model, config.train.out_dir)

    def worker(name):
        return trainer_kind(config)(config, pool, data, Alone(), store=Store(folder / name))

    first = worker("backbone")
    first.start()
    losses = [first.step().loss for _ in range(3)]
    last = first.ahead._kept._file(2 + bound)
    first.ahead.drain(first.version)
    last.unlink()  # of which the promise alone is left
    attempt = first.backbone.store.current.notes["attempt"]
    decision = {"job": "", "run": first.identity.run, "order": first.identity.order, "attempt": attempt}
    decision |= {"position": 3, "num_skipped": 0}
    first.backbone.store._lock.close()  # its process is dead
    pool.ledger.decided = lambda: type("Decision", (), {"version": 3, "notes": decision})
    second = worker("backbone")
    second.start()
    assert second.position == 3
    losses += [second.step().loss for _ in range(STEPS - 3)]
    assert losses == [metrics.loss for metrics in told.steps]
    assert same_weights(second, before)
    assert "no answers are left" not in caplog.text


# -- the parts


class Weights:
    """PinnedWeights of nobody."""

    def __init__(self, *there):
        self.there, self.aimed = set(there), []

    def has(self, version):
        return version in self.there

    def aim(self, version):
        if version not in self.there:
            raise VersionGone(f"version {version} is gone")
        self.aimed.append(version)


def verdict(reward=1.0):
    sample = Sample(
        (1, 2), (3, 4), "", "stop", *torch.tensor([[-0.5, -1.5], [-0.25, -1.0]]), (7, 7), torch.ones(3, 2, 2).byte()
    )
    judged = [Judged(sample, 0.1), Judged(sample, torch.tensor([0.5, -0.5]), False, torch.tensor([0.0, -1.0, -2.0]))]
    return Verdict(judged, [reward, None], 1)


def kept_in(folder, facts="facts", rank=0, world=1):
    return KeptAnswers(folder / "rollouts", facts, rank, world)


def test_kept_answers_are_what_was_judged(tmp_path):
    kept, given = kept_in(tmp_path), verdict()
    kept.promise({5: 4}, anew=5)
    assert kept.read(5) is None
    kept.write(5, 4, given)
    version, found = kept.read(5)
    assert (version, found.rewards, found.num_uniform, kept.promised()) == (4, [1.0, None], 1, {5: 4})
    for mine, theirs in zip(found.judged, given.judged, strict=True):
        for name in ("prompt_ids", "token_ids", "versions", "finish_reason", "num_turns"):
            assert getattr(mine.sample, name) == getattr(theirs.sample, name)
        for name in ("logprobs_N", "drawn_N", "experts_TLK"):
            assert torch.equal(getattr(mine.sample, name), getattr(theirs.sample, name))
        assert torch.equal(torch.as_tensor(mine.advantage), torch.as_tensor(theirs.advantage))
        assert mine.counts == theirs.counts
    assert torch.equal(found.judged[1].reference_T, given.judged[1].reference_T)
    for other in (kept_in(tmp_path, "other settings"), kept_in(tmp_path, world=2)):
        assert other.read(5) is None
    whole = kept._file(5).read_bytes()
    kept._file(5).write_bytes(whole[:-8])
    assert kept.read(5) is None, "cut off"
    kept.write(5, 4, given)
    kept.prune({4, 6})
    assert kept.read(5) is None
    (kept.folder / "promised.json").write_text("{")
    assert kept.promised() == {}


def test_a_full_disk_costs_no_answer(tmp_path, caplog):
    kept = kept_in(tmp_path)
    kept.folder.write_text("no folder")  # stands for a disk that takes nothing
    kept.write(3, 3, verdict())
    assert "the answers of step 4 are in memory alone" in caplog.text


def test_a_version_is_drawn_from_in_time_and_kept_until_then(tmp_path):
    """Steps take their answers while later ones are under way: nobody waits for what is not needed yet."""
    weights, may_go, drawn = Weights(*range(9)), threading.Semaphore(0), []

    def draw(position):
        may_go.acquire()
        drawn.append((position, weights.aimed[-1]))
        return verdict(float(position))

    ahead = Ahead(draw, weights, kept_in(tmp_path), 2, 4)
    may_go.release()
    assert ahead.next(0, 0, []).rewards[0] == 0.0
    assert ahead.versions == (0,)
    may_go.release()
    ahead.settle(1, 0)
    assert ahead.next(1, 1, [0]).rewards[0] == 1.0
    assert ahead.versions == (0, 1), "the step that begins with version 0 is drawn from it, and is not drawn yet"
    may_go.release(2)
    ahead.drain(1)
    assert json.loads((tmp_path / "rollouts" / "promised.json").read_text()) == {"1": 0, "2": 0, "3": 1}
    assert [ahead.next(at, at, [0]).rewards[0] for at in (2, 3)] == [2.0, 3.0]
    assert (ahead.versions, drawn) == ((), [(0, 0), (1, 0), (2, 0), (3, 1)]), "none beyond the last step"
    names = {path.name for path in (tmp_path / "rollouts").glob("*.npz")}
    assert names == {f"{at:06d}.0of1.npz" for at in range(4)}, "position 0 may be gone on from"


def test_answers_whose_weights_are_gone_come_from_the_present_ones(tmp_path, caplog):
    weights = Weights(3)
    kept = kept_in(tmp_path)
    kept.promise({3: 2, 4: 2}, anew=3)
    ahead = Ahead(lambda position: verdict(float(position)), weights, kept, 2, 9)
    ahead.restore(3)
    assert "no answers are left for step 4" in caplog.text
    assert ahead.next(3, 3, []).rewards[0] == 3.0
    weights.there = {4}  # a shard moved, and left the version behind
    ahead.next(4, 4, [])
    ahead._begin(7, 3)
    ahead.drain(4)
    assert "answers of step 8 come from version 4: version 3 is gone" in caplog.text
