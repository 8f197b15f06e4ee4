"""Copies: does a synthetic scan show a training patient, shifted by a little or mirrored?

Two scans are compared by the root mean square of their difference in grey levels at a coarse grid; of a scan every
small shift and every mirror image is tried, and the nearest training scan counts. How near scans come by chance, those
say that no model made: held-out patients, and training scans against the scans of all other patients. A synthetic scan
is flagged when it is nearer than all but 0.1 % of them. Scans that are in a cohort twice, voxel by voxel, are no
chance: they are counted and set aside.
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
Ints = npt.NDArray[np.int64]
Images = npt.NDArray[np.float32]

FALSE_FLAGS = 0.001
# Scans of chance that are needed to set the limit as a quantile, and as many others to measure false flags.
NEEDED = math.ceil(1 / FALSE_FLAGS)
# Confidence of the bound where few scans say what chance is; median deviations from which on they are twins.
SURE, TWINS = 0.95, 10.0
# Grey levels by which two stored copies of one scan differ at most, by rounding.
IDENTICAL = 1e-3
# Longest axis of the images compared, and shifts tried along each axis, in voxels of the scan.
GRID = {2: 16, 3: 16}
SHIFTS = {2: (-2, -1, 0, 1, 2), 3: (-1, 0, 1)}
# Scans compared at a time with all of the other side, which bounds memory.
BLOCK = 2048
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


def nearest(queries: Images, real: Images, own: Ints | None = None, whose: Ints | None = None) -> tuple[Floats, Ints]:
    """Return how far (N,) each query is, in its best variant, from the nearest real scan, and which that is (N,).

    The distance is the root mean square of the difference, in grey levels from 0 to 1.
    queries: (N, *spatial), real: (M, *spatial). The smaller group is varied. own (N,), whose (M,): patients; a query
    is not compared with scans of its own patient.
    """
    swap = len(real) <= len(queries)
    varied, fixed = (real, queries) if swap else (queries, real)
    against = _coarse(fixed).reshape(len(fixed), -1)
    best, place = np.full(len(queries), np.inf, dtype=np.float32), np.zeros(len(queries), dtype=np.int64)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(fixed), BLOCK)]
    for variant in variants(varied):
        moved = _coarse(variant).reshape(len(varied), -1)
        for block in blocks:
            rows, columns = (block, slice(None)) if swap else (slice(None), block)
            squares = _squares(against[block], moved) if swap else _squares(moved, against[block])
            if own is not None and whose is not None:
                squares[own[rows, None] == whose[None, columns]] = np.inf
            at = squares.argmin(1)
            here = squares[np.arange(len(at)), at]
            place[rows] = np.where(here < best[rows], at + (columns.start or 0), place[rows])
            best[rows] = np.minimum(best[rows], here)
    return np.sqrt(np.maximum(best, 0).astype(np.float64) / against.shape[1]), place


def _squares(a: Images, b: Images) -> Images:
    """Return squared distances (N, M) of rows (N, D) and (M, D)."""
    return np.asarray(np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * (a @ b.T))


def _coarse(images: Images) -> Images:
    """Return the middle of images (N, *spatial) at the resolution of comparison: borders, a shift made up."""
    dims = images.ndim - 1
    edge = [min(2 * max(SHIFTS[dims]), n // 6) for n in images.shape[1:]]
    inside = (slice(None), *(slice(e, n - e) for e, n in zip(edge, images.shape[1:], strict=True)))
    return block_average(images[inside], GRID[dims])


def threshold(chance: Floats) -> float:
    """Return the distance below which scans come by chance with probability FALSE_FLAGS at most.

    A nearest distance is the least of many, so minus its logarithm is taken as Gumbel, by its moments, which says how
    far its tail reaches where few scans show it; the reach beyond their mean grows as for a normal tolerance limit that
    holds with confidence SURE (Wald & Wolfowitz 1946), which is how uncertain few scans leave it. Scans far nearer than
    the others are twins and no chance. From NEEDED distances on, the limit is no longer than their quantile either.
    """
    from scipy.stats import nct, norm

    z = -np.log(np.maximum(chance, IDENTICAL))
    away = np.abs(z - np.median(z))
    z = z[away <= TWINS * max(float(np.median(away)), 1e-6)]
    n, usual = len(z), float(norm.ppf(1 - FALSE_FLAGS))
    unsure = float(nct.ppf(SURE, n - 1, usual * math.sqrt(n))) / math.sqrt(n) / usual
    gumbel = (-math.log(-math.log1p(-FALSE_FLAGS)) - np.euler_gamma) * math.sqrt(6) / math.pi
    bound = math.exp(-(float(z.mean()) + unsure * gumbel * max(float(z.std(ddof=1)), 1e-6)))
    enough = len(chance) >= NEEDED
    return min(bound, float(np.quantile(chance, FALSE_FLAGS, method="lower"))) if enough else bound


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


def share_below(distances: Floats, limit: float, confidence: float) -> Estimate:
    """Return the share of distances below a limit with its exact interval."""
    hits = int((distances < limit).sum())
    return Estimate(hits / len(distances), *clopper_pearson(hits, len(distances), confidence), len(distances))
