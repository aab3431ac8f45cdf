"""The autoscaler with the planner behind it, window after window: it follows the load, and it does not flap (F18).

Legend: L layers, E experts of a layer.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

import numpy as np
import pytest

from trinity.errors import ConfigError
from trinity.placement.autoscaler import Scale, ScaleLimits, Window, decide
from trinity.placement.planner import PlanGoal, plan, rows_LS
from trinity.placement.topology import Shard, Topology

LAYERS, EXPERTS, SECONDS, ONE = 3, 32, 10.0, 1000.0  # ONE: rows per second of one shard
LIMITS = ScaleLimits(ONE, min_shards=2, max_shards=12, max_spare=16, cooldown_s=2 * SECONDS, settle_s=6 * SECONDS)


@dataclass
class Seen:
    """A window as it went: what was there, how uneven it was, how busy, and whether anything changed after it."""

    num_shards: int
    num_replicas: int
    imbalance: float
    utilisation: float
    changed: bool


def zipf(seed, skew=0.9):
    """[L, E] shares of each layer, the ranks in random order."""
    rng = np.random.default_rng(seed)
    rank_LE = np.array([rng.permutation(EXPERTS) for _ in range(LAYERS)])
    share_LE = (rank_LE + 1.0) ** -skew
    return share_LE / share_LE.sum(1, keepdims=True)


def simulate(rates, shares, limits=LIMITS, seed=0):
    """rates: shards' worth of rows in each window; shares: [L, E] of each. Counts are Poisson."""
    rng = np.random.default_rng(seed)
    scale, table, seen = Scale(limits.min_shards, np.ones((LAYERS, EXPERTS), dtype=np.int64)), None, []
    for i, (rate, share_LE) in enumerate(zip(rates, shares, strict=True)):
        window = Window(rng.poisson(rate * ONE * SECONDS / LAYERS * share_LE), SECONDS)
        shards = tuple(Shard(f"s{j}", f"h{j // 2}", slots=EXPERTS) for j in range(scale.num_shards))
        if table is None:
            table = plan(np.ones((LAYERS, EXPERTS)), Topology(shards), None, PlanGoal(num_spare=0))
        rows = rows_LS(window.rows_LE, table)
        after = decide(window, scale, limits, i * SECONDS)
        changed = after.changed_s == i * SECONDS
        busy = window.rows_per_s / (scale.num_shards * ONE)
        seen.append(
            Seen(scale.num_shards, int(scale.replicas_LE.sum()), (rows.max(1) / rows.mean(1)).max(), busy, changed)
        )
        scale = after
        shards = tuple(Shard(f"s{j}", f"h{j // 2}", slots=EXPERTS) for j in range(scale.num_shards))
        table = plan(window.rows_LE, Topology(shards), table, replicas_LE=scale.replicas_LE)
        assert (table.num_replicas_LE == scale.replicas_LE).all()
        assert limits.min_shards <= scale.num_shards <= limits.max_shards
        assert scale.replicas_LE.sum(1).max() <= EXPERTS + limits.max_spare
    return seen


def keeps_cool(seen, limits=LIMITS):
    at = [i for i, window in enumerate(seen) if window.changed]
    return all(later - earlier >= limits.cooldown_s / SECONDS for earlier, later in pairwise(at))


def test_a_square_load_is_followed_once_up_and_once_down_per_period():
    rates = ([1.7] * 12 + [5.9] * 12) * 3
    seen = simulate(rates, [zipf(1)] * len(rates))
    assert keeps_cool(seen)
    for start in range(0, len(rates), 12):
        part = seen[start : start + 12]
        counts = [window.num_shards for window in part]
        assert len(set(counts)) <= 2
        assert max(window.utilisation for window in part[2:]) <= LIMITS.high
        assert max(window.imbalance for window in part[2:]) <= 1.25
    assert {window.num_shards for window in seen[11::24]} == {3}
    assert {window.num_shards for window in seen[23::24]} == {10}


def test_a_square_load_faster_than_the_settling_time_does_not_flap():
    rates = [1.5, 1.5, 5.9, 5.9] * 12
    seen = simulate(rates, [zipf(1)] * len(rates))
    assert keeps_cool(seen)
    assert {window.num_shards for window in seen[4:]} == {10}


def test_a_ramp_goes_up_in_steps_and_comes_down_in_steps():
    rates = [*np.linspace(1, 7, 30), *np.linspace(7, 1, 30), *[1.0] * 10]
    seen = simulate(rates, [zipf(2)] * len(rates))
    counts = [window.num_shards for window in seen]
    top = counts.index(max(counts))
    assert keeps_cool(seen)
    assert counts[:top] == sorted(counts[:top])
    assert counts[top:] == sorted(counts[top:], reverse=True)
    assert max(window.utilisation for window in seen[3:]) <= 1.0
    assert max(window.imbalance for window in seen[3:]) <= 1.25
    assert counts[-1] == LIMITS.min_shards


