"""What second moments are taken of: orthonormal, there and back, and where shapes are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medvae.nets.linear import LinearPart, shells
from medvae.nets.shape import ramp
from medvae.train.subspace import LowestCosines, Subspace, window
from medvae.types import ImageSpace, Intensity

BASIS, SPATIAL = (12, 10), (40, 36)
SHELL = shells(SPATIAL)[:12, :10]
PART = LinearPart(ImageSpace(SPATIAL, (1.0, 1.0), "OT", Intensity("window", 0, 255), (), ()), BASIS, 1)


def small_discs(count: int, seed: int) -> np.ndarray:
    """Coefficients (count, 1, *BASIS) of the ramps of discs in one corner of the field of view."""
    rng = np.random.default_rng(seed)
    y, x = (np.arange(n)[:, None] for n in SPATIAL)
    row, column, radius = rng.normal(10, 1, count), rng.normal(25, 1, count), rng.uniform(3, 6, count)
    inside = (y[:, None] - row) ** 2 + (x[None] - column) ** 2 < radius**2
    images = torch.from_numpy(inside.transpose(2, 0, 1)[:, None].astype(np.float32))
    return np.asarray(PART.reduce(ramp(images, 2)).numpy(), dtype=np.float64)


def subspaces() -> list[Subspace]:
    return [LowestCosines(1, BASIS, (4, 4), SHELL), window(small_discs(200, 0).mean((0, 1)), SPATIAL, 16, SHELL)]


@pytest.mark.parametrize("subspace", subspaces(), ids=["cosines", "window"])
def test_functions_are_orthonormal_and_what_is_spread_is_taken_back(subspace):
    products = np.random.default_rng(0).standard_normal((5, subspace.size))
    spread = subspace.spread(products)
    assert spread.shape == (5, 1, *BASIS)
    np.testing.assert_allclose(np.linalg.norm(spread.reshape(5, -1), axis=1), np.linalg.norm(products, axis=1))
    # Coefficients of a finer basis are cut down to this one.
    finer = np.pad(spread, ((0, 0), (0, 0), (0, 3), (0, 2)), constant_values=7.0)
    np.testing.assert_allclose(subspace.take(torch.from_numpy(finer)).numpy(), products, atol=1e-9)


def test_a_window_holds_what_as_many_cosines_miss():
    """Sixteen functions each, by the mean of other discs: the share of variance that they hold."""
    scans = small_discs(300, 1)
    residual = torch.from_numpy(scans - scans.mean(0))
    total = residual.square().sum()
    cosines, local = (float(s.take(residual).square().sum() / total) for s in subspaces())
    assert local > 0.85
    assert cosines < 0.4


def test_a_window_of_an_empty_mean_is_still_a_basis():
    nothing = window(np.zeros(BASIS), SPATIAL, 16, SHELL)
    assert np.isfinite(nothing.functions).all()
    assert np.isfinite(nothing.variances).all()


def contrast_error(subspace: Subspace) -> float:
    """A contrast between large and small discs, its noise as long as itself: the squared error left, as a share."""
    scans = small_discs(2_000, 2)
    area = scans[:, 0, 0, 0]
    truth = scans[area > np.median(area)].mean(0) - scans[area <= np.median(area)].mean(0)
    residual = scans - scans.mean(0)
    values, vectors = np.linalg.eigh(np.cov(subspace.take(torch.from_numpy(residual)).numpy().T))
    directions = subspace.spread((vectors * np.sqrt(np.maximum(values, 0)))[:, ::-1].T[:3])
    count = np.maximum(np.bincount(SHELL.ravel(), minlength=12), 1)
    power = np.bincount(SHELL.ravel(), residual.var(0).ravel(), 12)[None] / count
    rng, errors = np.random.default_rng(3), []
    noise_sd = np.linalg.norm(truth) / truth.size**0.5
    for _ in range(5):
        noisy = truth + noise_sd * rng.standard_normal(truth.shape)
        found = subspace.shrink(noisy[None], np.array([noise_sd]), directions, power, 1.0)[0]
        errors.append(np.square(found - truth).sum() / np.square(noisy - truth).sum())
    return float(np.mean(errors))


def test_noisy_contrasts_come_nearer_to_the_truth_in_a_window():
    by_cosines, by_window = (contrast_error(s) for s in subspaces())
    assert by_cosines < 0.5
    assert by_window < 0.3 * by_cosines
