"""Attacks with the synthetic scans alone: is a person's scan suspiciously well covered by them?

All distances are taken in the public embedding, reduced to at most 32 principal components of the synthetic scans
themselves: nothing of it is learned from a patient.

    nearest              how close the closest synthetic scan is (Chen et al. 2020, "GAN-Leaks")
    nearest, calibrated  the same, less what generators that never saw the scan give (the same, section 5.5)
    monte carlo          share of synthetic scans within a radius (Hilprecht et al. 2019, "Monte Carlo and
                         Reconstruction Membership Inference Attacks against Generative Models", median heuristic)
    density ratio        log density of the synthetic scans over that of the reference generators (van Breugel et al.
                         2023, "Membership Inference Attacks against Synthetic Data through Overfitting Detection")

Reference generators are the shadow models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medvae.audit.embedding import embed
from medvae.audit.fidelity import distances
from medvae.types import FloatArray, ModelRelease, Progress

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

DIMENSIONS = 32
# A density is estimated in fewer dimensions: in 32, a kernel estimate from thousands of points says nothing.
DENSITY_DIMENSIONS = 8
GENERATED_AT_ONCE = 256
QUERIES_AT_ONCE = 512

NEAREST, CALIBRATED = "nearest", "nearest, calibrated"
MONTE_CARLO, DENSITY = "monte carlo", "density ratio"


@dataclass(frozen=True)
class Projection:
    """A whitened projection (D, d) around a centre (D,)."""

    centre: Floats
    axes: Floats

    def __call__(self, features: Floats) -> Floats:
        """Return coordinates (N, d)."""
        return np.asarray((features - self.centre) @ self.axes)


def projection(features: Floats) -> Projection:
    """Return the leading principal components of synthetic features (M, D), each scaled to unit variance."""
    centre = features.mean(0)
    _, sizes, axes = np.linalg.svd(features - centre, full_matrices=False)
    kept = min(DIMENSIONS, int((sizes > 1e-6 * sizes[0]).sum())) if sizes[0] > 0 else 0
    scale = sizes[:kept] / np.sqrt(max(1, len(features) - 1))
    return Projection(centre, axes[:kept].T / scale)


def generated_features(release: ModelRelease, count: int, seed: int, progress: Progress | None = None) -> Floats:
    """Return the embedding (count, D) of scans that a model makes, a bounded number of them in memory."""
    from medvae.synth.sample import generate, spread_conditions

    rows = spread_conditions(release.space, count, seed)
    parts = []
    for start in range(0, count, GENERATED_AT_ONCE):
        parts.append(embed(generate(release, rows[start : start + GENERATED_AT_ONCE], seed + 1 + start).images))
        if progress is not None:
            progress(min(count, start + GENERATED_AT_ONCE), count)
    return np.concatenate(parts)


def scores(queries: Floats, made: Floats, references: Sequence[Floats], included: Bools) -> dict[str, Floats]:
    """Return each score (N,) of real scans, all of it features (., D) of the embedding.

    made: of the audited model; references: of each reference generator; included: (S, N), who each had seen. Without
    a reference that never saw it, a scan has no calibrated score, and those are left out.
    """
    view = projection(made)
    points, cloud = view(queries), view(made)
    closest, density = _closest_and_density(points, cloud)
    radius = float(np.median(closest))
    inside = np.concatenate(
        [(distances(part, cloud) <= radius).mean(1) for part in _parts(points)],
    )
    found = {NEAREST: -_log(closest), MONTE_CARLO: inside}
    if len(references) == 0 or (~included).sum(0).min() == 0:
        return found
    others = [_closest_and_density(points, view(reference)) for reference in references]
    found[CALIBRATED] = _less_average(-_log(closest), np.stack([-_log(near) for near, _ in others]), included)
    found[DENSITY] = _less_average(density, np.stack([d for _, d in others]), included)
    return found


def _less_average(own: Floats, others: Floats, included: Bools) -> Floats:
    weight = (~included).astype(np.float64)
    return np.asarray(own - (others * weight).sum(0) / weight.sum(0))


def _closest_and_density(points: Floats, cloud: Floats) -> tuple[Floats, Floats]:
    """Return the distance to the closest of a cloud, and the log of a Gaussian kernel density (Scott 1992), (N,)."""
    d = min(DENSITY_DIMENSIONS, cloud.shape[1])
    width = len(cloud) ** (-1 / (d + 4))
    near, density = [], []
    for part in _parts(points):
        near.append(distances(part, cloud).min(1))
        exponent = -0.5 * np.square(distances(part[:, :d], cloud[:, :d]) / width)
        top = exponent.max(1)
        density.append(top + np.log(np.exp(exponent - top[:, None]).mean(1)))
    return np.concatenate(near), np.concatenate(density)


def _parts(points: Floats) -> list[Floats]:
    return [points[i : i + QUERIES_AT_ONCE] for i in range(0, len(points), QUERIES_AT_ONCE)]


def _log(distance: Floats) -> Floats:
    return np.log(np.maximum(distance, 1e-9))


def repeating(images: FloatArray, copies: int, noise: float, seed: int) -> Floats:
    """Return the features of a generator that leaks by design: it repeats its scans (N, *spatial) with noise."""
    rng = np.random.default_rng(seed)
    made = np.repeat(images, copies, axis=0)
    return embed(np.clip(made + rng.normal(0, noise, made.shape).astype(np.float32), 0, 1))
