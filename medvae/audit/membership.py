"""White-box membership attack on the VAE, by patient, with its blind baseline and both controls.

The attacker holds the weights and asks of a patient: were you in the training set? Scores are computed from many
draws of the code: the importance-weighted likelihood (Burda et al. 2016), the ELBO, and the reconstruction error. A
patient's score is the mean, and the maximum, over the patient's scans. Members are as many random training patients
as there are held-out ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from medvae.audit.intervals import Estimate, auc, auc_interval, clopper_pearson
from medvae.audit.material import Scans

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bound = Callable[[Floats], Floats]

# Below this many on either side an AUC interval spans nearly everything, and no number is given.
MIN_PATIENTS = 8
# Named before any score is seen; the others are reported beside it, and the test against the proof corrects for all.
PRIMARY = "likelihood, mean"
FALSE_POSITIVE_RATES = (0.01, 0.1)
BROKEN_AUC = 0.9
FOLDS = 5
PERMUTATIONS = 400
SPLITS = 200
ELEMENTS_AT_ONCE = 4_000_000


class Scorable(Protocol):
    """What the attack needs of a model; nets.ConditionalVAE and the control model both have it."""

    latent_dim: int

    def encode(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (B, d), of q(z | x, c)."""

    def prior_mean(self, condition: Tensor) -> Tensor:
        """Mean (B, d) of p(z | c), a normal of unit variance."""

    def reconstruction(self, x: Tensor, z: Tensor, condition: Tensor) -> Tensor:
        """Per-sample -log p(x | z, c) in nats, (B,)."""


@dataclass(frozen=True)
class Scores:
    """Patient scores of one attack: higher means 'member'."""

    members: Floats
    others: Floats


@dataclass(frozen=True)
class Rate:
    """A true positive rate at a false positive rate that was asked for; value None: not measurable, needs `needs`."""

    asked: float
    value: float | None
    low: float | None
    high: float | None
    realised: float | None
    needs: int


def scan_scores(model: Scorable, scans: Scans, draws: int, seed: int) -> dict[str, Floats]:
    """Return each score for each scan (N,), from `draws` codes a scan; the same draws for every scan."""
    import torch

    at_once = max(1, ELEMENTS_AT_ONCE // scans.x[0].size)
    noise = torch.randn(draws, model.latent_dim, generator=torch.Generator().manual_seed(seed))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(scans), at_once):
            x = torch.from_numpy(np.ascontiguousarray(scans.x[start : start + at_once]))
            condition = torch.from_numpy(np.ascontiguousarray(scans.condition[start : start + at_once]))
            mean, log_variance = model.encode(x, condition)
            centre, spread = model.prior_mean(condition), torch.exp(0.5 * log_variance)
            kl = 0.5 * ((mean - centre).square() + log_variance.exp() - 1 - log_variance).sum(1).double()
            errors, ratios = [], []
            for code in noise:
                z = mean + spread * code
                errors.append(model.reconstruction(x, z, condition).double())
                # log p(z | c) - log q(z | x, c), from which the normal constants cancel.
                ratios.append(0.5 * (code.square() + log_variance - (z - centre).square()).sum(1).double())
            error, ratio = torch.stack(errors), torch.stack(ratios)
            likelihood = torch.logsumexp(ratio - error, 0) - math.log(draws)
            of_scan = [likelihood, -error.mean(0) - kl, -error.mean(0)]
            parts.append(torch.stack(of_scan, 1).numpy())
    return dict(zip(("likelihood", "elbo", "reconstruction"), np.concatenate(parts).T, strict=True))


def patient_scores(scores: Mapping[str, Floats], patient: Ints) -> dict[str, Floats]:
    """Return the mean and the maximum of each score over each patient's scans, patients in sorted order."""
    rows = [patient == p for p in np.unique(patient)]
    reduced = {}
    for name, values in scores.items():
        reduced[f"{name}, mean"] = np.asarray([values[r].mean() for r in rows])
        reduced[f"{name}, maximum"] = np.asarray([values[r].max() for r in rows])
    return reduced


def attack(model: Scorable, members: Scans, others: Scans, draws: int, seed: int) -> dict[str, Scores]:
    """Score members and non-members by every score."""
    inside = patient_scores(scan_scores(model, members, draws, seed), members.patient)
    outside = patient_scores(scan_scores(model, others, draws, seed), others.patient)
    return {name: Scores(inside[name], outside[name]) for name in inside}


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

    The interval is Clopper-Pearson's over members. It needs 1 / FPR non-members at least: with fewer, not one false
    accusation could be resolved, and no number is given.
    """
    needs, n = math.ceil(1 / asked), len(scores.others)
    if n < max(needs, MIN_PATIENTS) or len(scores.members) < MIN_PATIENTS:
        return Rate(asked, None, None, None, None, max(needs, MIN_PATIENTS))
    allowed = math.floor(asked * n)
    threshold = np.sort(scores.others)[::-1][allowed]
    hits = int((scores.members > threshold).sum())
    low, high = clopper_pearson(hits, len(scores.members), confidence)
    return Rate(asked, hits / len(scores.members), low, high, float((scores.others > threshold).mean()), needs)


def excess(attacks: Mapping[str, Scores], bound: Bound, confidence: float) -> float:
    """Return the largest amount by which any attack is, with confidence, above the proven curve; negative: below.

    At each false positive rate asked for, the lower Clopper-Pearson bound of the TPR is set against the proven limit
    at the upper bound of the FPR. All scores and rates together keep the confidence (Bonferroni).
    """
    tests = len(attacks) * len(FALSE_POSITIVE_RATES) * 2
    strict = 1 - 2 * (1 - confidence) / tests
    lowest, worst = [], []
    for scores in attacks.values():
        n, m = len(scores.others), len(scores.members)
        for asked in FALSE_POSITIVE_RATES:
            allowed = math.floor(asked * n)
            hits = int((scores.members > np.sort(scores.others)[::-1][allowed]).sum())
            lowest.append(clopper_pearson(hits, m, strict)[0])
            worst.append(clopper_pearson(allowed, n, strict)[1])
    return float((np.asarray(lowest) - bound(np.asarray(worst))).max())


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


def curve(scores: Scores) -> dict[str, Any]:
    """Return the empirical ROC as lists for a figure."""
    fpr, tpr = roc(scores)
    return {"fpr": fpr.tolist(), "tpr": tpr.tolist(), "members": len(scores.members), "others": len(scores.others)}
