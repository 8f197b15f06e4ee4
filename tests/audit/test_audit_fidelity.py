"""Distances against closed forms, the embedding's fixed form, manifold scores at their edges."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest
from audit_world import phantom_scans
from skimage.transform import resize

from medvae.audit import radiomics
from medvae.audit.embedding import embed, reference_standard
from medvae.audit.fidelity import (
    Group,
    diversity,
    frechet,
    frechet_distance,
    gaussian_of,
    kernel_distance,
    manifold,
    ms_ssim_settings,
)

RNG = np.random.default_rng


def group(x: np.ndarray, first: int = 0) -> Group:
    return Group(x, np.arange(first, first + len(x)))


def test_frechet_of_known_gaussians() -> None:
    # Diagonal covariances: |m|^2 + sum (s_a - s_b)^2.
    a, b = np.asarray([1.0, 2.0, 3.0]), np.asarray([2.0, 2.0, 0.5])
    mean = np.asarray([1.0, 0.0, -1.0])
    assert frechet(mean, np.diag(a), np.zeros(3), np.diag(b)) == pytest.approx(2 + 1 + 0 + 6.25)


def test_frechet_of_full_covariances_equals_the_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    rng = RNG(0)
    x, y = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(50, 5))
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    root = np.trace(sqrtm(cov_x @ cov_y)).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * root
    assert frechet(*gaussian_of(x, np.ones(60)), *gaussian_of(y, np.ones(50))) == pytest.approx(expected)
    # Fewer rows than columns take another path through the same formula.
    few = frechet(*gaussian_of(x[:4], np.ones(4)), *gaussian_of(y[:3], np.ones(3)))
    root = np.trace(sqrtm(np.cov(x[:4].T) @ np.cov(y[:3].T))).real
    gap = np.square(x[:4].mean(0) - y[:3].mean(0)).sum()
    assert few == pytest.approx(gap + np.trace(np.cov(x[:4].T)) + np.trace(np.cov(y[:3].T)) - 2 * root, rel=1e-4)


def test_frechet_sees_a_shift_and_is_zero_to_itself() -> None:
    x = RNG(1).normal(size=(80, 6))
    same = frechet_distance(group(x), group(x), 0.95, 30, RNG(2))
    moved = frechet_distance(group(x), group(x + 1), 0.95, 30, RNG(2))
    assert same.value == pytest.approx(0, abs=1e-9)
    assert moved.value == pytest.approx(6)
    assert moved.low > same.high


def test_kernel_distance_is_zero_on_average_for_one_distribution() -> None:
    rng = RNG(3)
    values = [
        kernel_distance(group(rng.normal(size=(30, 4))), group(rng.normal(size=(30, 4))), 0.95, 2, rng).value
        for _ in range(300)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)  # unbiased
    assert min(values) < 0 < max(values)


def test_kernel_distance_equals_its_definition_and_skips_pairs_of_one_patient() -> None:
    rng = RNG(4)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(5, 3))
    kernel = lambda p, q: (p @ q / 3 + 1) ** 3  # noqa: E731
    within_x = np.mean([kernel(x[i], x[j]) for i in range(6) for j in range(6) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([kernel(p, q) for p in x for q in y])
    found = kernel_distance(group(x), group(y), 0.95, 5, rng)
    assert found.value == pytest.approx(within_x + within_y - 2 * between)
    twins = Group(np.concatenate([x, x]), np.concatenate([np.arange(6), np.arange(6)]))
    assert kernel_distance(twins, group(y), 0.95, 5, rng).value == pytest.approx(found.value)


def test_manifold_scores_at_their_edges() -> None:
    x = RNG(5).normal(size=(60, 3))
    near = manifold(group(x), group(x + 1e-6, 100), 0.95, 20, RNG(6))
    assert near["precision"].value == near["recall"].value == near["coverage"].value == 1.0
    far = manifold(group(x), group(x + 100, 100), 0.95, 20, RNG(6))
    assert all(far[name].value == 0.0 for name in far)
    collapsed = manifold(
        group(x), group(np.tile(x[:1], (60, 1)) + 1e-3 * RNG(7).normal(size=(60, 3))), 0.95, 20, RNG(6)
    )
    assert collapsed["precision"].value == 1.0
    assert collapsed["recall"].value < 0.1
    assert collapsed["coverage"].value < 0.5


def test_manifold_radius_ignores_scans_of_the_same_patient() -> None:
    x = RNG(8).normal(size=(30, 3))
    twins = Group(np.repeat(x, 6, axis=0) + 1e-6, np.repeat(np.arange(30), 6))
    made = group(x + 0.2, 1000)
    assert manifold(twins, made, 0.95, 5, RNG(9))["precision"].value > 0.5


@pytest.mark.parametrize("dims", [2, 3])
def test_embedding_is_the_shipped_one(dims: int) -> None:
    text = resources.files("medvae.audit").joinpath("assets/embedding.json").read_text(encoding="utf-8")
    shipped, computed = json.loads(text)[f"{dims}d"], reference_standard(dims)
    np.testing.assert_allclose(computed["centre"], shipped["centre"], atol=2e-3)
    np.testing.assert_allclose(computed["scale"], shipped["scale"], atol=2e-3)


@pytest.mark.parametrize("dims", [2, 3])
def test_embedding_does_not_depend_on_resolution_or_batch(dims: int) -> None:
    images = phantom_scans(dims, 12, 0, 32).images
    finer = np.stack([resize(i, [64] * dims, order=1, anti_aliasing=False) for i in images]).astype(np.float32)
    base, moved = embed(images), embed(finer)
    assert 64 <= base.shape[1] <= 128
    assert np.isfinite(base).all()
    apart = np.linalg.norm(base[:, None] - base[None], axis=2)
    assert np.median(np.linalg.norm(base - moved, axis=1)) < 0.5 * np.median(apart[apart > 0])
    np.testing.assert_allclose(embed(images[3:4]), base[3:4], atol=1e-4)


def test_embedding_sees_blur_noise_and_brightness() -> None:
    from scipy.ndimage import gaussian_filter

    x = phantom_scans(2, 60, 1, 32).images
    half = len(x) // 2
    real, other = group(embed(x[:half])), x[half:]
    noise = RNG(10).normal(0, 0.1, other.shape)
    usual = frechet_distance(real, group(embed(other), 500), 0.95, 20, RNG(11))
    for worse in (gaussian_filter(other, (0, 2, 2)), np.clip(other + noise, 0, 1), np.clip(other + 0.2, 0, 1)):
        found = frechet_distance(real, group(embed(worse), 500), 0.95, 20, RNG(11))
        assert found.low > usual.high


def test_diversity_of_copies_is_one_and_of_noise_is_low() -> None:
    image = RNG(12).uniform(size=(1, 32, 32)).astype(np.float32)
    same = diversity(np.repeat(image, 8, axis=0), np.arange(8), 4, 0.95, 0)
    other = diversity(RNG(13).uniform(size=(8, 32, 32)).astype(np.float32), np.arange(8), 4, 0.95, 0)
    assert same is not None
    assert other is not None
    assert same.value == pytest.approx(1, abs=1e-4)
    assert other.value < 0.3
    assert diversity(image, np.zeros(1, dtype=np.int64), 4, 0.95, 0) is None


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (28, 28), (64, 64), (512, 512), (16, 24, 16), (32, 48, 32)])
def test_ms_ssim_settings_suit_every_size(shape: tuple[int, ...]) -> None:
    x = RNG(14).uniform(size=(4, *shape)).astype(np.float32)
    assert sum(ms_ssim_settings(shape)[1]) == pytest.approx(1)
    found = diversity(x, np.arange(4), 2, 0.95, 0)
    assert found is not None
    assert np.isfinite(found.value)


def test_radiomics_closed_forms() -> None:
    scans = phantom_scans(2, 4, 0, 16)
    names = radiomics.feature_names(scans.space.mask_labels)
    flat = scans.take(np.arange(2))
    flat.x[:, 0] = 0.5
    values = dict(zip(names, radiomics.features(flat)[0], strict=True))
    assert values["mean"] == 0.5
    assert values["entropy"] == values["co-occurrence contrast"] == 0
    assert values["co-occurrence energy"] == pytest.approx(1)
    assert values["volume of label 1"] == pytest.approx(float(flat.x[0, 1].mean()))


def test_wasserstein_of_a_shift_is_the_shift_in_standard_deviations() -> None:
    x = RNG(15).normal(0, 2, size=(400, 3))
    np.testing.assert_allclose(radiomics.wasserstein(x, x + 1), 1 / x.std(0))
    found = radiomics.median_wasserstein(x, np.arange(400), x + 1, np.arange(400), 0.95, 30, RNG(16))
    assert found.low < found.value == pytest.approx(0.5, abs=0.05)
