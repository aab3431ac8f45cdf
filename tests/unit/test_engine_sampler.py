"""The sampler against formulas written out in numpy, and its noise against statistics.

Legend: B rows, V vocabulary.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trinity.engine.request import SamplingParams, Sequence
from trinity.engine.sampler import filtered_probs, sample, steer, uniform
from trinity.text.detokenizer import TextStream


def sequence(params: SamplingParams, prompt=(1, 2), generated=()) -> Sequence:
    made = Sequence("a", tuple(prompt), params, TextStream(None))
    made.token_ids += generated
    return made


def numpy_probs(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Temperature, then min_p, then the top_k largest, then the fewest of them that make top_p; renormalised."""
    z = logits.astype(np.float64) / p.temperature
    probs = np.exp(z - z.max())
    probs /= probs.sum()
    probs[probs < p.min_p * probs.max()] = 0
    order = np.argsort(-probs, kind="stable")
    keep = order[: p.top_k or len(order)]
    kept = probs[keep] / probs[keep].sum()
    if p.top_p < 1:
        keep = keep[: np.searchsorted(np.cumsum(kept), p.top_p) + 1]
    out = np.zeros_like(probs)
    out[keep] = probs[keep]
    return out / out.sum()


some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.01, 0.3, 1.0, 1.7, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 600, 1 << 31]),
    top_p=st.sampled_from([0.05, 0.3, 0.55, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)


@settings(max_examples=80, deadline=None)
@example([SamplingParams(temperature=0.3, top_k=600)], 50, 0)
@example([SamplingParams(temperature=0.2, top_k=600)], 1500, 0)
@given(st.lists(some_params, min_size=1, max_size=5), st.sampled_from([5, 50, 1500]), st.integers(0, 10_000))
def test_filters_equal_the_formula(params, vocab, seed):
    """Rows with different filters in one call; vocabularies below and above the first candidates."""
    logits_BV = 3 * torch.randn(len(params), vocab, generator=torch.Generator().manual_seed(seed))
    probs_BV = filtered_probs(logits_BV, params)
    probs_BV = (probs_BV / probs_BV.sum(-1, keepdim=True)).numpy()
    for row, logits, p in zip(probs_BV, logits_BV.numpy(), params, strict=True):
        want = numpy_probs(logits, p)
        boundary = _near_a_boundary(logits, p)
        if not boundary:
            assert ((row > 0) == (want > 0)).all()
            np.testing.assert_allclose(row, want, atol=1e-5)


def _near_a_boundary(logits: np.ndarray, p: SamplingParams) -> bool:
    """Where float32 may rightly decide otherwise: a sum or a ratio within 1e-5 of its limit, or underflow."""
    z = logits.astype(np.float64) / p.temperature
    probs = np.exp(z - z.max())
    least = probs.min() < 1e-30
    near_min_p = bool(p.min_p) and np.abs(probs - p.min_p).min() < 1e-5 and p.min_p < 1
    probs[probs < p.min_p] = 0
    kept = np.sort(probs)[::-1][: p.top_k or len(probs)]
    near_top_p = p.top_p < 1 and np.abs(np.cumsum(kept / kept.sum()) - p.top_p).min() < 1e-5
    return bool(least or near_min_p or near_top_p)


def test_most_examples_are_away_from_boundaries():
    rng = np.random.default_rng(0)
    cases = itertools.product([0.3, 1.0, 1.7], [0, 7], [0.3, 0.9, 1.0], [0.0, 0.02])
    params = [SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in cases]
    assert sum(_near_a_boundary(3 * rng.standard_normal(50), p) for p in params) <= len(params) / 10


def test_ties_at_the_limit_are_all_kept():
    probs = filtered_probs(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]), [SamplingParams(top_k=2)])[0]
    assert (probs > 0).tolist() == [False, True, True, True, False]


def test_draws_follow_the_distribution():
    """20,000 positions of one seed: chi-squared with 8 degrees of freedom stays below its 99.9 % point, 26.1."""
    logits = torch.linspace(-1, 1.5, 12)
    params = SamplingParams(seed=7, top_k=9, temperature=0.8)
    want = numpy_probs(logits.numpy(), params)
    rows = [sequence(params, prompt=(0,) * n) for n in range(1, 401)]
    counts = np.zeros(12)
    for seed in range(50):
        for row in rows:
            row.seed = seed
        tokens = [s.token_id for s in sample(logits.repeat(400, 1), rows)]
        counts += np.bincount(tokens, minlength=12)
    seen = want > 0
    assert counts[~seen].sum() == 0
    assert (((counts - 20_000 * want) ** 2)[seen] / (20_000 * want[seen])).sum() < 26.1


