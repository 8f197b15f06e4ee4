"""PLD accounting: published values, closed forms, bounds that hold, and calibration."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvae.dp.accounting import (
    calibrate_noise,
    canonical,
    delta_curve,
    dp_event,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_noise_for,
    pld_delta,
    pld_epsilon,
)
from medvae.errors import ConfigError
from medvae.types import Mechanism


def sgd(noise: float, rate: float, steps: int) -> list[Mechanism]:
    return [Mechanism("dpsgd", noise, rate, steps)]


# --- published values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "epochs", "clt", "moments"), [(1.3, 15, 0.83, 1.19), (1.1, 60, 2.32, 3.01), (0.7, 45, 5.07, 7.10)]
)
def test_mnist_tutorial_lies_between_published_bounds(noise: float, epochs: int, clt: float, moments: float) -> None:
    """MNIST tutorials of TensorFlow Privacy; both figures in Bu, Dong, Long & Su 2020 (HDSR 2(3)), table 1.

    The moments accountant is an upper bound and the central limit theorem underestimates; PLD is tight between them.
    """
    epsilon = pld_epsilon(sgd(noise, 256 / 60000, round(epochs * 60000 / 256)), 1e-5)
    assert clt < epsilon < moments
    assert epsilon < 0.85 * moments


def test_agrees_with_published_prv_rdp_and_gdp_figures() -> None:
    """Opacus's own tests state 6.7774 by PRV (upper bound, error 0.01), 7.3291 by RDP, 6.59 by GDP for this plan."""
    epsilon = pld_epsilon(sgd(1.5, 0.04, 2250), 1e-5)
    assert 6.777395712150674 - 0.03 < epsilon <= 6.777395712150674
    assert 6.6 < epsilon < 7.32911117143


def test_published_deltas_of_dp_accounting() -> None:
    """Exact deltas stated in dp_accounting's tests (pld_privacy_accountant_test.py), to the digits given there."""
    assert pld_delta([Mechanism("g", math.sqrt(3), 1.0, 3)], 1.0) == pytest.approx(0.126936, abs=2e-6)
    assert pld_delta(sgd(0.5, 0.2, 3), 1.0) == pytest.approx(0.15594, abs=1e-5)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-6), (1.0, 1e-5), (8.0, 1e-5), (20.0, 1e-9)])
def test_analytic_gaussian_equals_googles(epsilon: float, delta: float) -> None:
    assert gaussian_noise_for(epsilon, delta) == pytest.approx(
        dp_accounting.get_sigma_gaussian(epsilon, delta), rel=1e-6
    )


def test_analytic_gaussian_needs_a_third_less_noise_than_the_classical_one() -> None:
    """Balle & Wang 2018, abstract, against sqrt(2 ln(1.25/delta))/epsilon (Dwork & Roth 2014), at small epsilon too."""
    for epsilon in (0.1, 0.5, 1.0):
        assert gaussian_noise_for(epsilon, 1e-5) < 0.8 * math.sqrt(2 * math.log(1.25e5)) / epsilon


# --- closed forms -----------------------------------------------------------------------------------------------------


@given(noise=st.floats(0.2, 50), count=st.integers(1, 1000), delta=st.sampled_from([1e-9, 1e-7, 1e-5, 1e-3]))
@settings(max_examples=30, deadline=None)
def test_gaussian_composition_is_bounded_from_above_and_tight(noise: float, count: int, delta: float) -> None:
    total = noise / math.sqrt(count)
    if total < 0.1:
        total, count = noise, 1
    exact = gaussian_epsilon(total, delta)
    stated = pld_epsilon([Mechanism("g", noise, 1.0, count)], delta)
    assert exact <= stated <= 1.001 * exact + 2e-6


@given(noise=st.floats(0.05, 100), epsilon=st.floats(0.01, 50))
@settings(max_examples=200, deadline=None)
def test_gaussian_delta_falls_with_noise_and_epsilon_and_inverts(noise: float, epsilon: float) -> None:
    delta = gaussian_delta(noise, epsilon)
    assert 0 <= delta <= 1
    assert gaussian_delta(noise * 1.1, epsilon) <= delta
    assert gaussian_delta(noise, epsilon * 1.1) <= delta
    if 1e-10 < delta < 0.1:
        assert gaussian_epsilon(noise, delta) == pytest.approx(epsilon, rel=1e-6)
        assert gaussian_noise_for(epsilon, delta) == pytest.approx(noise, rel=1e-6)


def test_epsilon_and_delta_invert_each_other() -> None:
    plan = [*sgd(1.2, 0.1, 200), Mechanism("moments", 2.0)]
    epsilon = pld_epsilon(plan, 1e-5)
    assert pld_delta(plan, epsilon) <= 1e-5
    assert pld_delta(plan, 0.99 * epsilon) > 1e-5


