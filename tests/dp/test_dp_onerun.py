"""Estimators from one run: published figures, closed forms, coverage by simulation, and what each must refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medvae.dp import onerun
from medvae.dp.accounting import gaussian_noise_for
from medvae.dp.tradeoff import miss_bound
from medvae.types import Mechanism

DELTA = 1e-5
# Computed by jax_privacy 2.0.0 (Google DeepMind, jax_privacy/auditing.py: `_epsilon_one_run_fdp`, `_epsilon_one_run`,
# significance 0.05, delta 1e-5), which solves to 1e-6. Columns: canaries, guesses, right ones, f-DP, (epsilon, delta).
PUBLISHED = (
    (1000, 60, 55, 2.2902328, 1.5972907),
    (5000, 300, 285, 3.4931504, 2.4831338),
    (1000, 400, 330, 2.2585982, 1.3284257),
    (10000, 1000, 980, 5.0422012, 3.4896811),
    (400, 400, 260, 0.9102058, 0.4419554),
)
# The same library's `CanaryScoreAuditor(inside, outside).epsilon_from_gdp(0.05, 1e-5)` on `shared_scores()`, and the
# thresholds on its Pareto frontier.
PUBLISHED_GDP = 6.9809356


def shared_scores() -> tuple[np.ndarray, np.ndarray]:
    inside = np.sin(3 * np.arange(480)) * 1.2 + np.cos(5 * np.arange(480)) + 1.5
    outside = np.sin(np.arange(500)) * 1.2 + np.cos(7 * np.arange(500))
    return inside, outside


def gaussian(rng: np.random.Generator, noise: float, count: int, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of canaries of one Gaussian release that claims `noise`, and their coins."""
    coins = rng.random(count) < 0.5
    return onerun.log_ratio(coins + factor * noise * rng.standard_normal(count), noise, 1.0), coins


@pytest.mark.parametrize(("canaries", "guesses", "right", "fdp", "steinke"), PUBLISHED)
def test_one_run_bounds_are_those_of_a_published_auditor(canaries, guesses, right, fdp, steinke) -> None:
    found = onerun.mu_epsilon(onerun.fdp_mu(canaries, guesses, right, 0.05), DELTA)
    assert found == pytest.approx(fdp, abs=1e-6)
    assert onerun.steinke_epsilon(canaries, guesses, right, 0.05, DELTA) == pytest.approx(steinke, abs=1e-6)


def test_the_gdp_estimate_is_that_of_a_published_auditor() -> None:
    inside, outside = shared_scores()
    scores, coins = np.concatenate([inside, outside]), np.repeat([True, False], [480, 500])
    at = frontier(inside, outside)
    assert len(at) == 12
    found = onerun.mu_epsilon(onerun.gdp_mu(scores, coins, at, 0.05), DELTA)
    assert found == pytest.approx(PUBLISHED_GDP, abs=1e-6)


