"""The pieces against what they promise: the false-alarm rate, corruptions, arcs, and evening out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvae.errors import ConfigError, InputError
from medvae.latent import anomaly
from medvae.latent.augment import deficits
from medvae.latent.cluster import cluster, two_dimensions
from medvae.latent.corrupt import CORRUPTIONS, corrupt
from medvae.latent.restore import BASELINES, psnr, ssim
from medvae.synth.walk import arc


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (40, 0.1), (99, 0.05)])
def test_the_false_alarm_rate_holds_and_is_not_wasted(n, rate):
    rng = np.random.default_rng(n)
    trials = 20_000
    normal, further = rng.standard_normal((trials, n)), rng.standard_normal(trials)
    limits = np.asarray([anomaly.threshold(row, rate) for row in normal])
    alarms = float((further > limits).mean())
    error = 4 * math.sqrt(rate / trials)
    assert alarms <= rate + error
    assert alarms >= rate - 1 / (n + 1) - error
    # The plain quantile of n scores, without the further patient, breaks the promise: this test would see it.
    plain = np.quantile(normal, 1 - rate, axis=1, method="lower")
    assert float((further > plain).mean()) > rate + error


def test_too_few_normal_patients_are_refused_with_the_number_needed():
    with pytest.raises(InputError, match="not measurable with 18 normal patients held out: 19 are needed"):
        anomaly.threshold(np.zeros(18), 0.05)


def test_a_patient_is_as_strange_as_the_strangest_scan():
    patients, highest = anomaly.by_patient(np.array([1.0, 5.0, 2.0, -1.0]), np.array([7, 3, 7, 3]))
    assert patients.tolist() == [3, 7]
    assert highest.tolist() == [5.0, 2.0]


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(20, 24), (12, 14, 10)])
def test_corruptions(kind, shape):
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(0, 3, n) for n in shape), indexing="ij")
    images = np.stack([0.4 + 0.2 * np.sin(sum(axes) + p) for p in rng.uniform(0, 6, 3)]).astype(np.float32)
    assert np.array_equal(corrupt(images, kind, 0.0, 1), images)
    once, again, stronger = (corrupt(images, kind, s, 1) for s in (1.0, 1.0, 2.0))
    assert np.array_equal(once, again)
    assert once.shape == images.shape
    assert once.dtype == np.float32
    assert float(once.min()) >= 0
    assert float(once.max()) <= 1
    error = [float(np.square(c - images).mean()) for c in (once, stronger)]
    assert 1e-5 < error[0] < error[1]


def test_an_unknown_corruption_is_refused():
    with pytest.raises(ConfigError, match="no corruption 'rain'"):
        corrupt(np.zeros((1, 8, 8), np.float32), "rain", 1.0, 0)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("shape", [(32, 32), (16, 16, 12)])
def test_the_classical_filters_take_noise_off(name, shape):
    rng = np.random.default_rng(1)
    clean = np.zeros(shape, np.float32)
    clean[tuple(slice(n // 4, 3 * n // 4) for n in shape)] = 0.8
    noisy = (clean + 0.1 * rng.standard_normal(shape)).clip(0, 1).astype(np.float32)
    found = BASELINES[name](noisy)
    assert float(psnr(clean[None], found[None])[0]) > float(psnr(clean[None], noisy[None])[0]) + 2
    assert float(ssim(clean[None], clean[None])[0]) == pytest.approx(1.0)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8), st.integers(1, 500))
def test_evening_out(have, most):
    groups = np.asarray(have)
    added = deficits(groups, most)
    after = groups + added
    assert (added >= 0).all()
    assert added.sum() <= most
    assert after.max() == groups.max()
    # Whoever got something ends at one common level, and nobody who got nothing is below it.
    if added.any():
        level = set(after[added > 0].tolist())
        assert len(level) == 1
        assert (after[added == 0] >= level.pop()).all()
    if (groups.max() - groups).sum() <= most:
        assert (after == groups.max()).all()


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 20))
def test_arcs_keep_their_ends_and_their_length(seed, size):
    a, b = torch.randn(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(arc(a, b, 0.0), a)
    assert torch.allclose(arc(a, b, 1.0), b)
    half = torch.linalg.vector_norm(arc(a, b, 0.5))
    assert float(half) == pytest.approx(float((a.norm() + b.norm()) / 2), rel=1e-6)
    assert torch.allclose(arc(a, a, 0.3), a)


def test_clusters_are_found_and_agree_with_what_they_are():
    rng = np.random.default_rng(2)
    truth = np.repeat(["x", "y", "z"], 60)
    centres = {"x": (0, 0, 0), "y": (8, 0, 0), "z": (0, 8, 0)}
    codes = np.stack([rng.standard_normal(3) + centres[t] for t in truth]).astype(np.float32)
    found = cluster(codes, 3, {"group": truth.tolist(), "noise": rng.permutation(truth).tolist()})
    assert found.agreement["group"]["ari"] > 0.95
    assert abs(found.agreement["noise"]["ari"]) < 0.1
    shapeless = cluster(rng.standard_normal((180, 3)).astype(np.float32), 3, {})
    assert found.silhouette is not None
    assert shapeless.silhouette is not None
    assert found.silhouette > shapeless.silhouette + 0.15
    assert two_dimensions(codes).shape == (180, 2)
    assert two_dimensions(codes[:, :1]).shape == (180, 2)
    with pytest.raises(ConfigError, match="200 clusters were asked for and there are 180 scans"):
        cluster(codes, 200, {})