def test_subsampled_delta_of_one_step_equals_direct_integration() -> None:
    """One step, by quadrature of both hockey-stick divergences of N(0, s^2) and (1-q) N(0, s^2) + q N(1, s^2)."""
    noise, rate, epsilon = 0.8, 0.3, 0.7
    x = np.linspace(-12, 13, 2_000_001)
    without = np.exp(-(x**2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
    shifted = np.exp(-((x - 1) ** 2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
    with_patient = (1 - rate) * without + rate * shifted
    step = x[1] - x[0]
    removed = np.maximum(with_patient - math.exp(epsilon) * without, 0).sum() * step
    added = np.maximum(without - math.exp(epsilon) * with_patient, 0).sum() * step
    assert pld_delta(sgd(noise, rate, 1), epsilon) == pytest.approx(max(removed, added), rel=1e-3)


# --- the composition --------------------------------------------------------------------------------------------------


def test_grid_width_of_a_claim_is_fine_enough_at_every_scale() -> None:
    """The width follows from the mechanisms: a grid ten times finer, by the library itself, changes 0.1 % at most."""
    for noise, rate, steps in [(1.1, 0.01, 1000), (20.0, 0.01, 5000), (0.5, 0.02, 100), (50.0, 0.5, 200)]:
        accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=2e-5 if noise > 10 else 1e-4)
        accountant.compose(dp_event(sgd(noise, rate, steps)))
        assert pld_epsilon(sgd(noise, rate, steps), 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=2e-3)


def test_order_and_grouping_do_not_matter() -> None:
    a, b, c = Mechanism("a", 2.0), Mechanism("b", 1.5, 0.1, 50), Mechanism("c", 1.5, 0.1, 70)
    merged = Mechanism("bc", 1.5, 0.1, 120)
    assert canonical([a, b, c]) == canonical([c, a, b]) == canonical([merged, a])
    assert pld_epsilon([c, b, a], 1e-6) == pld_epsilon([a, merged], 1e-6)


def test_one_more_release_costs_and_more_noise_saves() -> None:
    base = sgd(1.2, 0.1, 100)
    epsilon = pld_epsilon(base, 1e-5)
    assert pld_epsilon([*base, Mechanism("moments", 3.0)], 1e-5) > epsilon
    assert pld_epsilon(sgd(1.3, 0.1, 100), 1e-5) < epsilon < pld_epsilon(sgd(1.2, 0.11, 100), 1e-5)
    assert pld_epsilon(base, 1e-7) > epsilon


def test_no_noise_is_no_promise_and_nothing_costs_nothing() -> None:
    assert math.isinf(pld_epsilon([Mechanism("g", 0.0)], 1e-5))
    assert math.isinf(pld_epsilon([*sgd(1.0, 0.1, 10), Mechanism("g", 0.0)], 1e-5))
    assert pld_delta(sgd(0.0, 0.1, 10), 100.0) == 1.0
    assert pld_epsilon([], 1e-5) == 0.0
    assert pld_delta([], 0.5) == 0.0
    assert math.isinf(pld_epsilon(sgd(0.001, 0.5, 10**6), 1e-5))


def test_delta_curve_falls_from_one_to_nothing() -> None:
    epsilons = np.linspace(-20, 20, 81)
    deltas = delta_curve(sgd(1.0, 0.2, 20), epsilons)
    assert np.all(np.diff(deltas) <= 1e-12)
    assert deltas[0] > 0.99
    assert deltas[-1] < 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        Mechanism("m", -1.0),
        Mechanism("m", math.nan),
        Mechanism("m", math.inf),
        Mechanism("m", 1.0, 0.0),
        Mechanism("m", 1.0, 1.1),
        Mechanism("m", 1.0, math.nan),
        Mechanism("m", 1.0, 0.5, 0),
        Mechanism("m", 1.0, 0.5, 2.5),  # type: ignore[arg-type]
    ],
)
def test_values_out_of_range_are_refused_in_one_sentence(wrong: Mechanism) -> None:
    with pytest.raises(ConfigError, match=r"'m' is .*give a") as caught:
        pld_epsilon([wrong], 1e-5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("delta", [0.0, -1e-5, 1.0, math.nan, 1e-15])
def test_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError, match="delta is"):
        pld_epsilon(sgd(1.0, 0.1, 10), delta)


# --- calibration ------------------------------------------------------------------------------------------------------


@given(
    epsilon=st.floats(0.2, 20),
    rate=st.sampled_from([0.02, 0.1, 0.5, 1.0]),
    steps=st.sampled_from([1, 30, 300]),
    delta=st.sampled_from([1e-6, 1e-4]),
)
@settings(max_examples=8, deadline=None)
def test_calibrated_noise_holds_the_claim_and_wastes_nothing(
    epsilon: float, rate: float, steps: int, delta: float
) -> None:
    noise = calibrate_noise(lambda z: sgd(z, rate, steps), epsilon, delta)
    assert pld_epsilon(sgd(noise, rate, steps), delta) <= epsilon
    assert pld_epsilon(sgd(noise * 0.999, rate, steps), delta) > epsilon
    assert noise == float(f"{noise:.5g}")  # the number written down is the number claimed


def test_calibration_accounts_for_what_else_is_released() -> None:
    alone = calibrate_noise(lambda z: sgd(z, 0.1, 100), 4.0, 1e-5)
    beside = calibrate_noise(lambda z: [Mechanism("moments", 1.5), *sgd(z, 0.1, 100)], 4.0, 1e-5)
    assert beside > 1.1 * alone


def test_calibration_ends_in_a_word_where_nothing_fits() -> None:
    with pytest.raises(ConfigError, match="no noise is enough"):
        calibrate_noise(lambda z: [Mechanism("moments", 0.5), *sgd(z, 0.1, 100)], 1.0, 1e-5)
    with pytest.raises(ConfigError, match="so large"):
        calibrate_noise(lambda _: [Mechanism("moments", 5.0)], 8.0, 1e-5)
    for epsilon in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="epsilon is"):
            calibrate_noise(lambda z: sgd(z, 0.1, 100), epsilon, 1e-5)
    assert calibrate_noise(lambda z: sgd(z, 0.1, 100), math.inf, 1e-5) == 0.0
