"""Distance to the closest record: for debugging only, never evidence of privacy.

A model can leak without making near copies, and a near copy can arise without leaking. It is here because a cohort
that lies plainly closer to training patients than to held-out ones has a bug worth finding.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medvae.audit.fidelity import distances
from medvae.audit.intervals import Estimate, clopper_pearson
from medvae.audit.material import Scans, shrink

Floats = npt.NDArray[np.float64]

PIXEL_GRID = 16


def pixels(scans: Scans) -> Floats:
    """Return coarse images as rows (N, P), for distances in pixels."""
    small = shrink(scans, PIXEL_GRID).images
    return small.reshape(len(small), -1).astype(np.float64)


def closer_to_training(made: Floats, train: Floats, holdout: Floats, confidence: float) -> Estimate:
    """Return the share of synthetic scans whose closest real scan is a training one; 0.5 where nothing is copied.

    Both real groups must have the same number of rows. The interval counts synthetic scans only: with few real
    patients a share away from 0.5 can come from who was held out.
    """
    to_train, to_holdout = distances(made, train).min(1), distances(made, holdout).min(1)
    closer = int((to_train < to_holdout).sum())
    return Estimate(closer / len(made), *clopper_pearson(closer, len(made), confidence), len(made))


def closest(made: Floats, real: Floats) -> Floats:
    """Return the distance of each synthetic scan to its closest real scan."""
    return np.asarray(distances(made, real).min(1))
