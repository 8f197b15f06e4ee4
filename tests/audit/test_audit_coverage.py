"""Every interval of the audit that tests/audit/test_audit_intervals.py does not check by itself: simulated coverage.

Nominal 95 %. Bounds below allow for the number of simulations, and for bootstraps of small groups, which are a little
short; an interval that is half as wide as it should be falls out. In three dimensions in place of sixteen, where the
cubic kernel has far heavier tails, the kernel distance's interval covers in 83 % only: the audit uses more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm

from medvae.audit import copies, membership, radiomics
from medvae.audit.fidelity import Group, frechet_distance, kernel_distance, manifold
from medvae.audit.intervals import Estimate
from medvae.audit.membership import Scores

RUNS, REPLICATES, PERSONS, SIZE = 120, 60, 50, 16
SHIFT, SCALE = 0.5, 1.2
Draw = Callable[[np.random.Generator, int], np.ndarray]


def real(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=(n, SIZE))


def made(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=(n, SIZE)) * SCALE + SHIFT


def scans_of(rng: np.random.Generator, draw: Draw, persons: int) -> Group:
    """Two scans a person, much alike: intervals have to count persons."""
    x = np.repeat(draw(rng, persons), 2, axis=0)
    return Group(x + 0.05 * rng.normal(size=x.shape), np.repeat(np.arange(persons), 2))


def kernel_truth() -> float:
    """The squared MMD between the two laws under the cubic kernel, by a large sample."""
    rng = np.random.default_rng(0)
    values = [
        kernel_distance(scans_of(rng, real, 600), scans_of(rng, made, 600), 0.95, 2, rng).value for _ in range(12)
    ]
    return float(np.mean(values))


def frechet_truth() -> float:
    """What it is on average on this many scans: a Fréchet distance grows where scans are few, and so does its floor."""
    rng = np.random.default_rng(0)
    values = [
        frechet_distance(scans_of(rng, real, PERSONS), scans_of(rng, made, PERSONS), 0.95, 2, rng).value
        for _ in range(200)
    ]
    return float(np.mean(values))


@pytest.mark.parametrize(
    ("distance", "truth"),
    [(frechet_distance, frechet_truth), (kernel_distance, kernel_truth)],
    ids=["frechet", "kernel"],
)
def test_intervals_of_distances_cover(distance: Callable[..., Estimate], truth: Callable[[], float]) -> None:
    rng, expected = np.random.default_rng(1), truth()
    found = [
        distance(scans_of(rng, real, PERSONS), scans_of(rng, made, PERSONS), 0.95, REPLICATES, rng) for _ in range(RUNS)
    ]
    assert 0.86 <= np.mean([f.low <= expected <= f.high for f in found]) <= 0.995


def test_intervals_of_manifold_scores_cover_for_neighbourhoods_that_stay() -> None:
    rng = np.random.default_rng(2)
    around = scans_of(rng, real, PERSONS)
    names = ("precision", "density")  # of synthetic scans, drawn anew; recall and coverage are the same, turned around
    truth = manifold(around, scans_of(rng, made, 2000), 0.95, 2, rng)
    inside = dict.fromkeys(names, 0)
    for _ in range(RUNS):
        found = manifold(around, scans_of(rng, made, PERSONS), 0.95, REPLICATES, rng)
        for name in names:
            inside[name] += found[name].low <= truth[name].value <= found[name].high
    assert all(0.86 <= hits / RUNS <= 0.995 for hits in inside.values())


def test_the_interval_of_the_median_feature_distance_covers() -> None:
    rng = np.random.default_rng(3)
    spread = np.ones(SIZE)
    large = [real(rng, 5000), made(rng, 5000)]
    truth = float(np.median(radiomics.wasserstein(*large, spread)))
    inside, runs = 0, 60
    for _ in range(runs):
        a, b, persons = real(rng, 80), made(rng, 80), np.arange(80)
        found = radiomics.median_wasserstein(a, persons, b, persons, 0.95, 30, rng)
        inside += found.low <= truth <= found.high
    assert inside / runs >= 0.85


@pytest.mark.parametrize(("members", "others", "asked"), [(40, 100, 0.01), (150, 60, 0.1)])
def test_a_rate_covers_for_the_threshold_it_used_and_bounds_its_false_positives(
    members: int, others: int, asked: float
) -> None:
    rng, shift = np.random.default_rng(4), 2.0
    found, missed, above = 600, 0, 0
    for _ in range(found):
        scores = Scores(rng.normal(shift, 1, members), rng.normal(0, 1, others))
        rate = membership.rate(scores, asked, 0.95)
        assert rate.low is not None
        assert rate.high is not None
        assert rate.fpr_high is not None
        threshold = np.sort(scores.others)[::-1][int(asked * others)]
        missed += not rate.low <= norm.sf(threshold - shift) <= rate.high
        above += norm.sf(threshold) > rate.fpr_high
    assert missed / found <= 0.07
    assert above / found <= 0.05


def test_the_share_of_flagged_scans_covers() -> None:
    rng, truth = np.random.default_rng(5), 0.03
    found = [copies.share_below(rng.random(300), truth, 0.95) for _ in range(400)]
    assert np.mean([f.low <= truth <= f.high for f in found]) >= 0.93
