"""Copies: does a synthetic scan show a training patient, shifted by a little or mirrored?

A scan is compared by what it has beyond the average synthetic scan, as the correlation of coarse images; of a
synthetic scan every small shift and every mirror image is tried, and the best match with any training scan counts.
Held-out patients, whom the model never saw, say how good a match is by chance: a synthetic scan is flagged when its
best match is better than the 99.9 % quantile of theirs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from medvae.audit.intervals import Estimate, clopper_pearson
from medvae.audit.material import block_average

Floats = npt.NDArray[np.float64]
Images = npt.NDArray[np.float32]

FALSE_FLAGS = 0.001
# Longest axis of the images compared, and shifts tried along each axis, in voxels of the scan.
GRID = 16
SHIFTS = {2: (-2, -1, 0, 1, 2), 3: (-2, 0, 2)}
# A planted copy: shifted by up to this, mirrored or not, with this noise.
PLANTED_SHIFT, PLANTED_NOISE = 2, 0.02


def variants(images: Images) -> Iterator[Images]:
    """Yield every mirror image and small shift of images (N, *spatial), the images themselves among them."""
    dims = images.ndim - 1
    axes = tuple(range(1, dims + 1))
    for mirrored in itertools.product((False, True), repeat=dims):
        flipped = np.flip(images, tuple(a for a, m in zip(axes, mirrored, strict=True) if m))
        for shift in itertools.product(SHIFTS[dims], repeat=dims):
            yield shifted(flipped, shift)


def shifted(images: Images, shift: tuple[int, ...]) -> Images:
    """Shift images (N, *spatial) by whole voxels; the border is repeated."""
    for axis, by in enumerate(shift, start=1):
        places = np.clip(np.arange(images.shape[axis]) - by, 0, images.shape[axis] - 1)
        images = np.take(images, places, axis=axis)
    return images


def best_match(queries: Images, real: Images, average: Images) -> Floats:
    """Return the best correlation (N,) of each query, in any variant, with any real scan.

    queries: (N, *spatial), real: (M, *spatial); average: (*spatial,) is taken from both. The smaller group is varied.
    """
    middle = block_average(average[None], GRID)
    varied, fixed = (queries, real) if len(queries) < len(real) else (real, queries)
    against = _unit(block_average(fixed, GRID) - middle)
    best = np.full(len(queries), -1.0)
    for variant in variants(varied):
        likeness = _unit(block_average(variant, GRID) - middle) @ against.T
        best = np.maximum(best, likeness.max(1) if varied is queries else likeness.max(0))
    return best


def _unit(images: Images) -> Images:
    flat = images.reshape(len(images), -1)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9))


def threshold(chance: Floats) -> float:
    """Return the correlation that a match by chance exceeds with probability FALSE_FLAGS.

    From 1,000 chance matches on it is their quantile. With fewer, that tail is not in the data: the log distances
    sqrt(2 - 2 r) are taken as normal, robustly, and the bound is the one-sided prediction bound for one more.
    """
    n = len(chance)
    if n >= 1 / FALSE_FLAGS:
        return float(np.quantile(chance, 1 - FALSE_FLAGS, method="higher"))
    from scipy.stats import t

    log = 0.5 * np.log(np.maximum(2 - 2 * chance, 1e-12))
    middle = float(np.median(log))
    spread = max(1.4826 * float(np.median(np.abs(log - middle))), 1e-6)
    reach = float(t.ppf(1 - FALSE_FLAGS, max(1, n - 1))) * math.sqrt(1 + 1 / n) * spread
    return 1 - 0.5 * math.exp(2 * (middle - reach))


def planted(images: Images, count: int, seed: int) -> Images:
    """Return `count` copies of scans (N, *spatial) as a leaking model might make them: shifted, mirrored, noisy."""
    rng = np.random.default_rng(seed)
    chosen = images[rng.integers(len(images), size=count)]
    made = np.empty_like(chosen)
    for i, image in enumerate(chosen):
        mirrored = tuple(a for a in range(image.ndim) if rng.random() < 0.5)
        by = tuple(int(v) for v in rng.integers(-PLANTED_SHIFT, PLANTED_SHIFT + 1, size=image.ndim))
        made[i] = shifted(np.flip(image, mirrored)[None], by)[0]
    return np.clip(made + rng.normal(0, PLANTED_NOISE, made.shape).astype(np.float32), 0, 1)


def share_above(matches: Floats, limit: float, confidence: float) -> Estimate:
    """Return the share of matches above a limit with its exact interval."""
    hits = int((matches > limit).sum())
    return Estimate(hits / len(matches), *clopper_pearson(hits, len(matches), confidence), len(matches))