def frontier(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Thresholds on the convex frontier of (misses, rightly left out), just below a score: for "at least"."""
    every = np.append(np.union1d(inside, outside), np.inf)
    x, y = (np.searchsorted(np.sort(s), every) for s in (inside, outside))
    kept: list[int] = []
    for i in range(len(every)):
        while len(kept) > 1 and _above(kept[-2], kept[-1], i, x, y):
            kept.pop()
        kept.append(i)
    return np.nextafter(every[kept], -np.inf)


def _above(a: int, b: int, c: int, x: np.ndarray, y: np.ndarray) -> bool:
    return (y[b] - y[a]) * (x[c] - x[b]) <= (y[c] - y[b]) * (x[b] - x[a])


def test_a_score_is_the_log_of_the_likelihood_ratio() -> None:
    g, sigma, q = np.linspace(-4, 5, 50), 0.8, 0.07
    out = stats.norm.pdf(g, 0, sigma)
    took_part = (1 - q) * out + q * stats.norm.pdf(g, 1, sigma)
    assert onerun.log_ratio(g, sigma, q) == pytest.approx(np.log(took_part / out), rel=1e-10)
    assert onerun.log_ratio(g, sigma, 1.0) == pytest.approx((g - 0.5) / sigma**2)
    assert np.all(np.isfinite(onerun.log_ratio([-1e3, 1e3], 0.1, q)))


@pytest.mark.parametrize("mechanism", [Mechanism("a", 0.6), Mechanism("b", 1.1, 0.1, 40)])
def test_moments_of_scores_are_those_of_many_draws(mechanism: Mechanism) -> None:
    rng, n = np.random.default_rng(1), 20_000
    for part, (mean, variance) in zip((False, True), onerun.score_moments(mechanism), strict=True):
        scores = np.zeros(n)
        for _ in range(mechanism.count):
            drawn = (rng.random(n) < mechanism.sample_rate) & part
            noised = drawn + mechanism.noise_multiplier * rng.standard_normal(n)
            scores += onerun.log_ratio(noised, mechanism.noise_multiplier, mechanism.sample_rate)
        assert mean == pytest.approx(scores.mean(), abs=5 * scores.std() / n**0.5)
        assert variance == pytest.approx(scores.var(), rel=0.1)


@given(st.integers(0, 50), st.integers(1, 50), st.floats(1e-6, 0.3))
def test_the_upper_bound_solves_the_binomial_tail(hits: int, n: int, level: float) -> None:
    hits = min(hits, n)
    bound = float(onerun.upper(hits, n, level))
    assert bound >= hits / n
    if hits < n:
        assert stats.binom.cdf(hits, n, bound) == pytest.approx(level, rel=1e-6)
    else:
        assert bound == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(10, 400), st.floats(0.05, 1), st.floats(0, 1))
def test_more_right_guesses_never_give_a_smaller_bound(canaries: int, share: float, right_share: float) -> None:
    guesses = max(1, round(share * canaries))
    right = round(right_share * guesses)
    found = [onerun.fdp_mu(canaries, guesses, r, 0.05) for r in (right, min(right + 1, guesses))]
    assert found[0] <= found[1] + 1e-9
    assert onerun.fdp_mu(canaries, guesses, guesses // 2, 0.05) == 0


def test_lower_bounds_hold_as_often_as_they_say() -> None:
    """Gaussian release of epsilon 3: each of three bounds passes the truth in at most 5 % of runs."""
    noise, runs, rng = gaussian_noise_for(3.0, DELTA), 80, np.random.default_rng(2)
    mechanism = [Mechanism("a", noise)]
    above = np.zeros(3)
    for _ in range(runs):
        found = onerun.estimates(*gaussian(rng, noise, 400), mechanism, 0.05, DELTA)
        above += [found[k] > 3.0 for k in ("fdp_epsilon", "gdp_epsilon", "steinke_epsilon")]
    assert np.all(above <= stats.binom.isf(1e-4, runs, 0.05))


def test_correct_builds_are_accused_within_the_level() -> None:
    noise, runs, rng = gaussian_noise_for(8.0, DELTA), 200, np.random.default_rng(3)
    curve = lambda a: miss_bound([Mechanism("a", noise)], a)  # noqa: E731

    def accuses(factor: float) -> bool:
        threshold, scores, coins = onerun.calibrated(*gaussian(rng, noise, 1000, factor))
        return any(r.accuses for r in onerun.accusation(scores, coins, [threshold], 0.05, curve))

    assert sum(accuses(1.0) for _ in range(runs)) <= stats.binom.isf(1e-4, runs, 0.05)
    assert all(accuses(factor) for factor in (0.0, 0.1, 0.5, 0.7) for _ in range(20))


def test_power_at_epsilon_8_with_5000_canaries() -> None:
    """One run: the f-DP bound is at least 4 and the Gaussian one at least 6.3 (averages over runs)."""
    noise, rng = gaussian_noise_for(8.0, DELTA), np.random.default_rng(4)
    found = [onerun.estimates(*gaussian(rng, noise, 5000), [Mechanism("a", noise)], 0.05, DELTA) for _ in range(10)]
    assert np.mean([f["fdp_epsilon"] for f in found]) >= 4.5
    assert min(f["fdp_epsilon"] for f in found) >= 4
    assert min(f["gdp_epsilon"] for f in found) >= 6.3
    assert max(f["gdp_epsilon"] for f in found) <= 8.5


def test_scores_without_information_give_no_bound() -> None:
    coins = np.random.default_rng(5).random(500) < 0.5
    found = onerun.estimates(np.zeros(500), coins, [Mechanism("a", 1.0)], 0.05, DELTA)
    assert found["gdp_epsilon"] == found["steinke_epsilon"] == 0
    assert found["fdp_epsilon"] < 0.5
