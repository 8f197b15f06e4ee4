"""Poisson sampling of patients, and the choice of scans inside one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from medvae.dp.noise import seeded_noise
from medvae.train.sampler import IntArray, PatientSampler
from medvae.types import Batch, ImageSpace, Intensity

SPACE = ImageSpace((2, 2), (1.0, 1.0), "MR", Intensity("window", 0, 1), ())
FALSE_ALARM = 1e-6


class FakeStore:
    """Patient p has scans 10 p .. 10 p + p % 6."""

    space = SPACE

    def rows(self, patients: IntArray) -> IntArray:
        return np.concatenate([np.arange(10 * p, 10 * p + 1 + p % 6) for p in patients])

    def load(self, rows: IntArray) -> Batch:
        return Batch(np.zeros((len(rows), 1, 2, 2), np.float32), np.zeros((len(rows), 0), np.float32), rows // 10)


def sampler(rate: float, cap: int = 3, patients: int = 60) -> PatientSampler:
    return PatientSampler(FakeStore(), np.arange(patients, dtype=np.int64), rate, cap)


def test_a_draw_is_whole_patients_sorted_and_capped() -> None:
    source = seeded_noise(1)
    for _ in range(30):
        batch = sampler(0.4).load(sampler(0.4).draw(source))
        assert (np.diff(batch.patient) >= 0).all()
        patients, counts = np.unique(batch.patient, return_counts=True)
        assert (counts == np.minimum(3, 1 + patients % 6)).all()


def test_patients_are_drawn_independently_at_the_rate() -> None:
    """Counts of drawn patients are binomial: their mean and variance, and every patient's own frequency."""
    source, draws, rate, n = seeded_noise(2), 3000, 0.1, 60
    hits = np.zeros(n)
    sizes = []
    for _ in range(draws):
        drawn = np.unique(sampler(rate).draw(source) // 10)
        hits[drawn] += 1
        sizes.append(len(drawn))
    statistic = float(((hits - draws * rate) ** 2 / (draws * rate * (1 - rate))).sum())
    assert stats.chi2.sf(statistic, n) > FALSE_ALARM
    dispersion = float(np.var(sizes) * draws / (n * rate * (1 - rate)))
    assert FALSE_ALARM < stats.chi2.cdf(dispersion, draws - 1) < 1 - FALSE_ALARM


def test_scans_inside_a_patient_are_chosen_uniformly() -> None:
    source, draws = seeded_noise(3), 3000
    one = PatientSampler(FakeStore(), np.asarray([5], dtype=np.int64), 1.0, 2)
    hits = np.bincount(np.concatenate([one.draw(source) - 50 for _ in range(draws)]), minlength=6)
    assert hits.sum() == 2 * draws
    assert stats.chisquare(hits).pvalue > FALSE_ALARM


def test_an_empty_draw_is_a_batch_of_no_scans() -> None:
    batch = sampler(0.0).load(sampler(0.0).draw(seeded_noise(4)))
    assert batch.x.shape == (0, 1, 2, 2)
    assert batch.condition.shape == (0, 0)
    assert len(batch.patient) == 0


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_the_expected_number_is_rate_times_patients(rate: float) -> None:
    assert sampler(rate).expected_patients == pytest.approx(60 * rate)
