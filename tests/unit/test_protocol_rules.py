"""Rules that the small model of the control protocol found missing, each alone; and that a trainer says what the model says."""

import threading
from collections import Counter

import pytest

from actors.control.ledger import Ledger
from tests.unit.protocol_parts import LAYER, Call, ShardState, batch_of, real_parts
from tests.unit.test_trainer import config_for, texts, trainer_for  # noqa: F401
from trinity.errors import StepConflict, Superseded
from trinity.experts.grad_accumulator import GradAccumulator
from trinity.pool.ledger import Decision
from trinity.rpc.messages import Prepare
from trinity.train import trainer as module


def test_nobody_begins_an_attempt_on_a_version_before_the_last_decided_one(tmp_path):
    """Shards would let go of the decided version that they have staged."""
    ledger = Ledger(tmp_path, threading.Condition())
    before = ledger.new_attempt(0)  # nothing is decided yet
    ledger.begin(3, {})
    with pytest.raises(StepConflict, match="was given up"):
        ledger.decide(4, before, {})
    attempt = ledger.new_attempt(3)
    ledger.decide(4, attempt, {})
    with pytest.raises(Superseded, match="version 4 is the last that was decided; nobody goes on from 3"):
        ledger.new_attempt(3)
    assert ledger.new_attempt(4) > attempt


def test_a_step_is_made_of_the_ops_that_were_sent_or_not_at_all(tmp_path):
    """Experts came in between, so that the gradients were void, and a late message prepared what was left: nothing."""
    with real_parts(tmp_path) as parts:
        state = parts.restarted("a", ShardState(), (0,), (0, 0))
        peer = parts.restarted("b", ShardState(), (1,), (0, 0))
        prepare, stage = Call("prepare", 1, 1), Call("stage", 1, 1, num_ops=1)
        state, _, _ = parts.obey("a", Call("backward", 1, 1, 1, batch_of((0,))), state)
        state, answer, _ = parts.obey("a", prepare, state)
        assert answer.value == 1
        ready = state
        copy = Call("copy", 0, epoch=2, experts=(1,), source="b")
        state, _, _ = parts.obey("a", copy, state, (("b", peer),))
        state, answer, _ = parts.obey("a", prepare, state)
        assert answer.value == 0
        assert parts.obey("a", stage, state)[1].error == "StepConflict"
        assert parts.obey("a", stage, ready)[1].value is True


def test_a_shard_that_still_lacks_a_shared_expert_has_the_step_wait():
    gathered = GradAccumulator("a", 1, True)
    message = Prepare(1, 1, {LAYER: {1: ("a", "b")}})
    with pytest.raises(StepConflict, match=rf"shard a does not hold expert \({LAYER}, 1\) yet"):
        gathered.share(message, {LAYER: (0,)}, peers=object())


def decided_meanwhile(trainer, *versions):
    """The pool, which names these versions one after the other, and cannot commit any but the last."""
    said, pool, backbone = list(versions), trainer.pool, trainer.backbone.store.current
    notes = {**trainer.identity.notes(module.RunCounts(), 0), "attempt": None}
    pool.decided = lambda: Decision(said.pop(0) if len(said) > 1 else said[0], notes)
    pool.backbone = lambda version: module.replace(backbone, number=version)

    def commit(version):
        if version != versions[-1]:
            raise StepConflict(f"a newer version than {version}")
        return version

    pool.commit = commit


def test_who_takes_over_while_the_one_before_decides_goes_on_from_that(texts, tmp_path):  # noqa: F811
    trainer = trainer_for(config_for(texts, tmp_path))
    decided_meanwhile(trainer, 1, 2)
    assert trainer.recovery._decided_version().number == 2
    decided_meanwhile(trainer, 1, 1, 0)
    trainer.backbone.store.clear = None
    assert trainer.recovery._decided_version() is None, "no newer one: a checkpoint must do"


def test_a_trainer_says_what_the_models_does_in_that_order(texts, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    trainer, said = trainer_for(config_for(texts, tmp_path), num_shards=2), []
    pool, ledger = trainer.pool, trainer.pool.ledger
    counts = Counter()

    def noted(name, call):
        def made(*arguments):
            verb = arguments[1] if name == "send" else name
            if said[-1:] != [verb]:
                said.append(verb)
            counts[verb] += 1
            if verb == "prepare" and counts[verb] == 1:
                raise StepConflict("once")
            return call(*arguments)

        return made

    for owner, name in ((pool.transport, "send"), (ledger, "begin_attempt"), (ledger, "decide")):
        setattr(owner, name, noted(name, getattr(owner, name)))
    trainer.step()
    rows = [verb for verb in said if verb in ("infer", "backward")]
    assert set(rows) == {"infer", "backward"}
    others = [verb for verb in said if verb not in rows]
    assert others == ["begin_attempt", "prepare", "begin_attempt", "prepare", "stage", "decide", "commit"]
