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
# Confidence of the bound where few held-out scans say what chance is; median deviations from which on they are twins.
SURE, TWINS = 0.95, 10.0
ALMOST_ONE = 1 - 1e-9
# Longest axis of the images compared, and shifts tried along each axis, in voxels of the scan.
GRID = {2: 32, 3: 16}
SHIFTS = {2: (-2, -1, 0, 1, 2), 3: (-1, 0, 1)}
# A planted copy is shifted and mirrored as above, with this noise.
PLANTED_NOISE = 0.02


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
    middle = _coarse(average[None])
    varied, fixed = (queries, real) if len(queries) < len(real) else (real, queries)
    against = _unit(_coarse(fixed) - middle)
    best = np.full(len(queries), -1.0)
    for variant in variants(varied):
        likeness = _unit(_coarse(variant) - middle) @ against.T
        best = np.maximum(best, likeness.max(1) if varied is queries else likeness.max(0))
    return best


def _coarse(images: Images) -> Images:
    """Return the middle of images (N, *spatial) at the resolution of comparison: borders, a shift made up."""
    dims = images.ndim - 1
    edge = [min(2 * max(SHIFTS[dims]), n // 6) for n in images.shape[1:]]
    inside = (slice(None), *(slice(e, n - e) for e, n in zip(edge, images.shape[1:], strict=True)))
    return block_average(images[inside], GRID[dims])


def _unit(images: Images) -> Images:
    flat = images.reshape(len(images), -1)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9))


def threshold(chance: Floats) -> float:
    """Return the correlation that a match by chance exceeds with probability FALSE_FLAGS.

    From 1,000 chance matches on it is their quantile. With fewer, that tail is not in the data. A best match is the
    largest of many, so its Fisher transform artanh r is taken as Gumbel, by its moments; the reach beyond their mean
    grows as for a normal tolerance limit that holds with confidence SURE (Wald & Wolfowitz 1946), which is how
    uncertain few scans leave it. Matches far off the others are twins across the split and no chance.
    """
    if len(chance) >= 1 / FALSE_FLAGS:
        return float(np.quantile(chance, 1 - FALSE_FLAGS, method="higher"))
    from scipy.stats import nct, norm

    z = np.arctanh(np.clip(chance, -ALMOST_ONE, ALMOST_ONE))
    away = np.abs(z - np.median(z))
    z = z[away <= TWINS * max(float(np.median(away)), 1e-6)]
    n, usual = len(z), float(norm.ppf(1 - FALSE_FLAGS))
    unsure = float(nct.ppf(SURE, n - 1, usual * math.sqrt(n))) / math.sqrt(n) / usual
    gumbel = (-math.log(-math.log1p(-FALSE_FLAGS)) - np.euler_gamma) * math.sqrt(6) / math.pi
    return math.tanh(float(z.mean()) + unsure * gumbel * max(float(z.std(ddof=1)), 1e-6))


def planted(images: Images, count: int, seed: int) -> Images:
    """Return `count` copies of scans (N, *spatial) as a leaking model might make them: shifted, mirrored, noisy."""
    rng = np.random.default_rng(seed)
    chosen = images[rng.integers(len(images), size=count)]
    made = np.empty_like(chosen)
    for i, image in enumerate(chosen):
        mirrored = tuple(a for a in range(image.ndim) if rng.random() < 0.5)
        by = tuple(int(v) for v in rng.choice(SHIFTS[image.ndim], size=image.ndim))
        made[i] = shifted(np.flip(image, mirrored)[None], by)[0]
    return np.clip(made + rng.normal(0, PLANTED_NOISE, made.shape).astype(np.float32), 0, 1)


def share_above(matches: Floats, limit: float, confidence: float) -> Estimate:
    """Return the share of matches above a limit with its exact interval."""
    hits = int((matches > limit).sum())
    return Estimate(hits / len(matches), *clopper_pearson(hits, len(matches), confidence), len(matches))
