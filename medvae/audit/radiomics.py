"""Radiomic features of scans, in the sense of Zwanenburg et al. (2020): first order, co-occurrence, spectrum, volumes.

Computed with scikit-image; co-occurrence in 3D is taken on the three middle planes. Real and synthetic are compared
by the Wasserstein distance of each feature, in units of the real patients' standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from medvae.audit.intervals import Estimate, normal_bootstrap
from medvae.audit.material import Scans

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

GREY_LEVELS = 32
CO_OCCURRENCE = ("contrast", "homogeneity", "energy", "correlation")
ANGLES = (0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
BANDS = 4


def feature_names(mask_labels: Sequence[int]) -> list[str]:
    """Return the names of the columns of `features`."""
    first = ["mean", "deviation", "skewness", "kurtosis", "entropy", "percentile 10", "percentile 90"]
    spectrum = [f"spectrum band {i + 1}" for i in range(BANDS)]
    return (
        first + [f"co-occurrence {p}" for p in CO_OCCURRENCE] + spectrum + [f"volume of label {m}" for m in mask_labels]
    )


def features(scans: Scans) -> Floats:
    """Return the features (N, F), one row a scan."""
    volumes = scans.x[:, 1:].mean(axis=tuple(range(2, scans.x.ndim)))
    rows = [np.concatenate([_first_order(i), _co_occurrence(i), _spectrum(i)]) for i in scans.images]
    return np.concatenate([np.asarray(rows), volumes], axis=1)


def _first_order(image: npt.NDArray[np.float32]) -> Floats:
    values = image.ravel().astype(np.float64)
    mean, deviation = values.mean(), values.std()
    z = (values - mean) / max(deviation, 1e-6)
    counts = np.histogram(values, bins=GREY_LEVELS, range=(0, 1))[0]
    share = counts[counts > 0] / max(counts.sum(), 1)
    low, high = np.percentile(values, [10, 90])
    entropy = -(share * np.log2(share)).sum()
    return np.asarray([mean, deviation, (z**3).mean(), (z**4).mean(), entropy, low, high])


def _co_occurrence(image: npt.NDArray[np.float32]) -> Floats:
    from skimage.feature import graycomatrix, graycoprops

    levels = np.clip(image * GREY_LEVELS, 0, GREY_LEVELS - 1).astype(np.uint8)
    planes = [levels] if levels.ndim == 2 else [levels.take(n // 2, axis) for axis, n in enumerate(levels.shape)]
    found = []
    for plane in planes:
        matrix = graycomatrix(plane, [1], ANGLES, levels=GREY_LEVELS, symmetric=True, normed=True)
        found.append([float(graycoprops(matrix, name).mean()) for name in CO_OCCURRENCE])
    return np.asarray(np.mean(found, axis=0), dtype=np.float64)


def _spectrum(image: npt.NDArray[np.float32]) -> Floats:
    """Logarithm of the mean power in octaves of radial frequency, up to the Nyquist frequency of the axes."""
    power = np.abs(np.fft.fftn(image - image.mean())) ** 2 / image.size
    axes = np.meshgrid(*(np.fft.fftfreq(n) for n in image.shape), indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    edges = [0.0, *(0.5 / 2 ** (BANDS - 1 - i) for i in range(BANDS))]
    inside = [(radius > low) & (radius <= high) for low, high in pairwise(edges)]
    return np.asarray([np.log10(power[s].mean() + 1e-12) if s.any() else -12.0 for s in inside])


def wasserstein(real: Floats, other: Floats, spread: Floats | None = None) -> Floats:
    """Return, for each feature (columns), W1 between two samples over `spread`: the standard deviation of `real`."""
    from scipy.stats import wasserstein_distance

    spread = spread_of(real) if spread is None else spread
    pairs = zip(real.T, other.T, spread, strict=True)
    return np.asarray([wasserstein_distance(a, b) / s for a, b, s in pairs])


def spread_of(real: Floats) -> Floats:
    """Return the standard deviation of each feature; features that do not vary count in their own unit."""
    deviation = real.std(0)
    return np.where(deviation > 1e-6, deviation, 1.0)


def median_wasserstein(
    real: Floats,
    real_patient: Ints,
    other: Floats,
    other_patient: Ints,
    confidence: float,
    replicates: int,
    rng: np.random.Generator,
) -> Estimate:
    """Return the median over features of `wasserstein`, with a bootstrap over patients on both sides."""

    def resample(patient: Ints) -> Ints:
        persons = np.unique(patient)
        drawn = rng.choice(persons, size=len(persons))
        return np.concatenate([np.flatnonzero(patient == p) for p in drawn])

    spread = spread_of(real)
    value = float(np.median(wasserstein(real, other, spread)))
    draws = [
        float(np.median(wasserstein(real[resample(real_patient)], other[resample(other_patient)], spread)))
        for _ in range(replicates)
    ]
    persons = min(len(np.unique(real_patient)), len(np.unique(other_patient)))
    return normal_bootstrap(value, draws, confidence, persons, floor=0.0)


def distributions(
    real: Floats, made: Floats, names: Sequence[str], bins: int = 24
) -> dict[str, dict[str, list[float]]]:
    """Return a histogram of each feature for real and synthetic scans over common edges, as shares."""
    found = {}
    for i, name in enumerate(names):
        both = np.concatenate([real[:, i], made[:, i]])
        low, high = np.percentile(both, [0.5, 99.5])
        edges = np.linspace(low, high if high > low else low + 1e-6, bins + 1)
        shares = [np.histogram(np.clip(v[:, i], edges[0], edges[-1]), edges)[0] / len(v) for v in (real, made)]
        found[name] = {"edges": edges.tolist(), "real": shares[0].tolist(), "synthetic": shares[1].tolist()}
    return found
