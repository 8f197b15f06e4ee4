"""The trade-off curve, against closed forms of the Gaussian mechanism and against a simulated attacker."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from medvae.dp.accounting import gaussian_noise_for, pld_epsilon
from medvae.dp.tradeoff import (
    advantage,
    claim_tpr_bound,
    epsilon_for_advantage,
    epsilon_for_reid,
    gdp_mu,
    miss_bound,
    plain_words,
    reid_bound,
    tpr_bound,
)
from medvae.errors import ConfigError
from medvae.types import Mechanism

FPR = np.asarray([0.0, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0])


def gaussian(epsilon: float) -> list[Mechanism]:
    return [Mechanism("gaussian", gaussian_noise_for(epsilon, 1e-5))]


@pytest.mark.parametrize(("epsilon", "adv", "tpr_percent"), [(1.0, 0.11, 0.24), (8.0, 0.60, 7.7)])
def test_stated_figures_of_the_gaussian_mechanism(epsilon: float, adv: float, tpr_percent: float) -> None:
    """The figures that the docs state for a Gaussian mechanism at delta 1e-5."""
    assert round(advantage(gaussian(epsilon)), 2) == adv
    assert float(f"{100 * float(tpr_bound(gaussian(epsilon), 1e-3)):.2g}") == tpr_percent


@pytest.mark.parametrize("mu", [0.05, 0.27, 1.0, 1.67, 4.0])
def test_gaussian_curve_equals_its_closed_form(mu: float) -> None:
    """f(a) = Phi(Phi^-1(1 - a) - mu): Dong, Roth & Su 2022, equation 6. The bound may only lie below it."""
    plan = [Mechanism("gaussian", 1 / mu)]
    exact = norm.cdf(norm.ppf(1 - FPR) - mu)
    bound = miss_bound(plan, FPR)
    assert np.all(bound <= exact + 1e-12)
    np.testing.assert_allclose(bound, exact, atol=2e-4)
    small = FPR[1:4]
    np.testing.assert_allclose(tpr_bound(plan, small), norm.sf(norm.isf(small) - mu), rtol=0.02)
    assert gdp_mu(plan) == pytest.approx(mu, rel=2e-3)
    assert gdp_mu(plan) >= mu * (1 - 1e-9)
    assert advantage(plan) == pytest.approx(2 * norm.cdf(mu / 2) - 1, rel=1e-3)


def test_curve_of_dpsgd_is_a_trade_off_function_below_the_claims_lines() -> None:
    plan = [Mechanism("moments", 2.0), Mechanism("dpsgd", 1.2, 0.1, 100)]
    a = np.linspace(0, 1, 201)
    f = miss_bound(plan, a)
    assert np.all(np.diff(f) <= 1e-12)  # falling
    assert np.all(np.diff(f, 2) >= -1e-9)  # convex
    assert np.all(f <= 1 - a + 1e-12)
    for delta in (1e-7, 1e-5, 1e-2):
        assert np.all(tpr_bound(plan, a) <= claim_tpr_bound(pld_epsilon(plan, delta), delta, a) + 1e-6)


def test_the_best_attacker_meets_the_bound_and_never_passes_it() -> None:
    """Simulated likelihood-ratio attack on ten sampled steps: within four standard errors, under the curve."""
    noise, rate, steps, runs = 0.9, 0.3, 10, 200_000
    rng = np.random.default_rng(0)

    def score(member: bool) -> np.ndarray:
        drawn = rng.random((runs, steps)) < rate if member else np.zeros((runs, steps), dtype=bool)
        g = drawn + noise * rng.standard_normal((runs, steps))
        return np.log1p(rate * np.expm1((g - 0.5) / noise**2)).sum(axis=1)

    outside, inside = np.sort(score(False)), score(True)
    plan = [Mechanism("dpsgd", noise, rate, steps)]
    best_gap = 0.0
    for fpr in (0.001, 0.01, 0.1, 0.3):
        tpr = float((inside > outside[int((1 - fpr) * runs)]).mean())
        bound = float(tpr_bound(plan, fpr))
        error = 4 * math.sqrt(tpr * (1 - tpr) / runs) + 4 * math.sqrt(fpr / runs) * bound / fpr
        assert tpr <= bound + error
        best_gap = max(best_gap, tpr / bound)
    assert best_gap > 0.95  # and the bound is not empty


def test_no_noise_bounds_nothing_and_no_release_tells_nothing() -> None:
    assert np.all(tpr_bound([Mechanism("m", 0.0)], FPR) == 1.0)
    assert advantage([Mechanism("m", 0.0)]) == 1.0
    assert math.isinf(gdp_mu([Mechanism("m", 0.0)]))
    np.testing.assert_allclose(tpr_bound([], FPR), FPR, atol=1e-9)
    assert advantage([]) == 0.0
    assert gdp_mu([]) == 0.0


def test_an_epsilon_beyond_the_range_of_exp_bounds_nothing() -> None:
    hardly = [Mechanism("m", 0.024)]  # epsilon about 1046 at delta 1e-5
    np.testing.assert_allclose(tpr_bound(hardly, [0.0, 1e-3, 0.5]), 1.0, atol=1e-4)
    assert "at most 1000 of 1,000" in " ".join(plain_words(1046.0, 1e-5, hardly))


def test_shapes_and_range_of_the_rates() -> None:
    assert tpr_bound(gaussian(1.0), 0.5).shape == ()
    assert tpr_bound(gaussian(1.0), np.full((2, 3), 0.5)).shape == (2, 3)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="rate of false accusations"):
            tpr_bound(gaussian(1.0), wrong)


@pytest.mark.parametrize("wanted", [0.05, 0.11, 0.4])
def test_epsilon_from_a_wanted_advantage(wanted: float) -> None:
    epsilon = epsilon_for_advantage(wanted, 1e-5)
    assert advantage(gaussian(epsilon)) == pytest.approx(wanted, rel=2e-3)
    with pytest.raises(ConfigError, match="advantage"):
        epsilon_for_advantage(1.0, 1e-5)


def test_epsilon_from_a_wanted_risk() -> None:
    epsilon = epsilon_for_reid(0.09, 0.01, 1e-5)
    assert reid_bound(gaussian(epsilon), 0.01) == pytest.approx(0.09, rel=5e-3)
    for risk, baseline in [(0.01, 0.09), (0.5, 0.0), (1.0, 0.5)]:
        with pytest.raises(ConfigError, match="risk"):
            epsilon_for_reid(risk, baseline, 1e-5)


def test_plain_words_say_what_holds_and_round_up() -> None:
    words = plain_words(8.0, 1e-5, gaussian(8.0))
    text = " ".join(words)
    for part in (
        "epsilon 8",
        "delta 1e-05",
        "patient",
        "add-remove",
        "PLD",
        "at most 78 of 1,000",
        "80 %",
        "weak promise",
    ):
        assert part in text
    assert "2.4 of 1,000" in " ".join(plain_words(1.0, 1e-5, gaussian(1.0)))
    assert "strong" in plain_words(1.0, 1e-5, gaussian(1.0))[-1]
    assert "moderate" in plain_words(3.0, 1e-5, gaussian(3.0))[-1]
    assert "hardly a promise" in plain_words(50.0, 1e-5, gaussian(50.0))[-1]
    assert "may not be released" in plain_words(math.inf, 1e-5, [Mechanism("m", 0.0)])[0]
