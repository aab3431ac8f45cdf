"""Losses and balance updates against their formulas, written out in numpy float64.

Legend: T tokens, V vocabulary, D model, B batch, S sequence, E experts, K top-k, L layers.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trinity.config import preset
from trinity.models.common.balance import expert_counts, sign_update, smebu
from trinity.models.common.losses import IGNORE, cross_entropy, loss_from_hidden, max_vio, sequence_balance_loss
from trinity.models.common.router import Routing

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numpy_losses(logits: np.ndarray, targets: np.ndarray, z_coef: float) -> tuple[float, float]:
    kept = targets != IGNORE
    logits, targets = logits[kept].astype(np.float64), targets[kept]
    peak = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - peak).sum(-1)) + peak[:, 0]
    return (lse - logits[np.arange(len(targets)), targets]).sum(), z_coef * (lse**2).sum()


def random_targets(seed: int, tokens: int, vocab: int, ignored: float = 0.3) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    targets = rng.integers(vocab, size=tokens)
    return torch.from_numpy(np.where(rng.random(tokens) < ignored, IGNORE, targets))


@quick
@given(seed=seeds, tokens=st.integers(1, 20), vocab=st.integers(2, 40), scale=st.sampled_from([0.1, 3.0, 50.0]))
def test_cross_entropy_is_the_formula(seed, tokens, vocab, scale):
    logits_TV, targets_T = randn(seed, tokens, vocab) * scale, random_targets(seed, tokens, vocab)
    ce, z = cross_entropy(logits_TV, targets_T, 0.01, chunk=7)
    want = numpy_losses(logits_TV.numpy(), targets_T.numpy(), 0.01)
    np.testing.assert_allclose([ce.item(), z.item()], want, rtol=1e-5, atol=1e-5)


@quick
@given(seed=seeds, tokens=st.integers(1, 20), chunk=st.integers(1, 25), a=st.floats(0, 2), b=st.floats(0, 2))
def test_loss_from_hidden_equals_autograd(seed, tokens, chunk, a, b):
    """Value and both gradients, for any chunk and any weighting of the two sums, against plain autograd in float64; of a frozen
    head, too, whose gradient is made in another way."""
    head_VD, hidden_TD, targets_T = randn(seed, 31, 6), randn(seed + 1, tokens, 6), random_targets(seed, tokens, 31)
    w, h = head_VD.double().requires_grad_(), hidden_TD.double().requires_grad_()
    logits_TV = h @ w.T
    ce = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="sum")
    z = 0.1 * (logits_TV.logsumexp(-1)[targets_T != IGNORE] ** 2).sum()
    (a * ce + b * z).backward()
    head_VD.requires_grad_()
    hidden_TD.requires_grad_()
    got = loss_from_hidden(head_VD, hidden_TD, targets_T, 0.1, chunk)
    (a * got[0] + b * got[1]).backward()
    torch.testing.assert_close(torch.stack(got).double(), torch.stack((ce, z)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head_VD.grad.double(), w.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden_TD.grad.double(), h.grad, rtol=1e-4, atol=1e-5)
    alone_TD = hidden_TD.detach().requires_grad_()
    frozen = loss_from_hidden(head_VD.detach(), alone_TD, targets_T, 0.1, chunk)
    assert [each.item() for each in frozen] == [each.item() for each in got]
    (a * frozen[0] + b * frozen[1]).backward()
    torch.testing.assert_close(alone_TD.grad.double(), h.grad, rtol=1e-4, atol=1e-5)


def test_cross_entropy_gradient_equals_the_fused_one():
    head_VD, hidden_TD, targets_T = randn(1, 31, 6), randn(2, 20, 6).requires_grad_(), random_targets(3, 20, 31)
    (fused,) = torch.autograd.grad(sum(loss_from_hidden(head_VD, hidden_TD, targets_T, 0.1, 7)), hidden_TD)
    (plain,) = torch.autograd.grad(sum(cross_entropy(hidden_TD @ head_VD.T, targets_T, 0.1, 7)), hidden_TD)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_gradients_are_the_same_when_asked_for_twice():
    """The second time the logits are made again."""
    head_VD, hidden_TD = randn(1, 31, 6).requires_grad_(), randn(2, 20, 6).requires_grad_()
    loss = sum(loss_from_hidden(head_VD, hidden_TD, random_targets(3, 20, 31), 0.1, 7))
    first, second = (torch.autograd.grad(loss, (head_VD, hidden_TD), retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [out] if isinstance(out, torch.Tensor) else out if isinstance(out, tuple | list) else []
        self.elements = max([self.elements, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return out


def test_fused_loss_never_holds_all_logits():
    """Forward and backward: no tensor larger than one chunk's logits, where all logits would be 32 chunks."""
    tokens, vocab, chunk = 512, 300, 16
    head_VD, hidden_TD = randn(1, vocab, 8).requires_grad_(), randn(2, tokens, 8).requires_grad_()
    with Largest() as largest:
        ce, z = loss_from_hidden(head_VD, hidden_TD, random_targets(3, tokens, vocab), 1e-4, chunk)
        (ce + z).backward()
    assert largest.elements == chunk * vocab < tokens * vocab // 30


