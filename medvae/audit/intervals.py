"""Confidence intervals, each for the sampling it is meant for. Patients are the unit: scans of one are never split.

Each is checked by simulation in tests/audit/test_audit_intervals.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Estimate(NamedTuple):
    """A value with its interval; n is the number of units (mostly patients) it was measured on."""

    value: float
    low: float
    high: float
    n: int


def quantile(confidence: float) -> float:
    """Return the two-sided normal quantile of a confidence, 1.96 for 0.95."""
    from scipy.stats import norm

    return float(norm.ppf(0.5 + confidence / 2))


def clopper_pearson(hits: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the exact two-sided interval of a binomial proportion (Clopper & Pearson 1934)."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(1 - tail, hits + 1, n - hits))
    return low, high


def mean_interval(values: npt.ArrayLike, confidence: float) -> Estimate:
    """Return the mean of independent values with Student's interval."""
    from scipy.stats import t

    v = np.asarray(values, dtype=np.float64)
    if len(v) < 2:
        return Estimate(float(v.mean()), -math.inf, math.inf, len(v))
    half = float(t.ppf(0.5 + confidence / 2, len(v) - 1)) * float(v.std(ddof=1)) / math.sqrt(len(v))
    return Estimate(float(v.mean()), float(v.mean()) - half, float(v.mean()) + half, len(v))


def patient_weights(patient: Ints, replicates: int, rng: np.random.Generator) -> Floats:
    """Return bootstrap weights (replicates, scans): patients drawn with replacement, all scans of one together."""
    unique, inverse = np.unique(patient, return_inverse=True)
    counts = rng.multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=replicates)
    return np.asarray(counts[:, inverse], dtype=np.float64)


def normal_bootstrap(
    value: float, replicates: npt.ArrayLike, confidence: float, n: int, floor: float = -math.inf
) -> Estimate:
    """Return value plus or minus z times the bootstrap standard error.

    For distances, whose bootstrap replicates are biased upwards, so that percentiles would miss the value itself.
    """
    half = quantile(confidence) * float(np.std(np.asarray(replicates, dtype=np.float64), ddof=1))
    return Estimate(value, max(floor, value - half), value + half, n)


def percentile_bootstrap(
    statistic: Callable[[Ints], float],
    patient: Ints,
    confidence: float,
    replicates: int,
    rng: np.random.Generator,
) -> Estimate:
    """Return a statistic of scan rows with its percentile interval over resampled patients.

    `statistic` takes row indices (with repetition) and may return nan where a resample cannot be judged, as when
    a class is missing; such resamples are left out.
    """
    rows = [np.flatnonzero(patient == p) for p in np.unique(patient)]
    value = statistic(np.arange(len(patient)))
    draws = []
    for _ in range(replicates):
        chosen = rng.integers(len(rows), size=len(rows))
        draws.append(statistic(np.concatenate([rows[i] for i in chosen])))
    kept = np.asarray(draws)[~np.isnan(draws)]
    if not len(kept):
        return Estimate(value, math.nan, math.nan, len(rows))
    tail = (1 - confidence) / 2
    low, high = np.quantile(kept, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), len(rows))


def auc(positive: npt.ArrayLike, negative: npt.ArrayLike) -> float:
    """Return P(positive > negative) + P(equal) / 2: the area under the ROC curve."""
    from scipy.stats import rankdata

    a, b = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    ranks = rankdata(np.concatenate([a, b]))
    return float((ranks[: len(a)].sum() - len(a) * (len(a) + 1) / 2) / (len(a) * len(b)))


def auc_interval(positive: npt.ArrayLike, negative: npt.ArrayLike, confidence: float) -> Estimate:
    """Return the AUC of independent scores with DeLong's interval (DeLong et al. 1988), on the logit scale.

    Near or at perfect separation DeLong's variance vanishes and would pretend certainty; there the score interval
    of Newcombe (2006, method 5) stands in, which stays honest.
    """
    from scipy.stats import rankdata

    a, b = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    area, both = auc(a, b), rankdata(np.concatenate([a, b]))
    of_a = (both[: len(a)] - rankdata(a)) / len(b)
    of_b = 1 - (both[len(a) :] - rankdata(b)) / len(a)
    variance = float(of_a.var(ddof=1) / len(a) + of_b.var(ddof=1) / len(b))
    n = len(a) + len(b)
    slack = min(area, 1 - area)
    if slack * min(len(a), len(b)) < 1 or variance <= 0:
        return Estimate(area, *_newcombe(area, len(a), len(b), confidence), n)
    half = quantile(confidence) * math.sqrt(variance) / (area * (1 - area))
    centre = math.log(area / (1 - area))
    return Estimate(area, _logistic(centre - half), _logistic(centre + half), n)


def _newcombe(area: float, m: int, n: int, confidence: float) -> tuple[float, float]:
    """Solve |area - theta| = z sqrt(V(theta)) with the variance of Hanley & McNeil (1982), sizes averaged."""
    z, extra = quantile(confidence), (m + n) / 2 - 1

    def too_far(theta: float) -> bool:
        spread = 1 + extra * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(area - theta) > z * math.sqrt(theta * (1 - theta) * spread / (m * n))

    return _edge(area, 0.0, too_far), _edge(area, 1.0, too_far)


def _edge(inside: float, outside: float, too_far: Callable[[float], bool]) -> float:
    """Bisect between a point that is inside an interval and one that may be outside it."""
    if not too_far(outside + (inside - outside) * 1e-9) and inside != outside:
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if too_far(middle) else (middle, outside)
    return inside


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