@pytest.mark.parametrize("seed", range(3))
def test_a_zipf_load_that_shifts_is_even_again_after_two_windows(seed):
    shares = [zipf(100 * seed + i // 6, 1.1) for i in range(36)]
    seen = simulate([4.0] * 36, shares, seed=seed)
    assert keeps_cool(seen)
    for start in range(0, 36, 6):
        assert max(window.imbalance for window in seen[start + 2 : start + 6]) <= 1.25
    assert max(window.imbalance for window in seen[6::6]) > 1.25  # the shift itself is felt
    assert {window.num_shards for window in seen[4:]} == {seen[4].num_shards}


def test_noise_changes_nothing():
    seen = simulate([3.0] * 40, [zipf(3)] * 40)
    assert sum(window.changed for window in seen) <= 2
    assert not any(window.changed for window in seen[5:])


def test_replicas_of_experts_that_cooled_down_are_given_back():
    hot, flat = zipf(4, 1.5), np.full((LAYERS, EXPERTS), 1 / EXPERTS)
    seen = simulate([3.0] * 30, [hot] * 10 + [flat] * 20)
    assert seen[9].num_replicas > LAYERS * EXPERTS
    assert seen[-1].num_replicas == LAYERS * EXPERTS


def flat(rate, seconds=SECONDS):
    return Window(np.full((LAYERS, EXPERTS), rate * ONE * seconds / (LAYERS * EXPERTS)), seconds)


def start(num_shards=2):
    return Scale(num_shards, np.ones((LAYERS, EXPERTS), dtype=np.int64))


@pytest.mark.parametrize(
    ("rate", "have", "want"), [(1.0, 2, 2), (1.61, 2, 3), (100.0, 2, 12), (0.79, 2, 2), (2.5, 12, 5), (0.0, 12, 2)]
)
def test_floor_ceiling_and_dead_band(rate, have, want):
    assert decide(flat(rate), start(have), LIMITS, 0.0).num_shards == want


def test_shards_follow_from_room_and_hosts_from_shards():
    limits = replace(LIMITS, slots=8, shards_per_host=2)
    scale = decide(flat(0.1), start(), limits, 0.0)
    assert (scale.num_shards, limits.hosts(scale.num_shards)) == (4, 2)
    assert (scale.replicas_LE == 1).all()
    with pytest.raises(ConfigError, match=r"32 experts of a layer need 16 shards of 2 slots; max_shards is 12"):
        decide(flat(0.1), start(), replace(LIMITS, slots=2), 0.0)


def test_redundancy_comes_before_heat_and_the_budget_before_both():
    twice = decide(Window(zipf(5) * 1e4, SECONDS), start(), replace(LIMITS, min_replicas=2, max_spare=40), 0.0)
    assert twice.replicas_LE.min() == 2
    short = decide(Window(zipf(5) * 1e4, SECONDS), start(), replace(LIMITS, min_replicas=2, max_spare=5), 0.0)
    assert (short.replicas_LE.sum(1) == EXPERTS + 5).all()
    hottest = np.argsort(-zipf(5), 1)[:, :5]
    assert (np.take_along_axis(short.replicas_LE, hottest, 1) == 2).all()


def test_the_past_is_not_touched_and_the_same_question_has_the_same_answer():
    scale = start()
    one, two = (decide(Window(zipf(6) * 1e6, SECONDS), scale, LIMITS, 5.0) for _ in range(2))
    assert (scale.num_shards, scale.recent, scale.replicas_LE.max()) == (2, (), 1)
    assert (one.num_shards, one.changed_s) == (two.num_shards, two.changed_s) == (12, 5.0)
    assert (one.replicas_LE == two.replicas_LE).all()
    assert one.num_shards == min(12, ceil(LAYERS * 1e6 / SECONDS / (LIMITS.target * ONE)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows_per_s": 0.0}, "rows_per_s 0.0 is below"),
        ({"rows_per_s": float("nan")}, "rows_per_s nan"),
        ({"min_shards": 0}, "0 to 12 shards"),
        ({"min_shards": 13}, "13 to 12 shards"),
        ({"low": 0.7}, "low, target, high are 0.7, 0.6, 0.8"),
        ({"even": 0.1}, "cold, even, hot are 0.2, 0.1, 0.6"),
        ({"slots": 0}, "slots 0 is below 1"),
        ({"cooldown_s": -1.0}, "cooldown_s -1.0 is below 0"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        replace(LIMITS, **wrong)


def test_windows_that_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"lasts 0\.0 s"):
        flat(1.0, 0.0)
    with pytest.raises(ConfigError, match=r"counts from 0"):
        Window(np.full((2, 2), -1.0), 1.0)
    with pytest.raises(ConfigError, match=r"load is \(2, 2\), replicas \(3, 32\)"):
        decide(Window(np.ones((2, 2)), 1.0), start(), LIMITS, 0.0)
