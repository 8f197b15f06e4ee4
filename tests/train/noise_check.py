"""A test of released noise, with a stated rate of false alarms."""

from __future__ import annotations

import numpy as np
from scipy import stats

FALSE_ALARM = 1e-6


def has_planned_noise(noise: np.ndarray, std: float) -> bool:
    """Two-sided chi-square test of the variance, and a normal test of the mean, at FALSE_ALARM."""
    scaled = noise / std
    chi2 = stats.chi2.cdf(float((scaled**2).sum()), len(scaled))
    mean = abs(float(scaled.mean())) * len(scaled) ** 0.5
    return bool(FALSE_ALARM / 2 < chi2 < 1 - FALSE_ALARM / 2 and mean < stats.norm.isf(FALSE_ALARM / 2))
