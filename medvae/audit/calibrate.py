"""How a score becomes evidence: calibration by shadow models, then one number a patient.

A scan that any model likes says little about this one. Shadow models trained without a scan tell what its score would
be had it never taken part, and the attack asks how far the audited model is from that:

    lira         z-score against the models without the scan (Carlini et al. 2022, "Membership Inference Attacks From
                 First Principles", the offline attack of section V-C)
    lira online  log ratio of the normal densities with and without the scan (the same, algorithm 1)
    rmia         share of other people's scans that the audited model favours less, each against its own average
                 (Zarifzadeh et al. 2024, "Low-Cost High-Power Membership Inference Attacks", equation 2, gamma 1)

Shapes: N scans, S shadows, P patients. Patients are the unit: a patient's score sums the evidence of all their scans,
or takes the strongest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Weight, in shadows, of the variance pooled over scans against a scan's own: few shadows know no variance of their own.
PRIOR_SHADOWS = 8.0
# Fewest models without a scan, and with it, from which the calibrations are made at all.
FEWEST_OUT, FEWEST_IN = 2, 8


@dataclass(frozen=True)
class Calibrated:
    """One score of N scans: under the audited model (N,), under shadows (S, N), and who each had seen (S, N)."""

    target: Floats
    shadows: Floats
    included: Bools
    patient: Ints

    def __post_init__(self) -> None:
        if self.shadows.shape != self.included.shape or self.shadows.shape[1:] != self.target.shape:
            raise ValueError("scores of shadows and of the audited model are not about the same scans")

    @property
    def enough_out(self) -> bool:
        """Whether every scan has models that never saw it."""
        return len(self.included) > 0 and int((~self.included).sum(0).min()) >= FEWEST_OUT

    @property
    def enough_in(self) -> bool:
        """Whether every scan also has models that did."""
        return self.enough_out and int(self.included.sum(0).min()) >= FEWEST_IN


def lira(scores: Calibrated) -> Floats:
    """Return the z-score (N,) against the models without the scan; the variance is shrunk towards that of all scans."""
    mean, variance = _moments(scores.shadows, ~scores.included)
    return _over(scores.target - mean, np.sqrt(variance))


def lira_online(scores: Calibrated) -> Floats:
    """Return log p(score | in) - log p(score | out), (N,), with one variance for both.

    A scan's own shift between in and out is shrunk towards the shift of all scans by how much of it is noise.
    """
    out, variance = _moments(scores.shadows, ~scores.included)
    inside, _ = _moments(scores.shadows, scores.included)
    sd = np.sqrt(variance)
    shift = _over(inside - out, sd)
    noise = float(np.mean(1 / scores.included.sum(0) + 1 / (~scores.included).sum(0)))
    spread = float(shift.var())
    kept = max(0.0, 1 - noise / spread) if spread > 0 else 0.0
    shift = shift.mean() + kept * (shift - shift.mean())
    return np.asarray(_over(scores.target - out, sd) * shift - shift**2 / 2)


def rmia(scores: Calibrated, reference: Bools) -> Floats:
    """Return the share of `reference` scans (N,) of other patients that each scan's likelihood ratio exceeds, (N,).

    The ratio of a scan is its likelihood under the audited model over the average likelihood of models without it;
    scores must be log-likelihoods.
    """
    out = np.where(scores.included, -np.inf, scores.shadows)
    top = out.max(0)
    average = top + np.log(np.exp(out - top).sum(0) / (~scores.included).sum(0))
    ratio = scores.target - average
    other = np.flatnonzero(reference)
    beaten = np.searchsorted(np.sort(ratio[other]), ratio, side="left").astype(np.float64)
    counted = np.full(len(ratio), float(len(other)))
    for p in np.unique(scores.patient[other]):  # a patient's own scans are no reference for them
        mine = np.flatnonzero(scores.patient == p)
        own = ratio[mine[reference[mine]]]
        beaten[mine] -= (own[None, :] < ratio[mine][:, None]).sum(1)
        counted[mine] -= len(own)
    return _over(beaten, counted)


def by_patient(values: Floats, patient: Ints, reduce: str) -> Floats:
    """Return one number a patient (P,), patients in sorted order: "sum", "mean" or "max" over the patient's scans."""
    reducers: Mapping[str, Callable[[Floats], Floats]] = {"sum": np.sum, "mean": np.mean, "max": np.max}
    return np.asarray([reducers[reduce](values[patient == p]) for p in np.unique(patient)])


def _moments(shadows: Floats, counted: Bools) -> tuple[Floats, Floats]:
    """Return mean and shrunk variance (N,) of each scan's scores over the shadows that count for it."""
    n = counted.sum(0)
    mean = np.where(counted, shadows, 0.0).sum(0) / n
    squares = np.where(counted, np.square(shadows - mean), 0.0).sum(0)
    free = np.maximum(n - 1, 0)
    pooled = squares.sum() / max(1, free.sum())
    return mean, (PRIOR_SHADOWS * pooled + squares) / (PRIOR_SHADOWS + free)


def _over(a: Floats, b: Floats) -> Floats:
    """Return a / b, and zero where b is zero: there is nothing to tell."""
    return np.asarray(np.divide(a, b, out=np.zeros_like(a), where=b > 0))
