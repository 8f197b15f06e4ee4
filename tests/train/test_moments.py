"""The closed-form stage: sensitivity to one patient, what it recovers, and that noise is really added."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvae.dp.noise import seeded_noise
from medvae.nets.mixture import MixtureShapes
from medvae.train import denoise, moments
from medvae.train.moments import RELEASES, MomentShapes, Pass, clip_rows, fit_moments, noisy_sum, patient_average
from medvae.types import Batch, Condition, ImageSpace, Intensity

SPACE = ImageSpace(
    (12, 10),
    (1.0, 1.0),
    "MR",
    Intensity("percentile", 1, 99),
    (Condition("kind", "class", ("a", "b")), Condition("age", "continuous", range=(0.0, 1.0))),
    (1,),
)
SHAPES = MomentShapes(basis=(6, 5), coarse=(3, 3), latent_dim=3, spectrum_weight=0.5)
MIXED = replace(SHAPES, mixture=MixtureShapes(components=3, box=(3, 2)), lloyd_steps=2)


class Source:
    """An in-memory cohort with the store's interface."""

    def __init__(self, x, condition, patient):
        self.x, self.condition, self.patient, self.space = x, condition, patient, SPACE

    def rows(self, patients):
        return np.nonzero(np.isin(self.patient, patients))[0]

    def load(self, rows):
        rows = rows[np.argsort(self.patient[rows], kind="stable")]
        return Batch(self.x[rows], self.condition[rows], self.patient[rows])


class Silent:
    """No noise: shows the sums themselves."""

    name = "silent"

    def normal(self, n):
        return np.zeros(n)


def cohort(seed: int, patients: int = 12, extreme: bool = False) -> Source:
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rng.integers(1, 5, patients))
    count = len(patient)
    # Values far outside [0, 1] stand for the worst a broken reader could hand over.
    scale = rng.choice([0.0, 1.0, 1e6], count) if extreme else np.ones(count)
    x = (rng.random((count, 2, 12, 10)) * scale[:, None, None, None]).astype(np.float32)
    kind = np.eye(2)[rng.integers(0, 2, count)]
    condition = np.concatenate([kind, rng.uniform(-1, 1, (count, 1))], axis=1).astype(np.float32)
    return Source(x, condition, patient)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([SHAPES, MIXED]))
def test_one_patient_moves_no_sum_by_more_than_one(seed, extreme, shapes):
    # Each release is checked given the outputs of the earlier ones, as adaptive composition asks: the contribution
    # functions of one run are replayed on the neighbouring cohort.
    source = cohort(seed, extreme=extreme)
    everyone = np.unique(source.patient)
    worst: list[float] = []
    original = moments.noisy_sum

    def check(scans, contribution, noise_multiplier, noise, *_):
        full = original(scans, contribution, 0.0, noise)
        for left_out in everyone[:4]:
            neighbour = Pass(scans.source, everyone[everyone != left_out])
            worst.append(float(np.linalg.norm(full - original(neighbour, contribution, 0.0, noise))))
        return full

    try:
        moments.noisy_sum = check
        fit_moments(source, everyone, dict.fromkeys(shapes.releases, 0.0), shapes, noise=Silent())
    finally:
        moments.noisy_sum = original
    assert len(worst) == 4 * len(shapes.releases)
    # A float64 sum over a dozen patients keeps at least twelve digits.
    assert max(worst) <= 1 + 1e-9


def test_a_contribution_over_the_bound_is_clipped_and_not_trusted():
    source = cohort(0)
    everyone = np.unique(source.patient)
    huge = noisy_sum(Pass(source, everyone), lambda b: torch.full((len(b.x), 4), 100.0), 0.0, Silent())
    assert np.linalg.norm(huge) <= len(everyone) + 1e-9


def test_two_scans_of_a_patient_weigh_as_one_patient():
    average = patient_average(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.array([4, 4, 9]))
    torch.testing.assert_close(average, torch.tensor([[0.5, 0.5], [1.0, 1.0]]))