def test_bf16_losses_are_computed_in_fp32():
    """bf16 logits give the loss of those very logits in fp32; bf16 gradients come back within bf16 rounding."""
    head_VD, hidden_TD, targets_T = randn(1, 500, 16), randn(2, 64, 16), random_targets(3, 64, 500, 0)
    head, hidden = head_VD.bfloat16().requires_grad_(), hidden_TD.bfloat16().requires_grad_()
    want = numpy_losses((hidden @ head.T).detach().float().numpy(), targets_T.numpy(), 1e-3)
    fused = loss_from_hidden(head, hidden, targets_T, 1e-3, 10)
    for got in (fused, cross_entropy(hidden @ head.T, targets_T, 1e-3, 10)):
        assert got[0].dtype == got[1].dtype == torch.float32
        np.testing.assert_allclose([x.item() for x in got], want, rtol=1e-5)
    sum(fused).backward()
    exact = head.detach().float().requires_grad_()
    sum(loss_from_hidden(exact, exact_TD := hidden.detach().float().requires_grad_(), targets_T, 1e-3, 10)).backward()
    assert head.grad.dtype == hidden.grad.dtype == torch.bfloat16
    assert (head.grad.float() - exact.grad).norm() < 0.02 * exact.grad.norm()
    alone_TD = hidden.detach().requires_grad_()
    sum(loss_from_hidden(head.detach(), alone_TD, targets_T, 1e-3, 10)).backward()  # of a frozen head
    for found_TD in (hidden, alone_TD):
        assert (found_TD.grad.float() - exact_TD.grad).norm() < 0.02 * exact_TD.grad.norm()


def test_all_targets_ignored_is_zero_with_zero_gradient():
    head_VD, hidden_TD = randn(1, 11, 4).requires_grad_(), randn(2, 5, 4).requires_grad_()
    ce, z = loss_from_hidden(head_VD, hidden_TD, torch.full((5,), IGNORE), 1.0)
    (ce + z).backward()
    assert ce == z == 0
    assert not head_VD.grad.any()
    assert not hidden_TD.grad.any()


def test_target_beyond_the_vocabulary_is_refused():
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        loss_from_hidden(randn(1, 11, 4), randn(2, 5, 4), torch.full((5,), 11), 0.0)


def random_routing(seed: int, tokens: int, experts: int, top_k: int) -> Routing:
    logits_TE = randn(seed, tokens, experts).requires_grad_()
    scores_TE = logits_TE.sigmoid()
    ids_TK = (scores_TE.detach() + 0.5 * randn(seed + 1, experts)).topk(top_k).indices
    return Routing(logits_TE, scores_TE, ids_TK, scores_TE.gather(1, ids_TK))


def numpy_balance(routing: Routing, batch: int, seq: int) -> float:
    """Equations 29-32, one sequence and one expert at a time."""
    scores, ids = routing.scores_TE.detach().double().numpy(), routing.ids_TK.numpy()
    experts, top_k, total = scores.shape[1], ids.shape[1], 0.0
    for b in range(batch):
        rows = slice(b * seq, (b + 1) * seq)
        share = scores[rows] / scores[rows].sum(-1, keepdims=True)
        for i in range(experts):
            total += experts / (top_k * seq) * (ids[rows] == i).sum() * share[:, i].mean()
    return total / batch


@quick
@given(seed=seeds, batch=st.integers(1, 3), seq=st.integers(1, 9), top_k=st.integers(1, 5), layers=st.integers(1, 3))
def test_sequence_balance_loss_is_the_formula(seed, batch, seq, top_k, layers):
    config = preset("tiny").model_copy(update={"num_experts": 6})
    routing = [random_routing(seed + 2 * i, batch * seq, 6, top_k) for i in range(layers)]
    got = sequence_balance_loss(routing, config, batch, seq, 0.3)
    np.testing.assert_allclose(got.item(), 0.3 * np.mean([numpy_balance(r, batch, seq) for r in routing]), rtol=1e-5)


