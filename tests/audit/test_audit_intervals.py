"""Intervals: closed forms, and coverage by simulation with fixed seeds (bands of more than four standard errors)."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from medvae.audit.intervals import (
    auc,
    auc_interval,
    clopper_pearson,
    mean_interval,
    normal_bootstrap,
    patient_weights,
    percentile_bootstrap,
)
from medvae.audit.membership import Scores, band


def test_clopper_pearson_against_published_values() -> None:
    # 0 of 10 and 5 of 10 at 95 %: 1 - 0.025 ** 0.1, and the values of any table of the binomial.
    assert clopper_pearson(0, 10, 0.95) == pytest.approx((0, 1 - 0.025**0.1))
    assert clopper_pearson(5, 10, 0.95) == pytest.approx((0.18709, 0.81291), abs=1e-5)
    assert clopper_pearson(10, 10, 0.95)[1] == 1.0


@pytest.mark.parametrize("p", [0.01, 0.2, 0.9])
def test_clopper_pearson_covers_at_least_its_confidence(p: float) -> None:
    hits = np.random.default_rng(0).binomial(40, p, size=2000)
    inside = [low <= p <= high for low, high in (clopper_pearson(int(h), 40, 0.9) for h in hits)]
    assert np.mean(inside) >= 0.9 - 4 * np.sqrt(0.09 / 2000)


def test_auc_equals_pair_counting_with_ties() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, 30), rng.integers(0, 5, 20)
    pairs = (a[:, None] > b).mean() + 0.5 * (a[:, None] == b).mean()
    assert auc(a, b) == pytest.approx(pairs)


@pytest.mark.parametrize(("shift", "truth"), [(0.0, 0.5), (1.0, 0.7602), (2.5, 0.9615)])
def test_auc_interval_covers(shift: float, truth: float) -> None:
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(600):
        found = auc_interval(rng.normal(shift, 1, 25), rng.normal(0, 1, 25), 0.95)
        inside += found.low <= truth <= found.high
    assert 0.91 <= inside / 600 <= 0.995


def test_auc_interval_of_perfect_separation_does_not_pretend_certainty() -> None:
    found = auc_interval(np.arange(10, 20), np.arange(10), 0.95)
    assert found.value == 1.0
    assert 0.6 < found.low < 0.95
    assert found.high == 1.0


def test_bootstrap_by_patient_is_wider_than_by_scan_and_covers() -> None:
    rng = np.random.default_rng(3)
    inside, by_scan = 0, 0
    for _ in range(200):
        person = np.repeat(np.arange(40), 4)
        value = np.repeat(rng.normal(0, 1, 40), 4) + rng.normal(0, 0.1, 160)

        def mean(rows: np.ndarray, value: np.ndarray = value) -> float:
            return float(value[rows].mean())

        found = percentile_bootstrap(mean, person, 0.95, 200, rng)
        inside += found.low <= 0 <= found.high
        naive = percentile_bootstrap(mean, np.arange(160), 0.95, 200, rng)
        by_scan += naive.low <= 0 <= naive.high
    assert 0.88 <= inside / 200 <= 1.0
    assert by_scan / 200 < 0.8  # what counting scans as units would have pretended


def test_normal_bootstrap_covers_a_mean_and_respects_its_floor() -> None:
    rng = np.random.default_rng(4)
    inside = 0
    for _ in range(300):
        x, patient = rng.exponential(1, 40), np.arange(40)
        draws = patient_weights(patient, 200, rng) @ x / 40
        found = normal_bootstrap(float(x.mean()), draws, 0.95, 40, floor=0.0)
        inside += found.low <= 1 <= found.high
    assert 0.87 <= inside / 300 <= 0.99
    assert normal_bootstrap(0.1, [0.0, 1.0, 2.0], 0.95, 3, floor=0.0).low == 0.0


def test_patient_weights_keep_scans_of_a_patient_together() -> None:
    weights = patient_weights(np.asarray([7, 7, 3, 9, 9, 9]), 50, np.random.default_rng(5))
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, 0] + weights[:, 2] + weights[:, 3] == 3).all()


def test_mean_interval_covers() -> None:
    rng = np.random.default_rng(6)
    found = [mean_interval(rng.normal(2, 1, 8), 0.95) for _ in range(1000)]
    assert 0.92 <= np.mean([f.low <= 2 <= f.high for f in found]) <= 0.98


@pytest.mark.parametrize(("members", "others"), [(60, 60), (250, 40)])
def test_the_band_around_an_roc_holds_the_true_curve(members: int, others: int) -> None:
    """At a few rates of a known curve, one at a time, as the band is drawn: between its two edges."""
    rng, rates, shift = np.random.default_rng(11), np.asarray([0.05, 0.2, 0.5]), 1.0
    truth = norm.sf(norm.isf(rates) - shift)
    inside = np.zeros(len(rates))
    for _ in range(400):
        found = band(Scores(rng.normal(shift, 1, members), rng.normal(0, 1, others)), 0.95)
        low, high = (np.asarray([found[edge]["fpr"], found[edge]["tpr"]]) for edge in ("low", "high"))
        below = np.asarray([low[1][low[0] <= r].max(initial=0.0) for r in rates])
        above = np.asarray([high[1][high[0] >= r].min(initial=1.0) for r in rates])
        inside += (below <= truth) & (truth <= above)
    assert (inside / 400 >= 0.95).all()
    assert np.ptp([below, above], axis=0).max() < 0.7  # and it is no band that holds everything
