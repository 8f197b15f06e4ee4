"""What scores of members and non-members say: AUC, rates, the test against the proof, blind baseline and null.

Every number is by patient. "Member": a patient whose scans the model was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.audit.intervals import Estimate, auc, auc_interval, clopper_pearson

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bound = Callable[[Floats], Floats]

# Below this many on either side an AUC interval spans nearly everything, and no number is given.
MIN_PATIENTS = 8
FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
# The pre-registered attack has half of the error that the test against the proof may make, all others the rest.
PRIMARY_SHARE = 0.5
BROKEN_AUC = 0.9
FOLDS = 5
PERMUTATIONS = 400
SPLITS = 200
BAND_POINTS = 100


@dataclass(frozen=True)
class Scores:
    """Patient scores of one attack: higher means 'member'."""

    members: Floats
    others: Floats


@dataclass(frozen=True)
class Rate:
    """A true positive rate at a false positive rate that was asked for; value None: not measurable, needs `needs`.

    low and high are about the threshold that was used; `realised` is its share of the non-members here, and its rate
    among all people is, with the same confidence, at most `fpr_high`.
    """

    asked: float
    value: float | None
    low: float | None
    high: float | None
    realised: float | None
    fpr_high: float | None
    needs: int
    members: int
    others: int

    @property
    def words(self) -> str:
        """What a reader must know of the number, or why there is none."""
        if self.value is None:
            return f"not measurable: needs {self.needs} non-members, there are {self.others}"
        return f"wrongly accused: {self.realised:.2%} of {self.others}, at most {self.fpr_high:.2%} of all people"


def measurable(scores: Scores) -> str:
    """Return why nothing can be said from these scores, or an empty string."""
    every = np.concatenate([scores.members, scores.others])
    fewest = min(len(scores.members), len(scores.others))
    if fewest < MIN_PATIENTS:
        return f"not measurable: {fewest} patients on one side, needs at least {MIN_PATIENTS}"
    if not np.isfinite(every).all():
        return "not measurable: some scores are not finite numbers"
    if np.ptp(every) == 0:
        return "not measurable: the score is the same for every patient"
    return ""


def area(scores: Scores, confidence: float) -> Estimate:
    """Return the AUC over patients with its interval."""
    return auc_interval(scores.members, scores.others, confidence)


def roc(scores: Scores) -> tuple[Floats, Floats]:
    """Return false and true positive rates of every threshold, from (0, 0) to (1, 1)."""
    thresholds = np.unique(np.concatenate([scores.members, scores.others]))[::-1]
    fpr = (scores.others[None, :] >= thresholds[:, None]).mean(1)
    tpr = (scores.members[None, :] >= thresholds[:, None]).mean(1)
    return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])


def rate(scores: Scores, asked: float, confidence: float) -> Rate:
    """Return the TPR at the lowest threshold that keeps the realised FPR at or below what was asked for.

    The interval is Clopper-Pearson's over members, for that threshold. The threshold is an order statistic of the
    non-members, so that its own FPR follows a beta distribution, whatever the scores. It needs 1 / FPR non-members at
    least: with fewer, not one false accusation could be resolved, and no number is given.
    """
    needs, n, m = max(math.ceil(1 / asked), MIN_PATIENTS), len(scores.others), len(scores.members)
    if n < needs or m < MIN_PATIENTS:
        return Rate(asked, None, None, None, None, None, needs, m, n)
    allowed = math.floor(asked * n)
    threshold = np.sort(scores.others)[::-1][allowed]
    hits = int((scores.members > threshold).sum())
    realised = float((scores.others > threshold).mean())
    low, high = clopper_pearson(hits, m, confidence)
    return Rate(asked, hits / m, low, high, realised, clopper_pearson(allowed, n, confidence)[1], needs, m, n)


def excess(attacks: Mapping[str, Scores], primary: str, bound: Bound, confidence: float) -> float:
    """Return the largest amount by which any attack is, with confidence, above the proven curve; negative: below.

    At each false positive rate asked for, the lower Clopper-Pearson bound of the TPR is set against the proven limit
    at the upper bound of the FPR. All attacks and rates together keep the confidence (Bonferroni), with half of the
    error reserved for the pre-registered attack.
    """
    gaps = []
    for name, scores in attacks.items():
        n, m = len(scores.others), len(scores.members)
        counts = sorted({math.floor(asked * n) for asked in FALSE_POSITIVE_RATES})
        share = PRIMARY_SHARE if name == primary else (1 - PRIMARY_SHARE) / max(1, len(attacks) - 1)
        strict = 1 - 2 * (1 - confidence) * share / (2 * len(counts))
        for allowed in counts:
            hits = int((scores.members > np.sort(scores.others)[::-1][allowed]).sum())
            lowest = clopper_pearson(hits, m, strict)[0]
            worst = clopper_pearson(allowed, n, strict)[1]
            gaps.append(lowest - float(bound(np.asarray([worst]))[0]))
    return max(gaps)


def blind_baseline(members: Floats, others: Floats, confidence: float, seed: int) -> Estimate:
    """Tell members from non-members *without the model*, from one embedding a patient (M, D) and (N, D).

    The AUC is that of a cross-validated ridge classifier. Its interval inverts a permutation test, which is exact
    when the two groups are exchangeable: it contains 0.5 unless the groups differ more than random groups do.
    """
    rng = np.random.default_rng(seed)
    x = np.concatenate([members, others])
    label = np.concatenate([np.ones(len(members)), -np.ones(len(others))])
    predict = _held_out_map(x, rng)

    def cross_validated(y: Floats) -> float:
        score = predict @ y
        return auc(score[y > 0], score[y < 0])

    value = cross_validated(label)
    null = np.asarray([cross_validated(rng.permutation(label)) for _ in range(PERMUTATIONS)]) - 0.5
    tail = (1 - confidence) / 2
    low, high = np.quantile(null, [tail, 1 - tail])
    return Estimate(value, max(0.0, value - float(high)), min(1.0, value - float(low)), len(x))


def _held_out_map(x: Floats, rng: np.random.Generator) -> Floats:
    """Return the matrix (N, N) that turns labels into cross-validated ridge predictions: the same for any labels."""
    n, fold = len(x), rng.permutation(len(x)) % FOLDS
    z = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    kernel = z @ z.T / z.shape[1]
    found = np.zeros((n, n))
    for k in range(FOLDS):
        test, train = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        centring = np.eye(len(train)) - 1 / len(train)
        within = kernel[np.ix_(train, train)]
        weights = np.linalg.solve(centring @ within @ centring + np.eye(len(train)), centring)
        found[np.ix_(test, train)] = (kernel[np.ix_(test, train)] - within.mean(0)) @ centring @ weights
    return found


def patient_means(features: Floats, patient: Ints) -> Floats:
    """Return the mean embedding of each patient, patients in sorted order."""
    return np.stack([features[patient == p].mean(0) for p in np.unique(patient)])


def false_alarms(others: Floats, confidence: float, seed: int) -> Estimate:
    """Negative control: split the non-members at random; how often does the AUC interval exclude 0.5?

    Should be about 1 - confidence. Splits share patients, so the interval below is for orientation.
    """
    rng, alarms = np.random.default_rng(seed), 0
    for _ in range(SPLITS):
        order = rng.permutation(others)
        found = auc_interval(order[: len(order) // 2], order[len(order) // 2 :], confidence)
        alarms += not found.low <= 0.5 <= found.high
    return Estimate(alarms / SPLITS, *clopper_pearson(alarms, SPLITS, confidence), len(others))


def band(scores: Scores, confidence: float) -> dict[str, Any]:
    """Return the edges of a band around the empirical ROC, as lists for a figure.

    At each threshold both rates have their Clopper-Pearson interval, each at half of the error (Bonferroni): the lower
    edge runs through the upper end of the FPR and the lower end of the TPR, the upper edge through the others.
    """
    from scipy.stats import beta

    fpr, tpr = roc(scores)
    chosen = np.unique(np.linspace(0, len(fpr) - 1, BAND_POINTS).round().astype(int))
    if len(fpr) > BAND_POINTS:  # more of them where a figure with logarithmic axes looks closest
        chosen = np.union1d(chosen, np.geomspace(1, len(fpr) - 1, BAND_POINTS).round().astype(int))
    tail = (1 - confidence) / 4

    def ends(rates: Floats, n: int) -> tuple[Floats, Floats]:
        hits = np.round(rates[chosen] * n)
        low = np.where(hits > 0, beta.ppf(tail, np.maximum(hits, 1), n - hits + 1), 0.0)
        return low, np.where(hits < n, beta.ppf(1 - tail, hits + 1, np.maximum(n - hits, 1)), 1.0)

    (fpr_low, fpr_high), (tpr_low, tpr_high) = ends(fpr, len(scores.others)), ends(tpr, len(scores.members))
    edges = {"low": (fpr_high, tpr_low), "high": (fpr_low, tpr_high)}
    return {"confidence": confidence, **{k: {"fpr": x.tolist(), "tpr": y.tolist()} for k, (x, y) in edges.items()}}


def curve(scores: Scores) -> dict[str, Any]:
    """Return the empirical ROC as lists for a figure."""
    fpr, tpr = roc(scores)
    return {"fpr": fpr.tolist(), "tpr": tpr.tolist(), "members": len(scores.members), "others": len(scores.others)}