def test_clip_rows_scales_to_at_most_one():
    out = clip_rows(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 2.0)
    torch.testing.assert_close(torch.linalg.vector_norm(out, dim=1), torch.tensor([1.0, 0.25]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_counts_as_zero(bad):
    out = clip_rows(torch.tensor([[bad, 1.0], [0.6, 0.8]]), 1.0)
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


def test_chunks_hold_whole_patients_and_miss_none(monkeypatch):
    source = cohort(3, patients=20)
    monkeypatch.setattr(moments, "CHUNK_VOXELS", 5 * 2 * 12 * 10)
    batches = list(Pass(source, np.unique(source.patient)))
    assert len(batches) > 3
    seen = [set(b.patient.tolist()) for b in batches]
    assert sum(len(s) for s in seen) == 20
    assert sum(len(b.x) for b in batches) == len(source.patient)


@pytest.mark.parametrize("planted", [1.0, 0.5])
def test_the_released_sum_carries_the_planned_noise(planted):
    # 4,000 coordinates: a chi-square test with false alarms at 1e-6 that must reject half of the planned sigma.
    source = cohort(1)
    everyone = np.unique(source.patient)
    sigma = 3.0
    released = noisy_sum(
        Pass(source, everyone), lambda b: torch.zeros(len(b.x), 4000), sigma * planted, seeded_noise(5)
    )
    statistic = np.square(released / sigma).sum()
    spread = 4.9 * np.sqrt(2 * 4000)
    assert (abs(statistic - 4000) < spread) == (planted == 1.0)


def test_without_noise_the_conditional_means_are_the_class_means():
    rng = np.random.default_rng(0)
    patients = 400
    kind = rng.integers(0, 2, patients)
    pattern = rng.random((2, 2, 12, 10)) * 0.5
    # Smooth patterns inside the basis.
    part_source = Source(
        np.zeros((patients, 2, 12, 10), np.float32),
        np.concatenate([np.eye(2)[kind], np.zeros((patients, 1))], axis=1).astype(np.float32),
        np.arange(patients),
    )
    from medvae.nets.linear import LinearPart

    basis = LinearPart(SPACE, SHAPES.basis, 1)
    smooth = basis.expand(basis.reduce(torch.tensor(pattern, dtype=torch.float32)))
    part_source.x = (smooth.numpy()[kind] + 0.01 * rng.standard_normal((patients, 2, 12, 10))).astype(np.float32)
    part = fit_moments(part_source, np.arange(patients), dict.fromkeys(RELEASES, 1e-9), SHAPES, noise=seeded_noise(0))
    fitted = part.expand(part.mean_coefficients(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])))
    error = (fitted - smooth).square().mean().sqrt()
    contrast = (smooth[0] - smooth[1]).square().mean().sqrt()
    assert error < 0.15 * contrast


def test_directions_find_a_planted_factor_and_noise_alone_gives_none():
    rng = np.random.default_rng(0)
    base = cohort(0, patients=500)
    rows = len(base.patient)
    wave = np.cos(np.pi * (np.arange(12) + 0.5) / 12)[:, None] * np.ones(10)
    factor = rng.standard_normal(rows)
    base.x = (0.5 + 0.1 * factor[:, None, None, None] * wave + 0.01 * rng.standard_normal(base.x.shape)).astype(
        np.float32
    )
    everyone = np.unique(base.patient)
    part = fit_moments(base, everyone, dict.fromkeys(RELEASES, 0.5), SHAPES, noise=seeded_noise(0))
    lengths = part.directions.flatten(1).norm(dim=1)
    assert lengths[0] > 0
    codes = part.encode(torch.from_numpy(base.x), torch.from_numpy(base.condition))[:, 0].numpy()
    assert abs(np.corrcoef(codes, factor)[0, 1]) > 0.95
    base.x[:] = 0.5
    nothing = fit_moments(base, everyone, dict.fromkeys(RELEASES, 0.5), SHAPES, noise=seeded_noise(0))
    # Constant scans: whatever directions are left are not longer than the clip floor lets noise be.
    assert nothing.directions.flatten(1).norm(dim=1).max() < 0.1 * lengths[0]


def test_contrast_is_kept_above_the_noise_and_dropped_below_it():
    total = np.array([[50.0, 8.0], [8.0, 20.0]])
    assert denoise.mask_contrast(total, 0.1)[0] == pytest.approx(0.4, rel=0.01)
    assert denoise.mask_contrast(total, 9.0)[0] == 0.0


def test_tamed_spectra_fall_with_frequency_and_are_covariances():
    rng = np.random.default_rng(0)
    noisy = np.stack([np.diag([s, s / 2]) for s in np.linspace(10, -1, 12)]) + rng.standard_normal((12, 2, 2))
    tamed = denoise.tame_spectra(noisy, np.linspace(2, 0.1, 12))
    assert np.linalg.eigvalsh(tamed).min() > -1e-9
    power = np.einsum("scc->sc", tamed)
    assert (np.diff(power, axis=0) <= 1e-6 + 0.05 * power[:-1]).all()
