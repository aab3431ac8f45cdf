"""Parameter groups: who updates what, at which rate, with which state."""

import pytest
import torch

from tests.unit.test_trainer import all_weights, config_for, trainer_for
from trinity.checkpoint import open_checkpoint
from trinity.config import Config, OptimConfig
from trinity.optim.base import WEIGHT, Matrix
from trinity.optim.muon import lr_scale
from trinity.optim.optimizer import RULES, Optimizer, groups, peak_lrs
from trinity.optim.schedule import learning_rates, lr_factor

MUON, ADAMW = OptimConfig(), OptimConfig(matrices="adamw")


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(2, 6, 4).to(dtype),
        "head": torch.randn(8, 4).to(dtype),
        "gain": torch.ones(4, dtype=dtype),
    }


def optimizer(config, params):
    return Optimizer(params, {"matrix": Matrix(6, 4)}, config)


def grads():
    torch.manual_seed(1)
    return {name: torch.randn_like(p) for name, p in tensors().items()}


def test_groups_come_from_the_settings_and_each_has_its_rule_and_rate():
    assert groups(MUON) == ("muon", "adamw")
    assert groups(ADAMW) == ("adamw",)
    assert peak_lrs(MUON) == {"muon": MUON.muon_lr, "adamw": MUON.adamw_lr}
    assert peak_lrs(ADAMW) == {"adamw": ADAMW.adamw_lr}
    choices = OptimConfig.model_fields["matrices"].annotation.__args__
    assert set(choices) <= set(RULES), "a choice in the settings is a rule"


@pytest.mark.parametrize("config", [MUON, ADAMW])
def test_all_rates_follow_the_schedule(config):
    for step in (1, 50, 100, 700, 1000):
        want = {group: peak * lr_factor(step, config, 1000) for group, peak in peak_lrs(config).items()}
        assert learning_rates(step, config, 1000) == want


@pytest.mark.parametrize(("group", "moved"), [("muon", {"matrix"}), ("adamw", {"head", "gain"})])
def test_a_rate_moves_the_tensors_of_its_group_alone(group, moved):
    params, before = tensors(), tensors()
    optimizer(MUON, params).step(grads(), {"muon": 0.0, "adamw": 0.0, group: 0.1})
    assert {name for name in params if not torch.equal(params[name], before[name])} == moved


def test_matrices_may_be_of_the_other_group():
    params, before = tensors(), tensors()
    one = optimizer(ADAMW, params)
    assert {name: one.group(name) for name in params} == dict.fromkeys(params, "adamw")
    one.step(grads(), {"adamw": 0.1})
    assert not any(torch.equal(params[name], before[name]) for name in params)


def test_kinds_of_state_are_the_rules_and_a_master_where_values_are_rounded():
    one = optimizer(MUON, tensors())
    assert one.kinds("matrix", torch.float32) == RULES["muon"].kinds == ("momentum",)
    assert one.kinds("head", torch.bfloat16) == (*RULES["adamw"].kinds, "master")
    assert set(optimizer(MUON, tensors(torch.bfloat16)).tensors()) == {
        f"{name}::{kind}" for name, kinds in (("matrix", ("momentum",)), ("head", ("exp_avg", "exp_avg_sq")),
        ("gain", ("exp_avg", "exp_avg_sq"))) for kind in (*kinds, "master")
    }  # fmt: skip


def test_a_group_without_a_rate_is_an_error_and_not_a_guess():
    with pytest.raises(KeyError, match="adamw"):
        optimizer(MUON, tensors()).step(grads(), {"muon": 0.1})


@pytest.mark.parametrize("config", [MUON, ADAMW, OptimConfig(muon_nesterov=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_the_old_values_is_bitwise_over_them(config, dtype):
    over = optimizer(config, tensors(dtype))
    sides = [
        optimizer(config, tensors(dtype)),
        optimizer(config, {n: torch.full_like(t, 7) for n, t in tensors(dtype).items()}),
    ]
    lrs = {"muon": 0.02, "adamw": 0.01}
    for step in range(3):
        over.step(grads(), lrs, 0.5)
        old, new = sides[step % 2], sides[1 - step % 2]
        kept = {name: t.clone() for name, t in (*old.params.items(), *old.tensors().items())}
        old.step_into(new, grads(), lrs, 0.5)
        assert all(torch.equal(t, kept[n]) for n, t in (*old.params.items(), *old.tensors().items())), "untouched"
    found = {**new.params, **new.tensors()}
    assert all(torch.equal(t, found[n]) for n, t in (*over.params.items(), *over.tensors().items()))
    assert over.num_updates == new.num_updates == 3


def test_muons_rate_grows_with_fan_out_over_fan_in():
    assert lr_scale(Matrix(64, 16)) == 2.0
    assert lr_scale(Matrix(16, 64)) == 1.0


def test_the_old_names_of_the_settings_stay():
    config = Config.from_tree({"model": "tiny", "optim": {"muon_lr": 0.5, "adamw_lr": 0.25}})
    assert peak_lrs(config.optim) == {"muon": 0.5, "adamw": 0.25}


class HeavyBall:
    """A rule of a newcomer's: gradient descent with momentum, no decay."""

    kinds = ("speed",)

    def __init__(self, config):
        pass

    @staticmethod
    def peak_lr(config):
        return 0.05

    def update(self, change):
        speed = torch.mul(change.old["speed"], 0.5, out=change.new["speed"]).add_(change.grad)
        torch.sub(change.old[WEIGHT], speed, alpha=change.lr, out=change.new[WEIGHT])


def test_another_optimizer_is_one_rule_for_backbone_shards_and_logs(monkeypatch, tmp_path):
    """Nothing but its own class and its name among RULES; the setting is faked, since it is a closed list of choices."""
    monkeypatch.setitem(RULES, "heavy_ball", HeavyBall)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(" ".join(f"word{n % 37} is {n}" for n in range(3000)))
    config = config_for(texts, tmp_path / "run")
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"matrices": "heavy_ball"})})
    trainer = trainer_for(config, num_shards=2)
    before, steps = all_weights(trainer), [trainer.step() for _ in range(2)]
    assert steps[1].lrs == {"heavy_ball": 0.05, "adamw": config.optim.adamw_lr}
    assert steps[1].row()["lrs"] == steps[1].lrs
    shard = trainer.pool.transport.shards["shard-1"]
    assert {name.partition("::")[2] for name in shard.store.current.tensors} == {"weight", "speed"}
    changed = {name for name, tensor in all_weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert {name for name in before if ".mlp.experts." in name} <= changed
    assert open_checkpoint(trainer.save()).version == 2
    again = trainer_for(config, num_shards=2)
    assert again.step().loss == trainer.step().loss, "it resumes with its state"
    weights = all_weights(trainer)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in all_weights(again).items())