def test_sequence_balance_loss_pushes_towards_balance():
    """alpha when balanced; its gradient lowers the scores of overloaded experts; nothing without MoE layers."""
    config = preset("tiny")
    even = torch.full((8, 8), 0.5)
    balanced = Routing(even, even, torch.arange(16).view(8, 2) % 8, even[:, :2])
    assert sequence_balance_loss([balanced], config, 1, 8, 0.01).item() == pytest.approx(0.01)
    routing = random_routing(0, 32, 8, 2)
    (grad_TE,) = torch.autograd.grad(sequence_balance_loss([routing], config, 1, 32, 1.0), routing.logits_TE)
    counts_E = expert_counts(routing.ids_TK, 8)
    assert grad_TE[:, counts_E.argmax()].sum() > 0 > grad_TE[:, counts_E.argmin()].sum()
    assert sequence_balance_loss([], config, 1, 8, 0.01) == 0


counts_lists = st.lists(st.integers(0, 10**6), min_size=2, max_size=16)


@quick
@given(counts=counts_lists, seed=seeds, lam=st.floats(1e-5, 1e-1), beta=st.floats(0, 0.99), kappa=st.floats(0.1, 10))
def test_smebu_is_the_formula(counts, seed, lam, beta, kappa):
    bias, momentum = randn(seed, len(counts)), 1e-3 * randn(seed + 1, len(counts))
    got_bias, got_momentum = smebu(bias, momentum, torch.tensor(counts), lam, beta, kappa)
    n = np.array(counts, dtype=np.float64)
    v = (n.mean() - n) / n.mean() if n.any() else np.zeros_like(n)
    delta = lam * np.tanh(kappa * v)
    want = beta * momentum.double().numpy() + (1 - beta) * (delta - delta.mean())
    np.testing.assert_allclose(got_momentum.numpy(), want, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(got_bias.numpy(), bias.double().numpy() + want, rtol=1e-5, atol=1e-6)


@quick
@given(counts=counts_lists, seed=seeds, gamma=st.floats(1e-4, 1e-1))
def test_sign_update_is_the_formula(counts, seed, gamma):
    bias = randn(seed, len(counts))
    n = np.array(counts, dtype=np.float64)
    want = bias.double().numpy() + gamma * np.sign(n.mean() - n)
    got = sign_update(bias, torch.tensor(counts), gamma)
    np.testing.assert_allclose(got.numpy(), want - want.mean(), rtol=1e-5, atol=1e-6)


@quick
@given(seed=seeds, layers=st.integers(1, 4))
def test_balance_updates_batch_over_layers(seed, layers):
    bias, momentum = randn(seed, layers, 6), randn(seed + 1, layers, 6)
    counts = torch.from_numpy(np.random.default_rng(seed).integers(0, 100, (layers, 6)))
    together, signed = smebu(bias, momentum, counts, 5e-4, 0.5, 2.0), sign_update(bias, counts, 1e-3)
    for i in range(layers):
        alone = smebu(bias[i], momentum[i], counts[i], 5e-4, 0.5, 2.0)
        torch.testing.assert_close((together[0][i], together[1][i]), alone, rtol=0, atol=0)
        torch.testing.assert_close(signed[i], sign_update(bias[i], counts[i], 1e-3), rtol=0, atol=0)


@pytest.mark.parametrize("update", ["smebu", "sign"])
def test_bias_updates_balance_a_skewed_router(update):
    """Fixed skewed scores, updates repeated: MaxVio falls from above 1 to below a quarter of that."""
    scores_TE = (randn(0, 2048, 8) + torch.linspace(-1.5, 1.5, 8)).sigmoid()
    bias, momentum, history = torch.zeros(8), torch.zeros(8), []
    for _ in range(400):
        counts = expert_counts((scores_TE + bias).topk(2).indices, 8)
        history.append(max_vio(counts[None]).item())
        if update == "smebu":
            bias, momentum = smebu(bias, momentum, counts, 1e-2, 0.5, 2.0)
        else:
            bias = sign_update(bias, counts, 5e-3)
    assert history[0] > 1
    assert history[-1] < history[0] / 4


@quick
@given(seed=seeds, tokens=st.integers(0, 50), top_k=st.integers(1, 4))
def test_counts_and_max_vio(seed, tokens, top_k):
    ids = np.random.default_rng(seed).integers(0, 7, (tokens, top_k))
    counts = expert_counts(torch.from_numpy(ids), 9)
    want = np.array([(ids == i).sum() for i in range(9)])
    assert counts.dtype == torch.int64
    assert counts.tolist() == want.tolist()
    vio = (want.max() - want.mean()) / want.mean() if tokens else 0.0
    assert max_vio(torch.stack((counts, counts * 3))).tolist() == pytest.approx([vio, vio], rel=1e-5)