def test_noise_is_uniform_and_depends_on_seed_and_position_alone():
    noise = np.array([[uniform(seed, position) for position in range(200)] for seed in range(100)])
    assert (noise == [[uniform(seed, position) for position in range(200)] for seed in range(100)]).all()
    assert len(np.unique(noise)) == noise.size
    assert (noise >= 0).all()
    assert (noise < 1).all()
    histogram = np.histogram(noise, bins=20, range=(0, 1))[0]
    assert ((histogram - 1000) ** 2 / 1000).sum() < 43.8  # 19 degrees of freedom, 99.9 %
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.03
    assert uniform(-1, 5) != uniform(1, 5)


def test_a_row_does_not_depend_on_its_batch():
    logits_BV = torch.randn(6, 700, generator=torch.Generator().manual_seed(1))
    params = [
        SamplingParams(seed=1),
        SamplingParams(temperature=0),
        SamplingParams(seed=1, top_p=0.5),
        SamplingParams(seed=2, top_k=600),
        SamplingParams(seed=3, min_p=0.1, logprobs=3),
        SamplingParams(seed=4, repetition_penalty=2.0, presence_penalty=1.0, logit_bias={5: 3.0}),
    ]
    rows = [sequence(p, generated=[5, 6, 5]) for p in params]
    together = sample(logits_BV, rows)
    assert together == [sample(logits_BV[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert together[::-1] == sample(logits_BV.flip(0), rows[::-1])


def test_seeds_and_positions_differ():
    logits_BV = torch.zeros(1, 1000)
    drawn = {
        sample(logits_BV, [sequence(SamplingParams(seed=seed), prompt=(0,) * n)])[0].token_id
        for seed in range(5)
        for n in range(1, 6)
    }
    assert len(drawn) > 20
    unseeded = {sample(logits_BV, [sequence(SamplingParams())])[0].token_id for _ in range(10)}
    assert len(unseeded) > 5


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-5, 1e-4])
def test_vanishing_temperature_is_greedy(temperature):
    logits_BV = 50 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    assert (
        sample(logits_BV, [sequence(SamplingParams(temperature=temperature))])[0].token_id == logits_BV.argmax().item()
    )


def test_penalties_and_bias():
    """Repetition counts the prompt, presence and frequency do not; worked out by hand."""
    logits_BV = torch.tensor([[1.0, 1.0, -1.0, 2.0, 0.5]])
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={4: 10.0, 1: -1.0}
    )
    out = steer(logits_BV, [sequence(params, prompt=(0, 2), generated=[3, 3, 1])])
    assert out.tolist() == [[0.5, 0.5 - 0.25 - 0.5 - 1.0, -2.0, 1.0 - 0.25 - 1.0, 10.5]]
    assert logits_BV.tolist() == [[1.0, 1.0, -1.0, 2.0, 0.5]], "the raw logits are still needed for logprobs"


def test_logprobs_are_raw_and_ordered():
    logits_BV = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(seed=1, temperature=0.1, logit_bias={3: 50.0}, logprobs=4)
    (first, second) = sample(logits_BV, [sequence(params), sequence(SamplingParams(temperature=0, logprobs=0))])
    want = logits_BV[0].log_softmax(-1)
    assert first.token_id == 3
    assert first.logprobs.logprob == pytest.approx(want[3].item())
    assert [i for i, _ in first.logprobs.top] == want.topk(4).indices.tolist()
    assert [p for _, p in first.logprobs.top] == pytest.approx(want.topk(4).values.tolist())
    assert second.logprobs.top == ()
    assert second.logprobs.token_id == second.token_id == logits_BV[1].argmax().item()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_spoil_their_row_only(bad, temperature):
    logits_BV = torch.zeros(3, 10)
    logits_BV[1, 4] = bad
    rows = [sequence(SamplingParams(temperature=temperature, seed=i, top_p=0.9, logprobs=2)) for i in range(3)]
    got = [s.token_id for s in sample(logits_BV, rows)]
    assert got[1] is None
    assert None not in (got[0], got[2])


def test_the_whole_vocabulary_is_sorted_only_when_needed(monkeypatch):
    """A flat distribution needs it for top_p; a peaked one, or top_k, does not."""
    widths = []
    real = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda tensor, num: widths.append(num) or real(tensor, num))
    flat, peaked = torch.zeros(1, 4000), torch.zeros(1, 4000)
    peaked[0, :100] = 20
    filtered_probs(flat, [SamplingParams(top_k=40)])
    filtered_probs(flat.repeat(2, 1), [SamplingParams(), SamplingParams(top_k=5)])
    assert widths == [64, 64]
    filtered_probs(peaked, [SamplingParams(top_p=0.9)])
    assert widths[2:] == [64, 1024]
    kept = filtered_probs(flat + torch.linspace(0, 1e-3, 4000), [SamplingParams(top_p=0.9)])
    assert widths[4:] == [64, 1024, 4000]
    assert int((kept > 0).sum()) == pytest.approx(3600, abs=3)
