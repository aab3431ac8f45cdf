"""DPO against its formula written out by hand, and what must not matter: packing, micro-batches, what is masked."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.unit.test_trainer import config_for, texts  # noqa: F401  a fixture
from trinity.data.chat_tokens import Example
from trinity.data.prepare import prepare
from trinity.errors import InvalidRequest
from trinity.pool.local import local_pool
from trinity.rl.preference_trainer import PreferenceTrainer
from trinity.rl.preferences import Pair, pair_batch
from trinity.rpc.messages import Load
from trinity.train.collectives import Alone
from trinity.train.loss import packed_inputs, token_logprobs

RNG = torch.Generator().manual_seed(5)


def example(prompt, length):
    """An answer to that prompt, with a tool's words in between that nobody trains."""
    ids = [*prompt, *torch.randint(5, 290, (length,), generator=RNG).tolist()]
    is_trained = [False] * len(prompt) + [n % 4 != 2 for n in range(length)]
    return Example(ids, is_trained)


PROMPTS = [torch.randint(5, 290, (n,), generator=RNG).tolist() for n in (3, 5, 2, 7)]
PAIRS = [Pair(example(prompt, 4 + n), example(prompt, 9 - n)) for n, prompt in enumerate(PROMPTS)]


def trainer_for(texts, out_dir, micro=2, dtype="float32", **how):  # noqa: F811
    config = config_for(texts, out_dir, micro_batch_size=micro).replace(model={"dtype": dtype}, preferences=how)
    pool = local_pool(config.model, Load(), num_shards=2, optim=config.optim, backend="torch")
    data = prepare(config.data, config.train, config.model, config.train.out_dir)
    trainer = PreferenceTrainer(config, pool, data, Alone())
    trainer.start()
    return trainer


def score(trainer, answer):
    """The definition, of an answer alone."""
    trainer.dispatcher.use(trainer.version)
    logprobs = token_logprobs(trainer.model, torch.tensor([answer.ids]))[0]
    return logprobs[torch.tensor(answer.is_trained[1:])].sum().item()


def by_hand(trainer, pairs, beta, nll, is_mean):
    def rho(answer, reference):
        return (score(trainer, answer) - reference) / (answer.num_trained if is_mean else 1)

    gains = [rho(c, ref[0]) - rho(r, ref[1]) for c, r, ref in pairs]
    tokens = sum(pair.chosen.num_trained for pair in pairs)
    said = -sum(score(trainer, pair.chosen) for pair in pairs) / tokens
    return -F.logsigmoid(beta * torch.tensor(gains)).mean().item() + nll * said


@pytest.mark.parametrize(("beta", "nll", "is_mean"), [(0.1, 0.0, False), (0.5, 0.3, False), (5.0, 0.1, True)])
def test_the_loss_is_the_formula(texts, tmp_path, beta, nll, is_mean):  # noqa: F811
    trainer = trainer_for(texts, tmp_path, beta=beta, nll=nll, length_normalized=is_mean)
    pairs = trainer.referenced(PAIRS)
    for pair in pairs:
        assert pair.reference == pytest.approx([score(trainer, each) for each in pair[:2]], abs=1e-4)
    for _ in range(3):
        want = by_hand(trainer, pairs, beta, nll, is_mean)
        assert trainer.prefer(pairs).loss == pytest.approx(want, rel=1e-4)


def test_it_begins_at_log_2_exactly_and_learns_to_prefer(texts, tmp_path):  # noqa: F811
    for dtype in ("float32", "bfloat16"):
        trainer = trainer_for(texts, tmp_path / dtype, dtype=dtype)
        pairs = trainer.referenced(PAIRS)
        losses = [trainer.prefer(pairs).loss for _ in range(6)]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-7)
        assert losses[-1] < 0.9 * losses[0]
        assert trainer.version == 6


def test_micro_batches_of_any_size_give_the_same_step(texts, tmp_path):  # noqa: F811
    found = []
    for micro in (1, 2, 4):
        trainer = trainer_for(texts, tmp_path / str(micro), micro=micro, nll=0.2)
        pairs = trainer.referenced(PAIRS)
        metrics = [trainer.prefer(pairs) for _ in range(2)]
        found.append([value for each in metrics for value in (each.loss, each.grad_norm)])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("is_mean", [False, True])
def test_gradients_are_those_of_the_formula(texts, tmp_path, is_mean):  # noqa: F811
    """Of the head, by autograd of the formula over each answer alone."""
    trainer = trainer_for(texts, tmp_path, micro=4, beta=0.7, nll=0.2, length_normalized=is_mean)
    pairs = [pair._replace(reference=(-20.0, -21.0)) for pair in PAIRS]
    tokens = sum(pair.chosen.num_trained for pair in pairs)
    trainer.dispatcher.use(0)
    trainer.objective([pair_batch(pairs)], tokens)[0].ce.backward()
    head = trainer.model.lm_head.weight.detach().clone().requires_grad_()

    def summed(answer):
        ids = torch.tensor([answer.ids])
        with torch.no_grad():
            hidden_TD = trainer.model(*packed_inputs(trainer.config.model, ids, None)).hidden_TD
        logprobs = (hidden_TD[:-1] @ head.T).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return logprobs[torch.tensor(answer.is_trained[1:])]

    losses, said = [], []
    for chosen, rejected, (ref_c, ref_r) in pairs:
        rho_c, rho_r = (
            (summed(each).sum() - reference) / (each.num_trained if is_mean else 1)
            for each, reference in ((chosen, ref_c), (rejected, ref_r))
        )
        losses.append(-F.logsigmoid(0.7 * (rho_c - rho_r)))
        said.append(summed(chosen).sum())
    (torch.stack(losses).mean() - 0.2 * torch.stack(said).sum() / tokens).backward()
    found = trainer.model.lm_head.weight.grad
    assert float((found - head.grad).norm() / head.grad.norm()) < 1e-5


def test_what_is_no_step_is_refused(texts, tmp_path):  # noqa: F811
    trainer = trainer_for(texts, tmp_path)
    pairs = trainer.referenced(PAIRS)
    for wrong in (pairs[:3], PAIRS):
        with pytest.raises(InvalidRequest, match="pairs for a step of 4"):
            trainer.prefer(wrong)
    silent = Pair(Example([5, 6, 7], [False] * 3), PAIRS[0].rejected)
    with pytest.raises(InvalidRequest, match="no token that is trained"):
        trainer.referenced([silent])
