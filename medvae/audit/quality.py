"""The fidelity and utility parts of an audit: which numbers are taken, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medvae.audit import fidelity, radiomics, utility
from medvae.audit.case import Case, Figure, Part, finding, seconds_of
from medvae.audit.embedding import embed
from medvae.audit.fidelity import Group
from medvae.audit.intervals import Estimate
from medvae.audit.material import Ints, Scans, shrink
from medvae.audit.sheet import contact_sheet
from medvae.types import Condition, Finding

TOO_FEW = 4
PLANE, VOLUME, SEGMENTED_VOLUME = 64, 32, 48
# Learners that utility_part trains, and the steps by which their cost is foretold.
CLASSIFIERS, SEGMENTERS, LOOK = 4, 2, 4


def matched(made: Scans, real: Scans) -> Ints:
    """Return rows of synthetic scans whose conditions match those of the real scans best, none used twice.

    The synthetic cohort is spread evenly over the conditions and the real one is not; without matching, that
    difference, which is wanted, would count as a lack of fidelity.
    """
    from scipy.optimize import linear_sum_assignment

    if real.condition.shape[1] == 0:
        return np.arange(min(len(made), len(real)))
    apart = fidelity.distances(real.condition.astype(np.float64), made.condition.astype(np.float64))
    return np.sort(linear_sum_assignment(apart)[1]).astype(np.int64)


def fidelity_part(case: Case) -> Part:
    """Distances, manifold scores and radiomics of synthetic against held-out, beside training against held-out."""
    real, rng, effort = case.holdout, case.rng(1), case.effort
    confidence, replicates = case.config.confidence, effort.replicates
    findings, figures = list(_diversity(case)), {"synthetic scans": contact_sheet(case.made, case.made_provenance)}
    if min(len(real.patients), len(case.train.patients), len(case.made)) < TOO_FEW:
        verdict = f"not measurable: needs at least {TOO_FEW} held-out patients"
        names = ("frechet distance", "kernel distance", "radiomics distance, median feature")
        return Part((*findings, *(finding(n, "fidelity", None, verdict=verdict) for n in names)), figures)

    persons = rng.permutation(case.train.patients)[: len(real.patients)]
    other, made = case.train.of(np.sort(persons)), case.made.take(matched(case.made, real))
    held, peers, synthetic = (Group(embed(s.images), s.patient) for s in (real, other, made))

    for name, distance in (
        ("frechet distance", fidelity.frechet_distance),
        ("kernel distance", fidelity.kernel_distance),
    ):
        base = distance(peers, held, confidence, replicates, rng)
        found = distance(synthetic, held, confidence, replicates, rng)
        findings.append(finding(name, "fidelity", found, baseline=base.value, verdict=_against(found, base)))
    scores = fidelity.manifold(held, synthetic, confidence, replicates, rng)
    bases = fidelity.manifold(held, peers, confidence, replicates, rng)
    findings += [finding(n, "fidelity", scores[n], baseline=bases[n].value) for n in scores]
    more, figure = _radiomics(case, real, other, made)
    return Part((*findings, *more), {**figures, "feature distributions": figure})


def _against(found: Estimate, base: Estimate) -> str:
    """Say whether two intervals overlap; a distance below the baseline's is as good as one within it."""
    return "as close as real patients are to each other" if found.low <= base.high else "further than real patients are"


def _diversity(case: Case) -> list[Finding]:
    """MS-SSIM within the synthetic cohort stands alone: a real baseline beside it would make it a private number."""
    confidence, pairs, seed = case.config.confidence, case.effort.pairs, case.config.seed
    made = fidelity.diversity(case.made.images, case.made.patient, pairs, confidence, seed)
    verdict = "mean MS-SSIM of two synthetic scans: near 1 means that all look the same"
    found = [finding("diversity, ms-ssim", "fidelity", made, case.made_provenance, verdict=verdict)]
    real = fidelity.diversity(case.train.images, case.train.patient, pairs, confidence, seed)
    if made is None or real is None:
        return found
    verdict = "less diverse than real patients" if made.low > real.high else "as diverse as real patients or more"
    return [*found, finding("diversity, ms-ssim, beside real", "fidelity", made, baseline=real.value, verdict=verdict)]


def _radiomics(case: Case, real: Scans, other: Scans, made: Scans) -> tuple[list[Finding], Figure]:
    confidence, replicates, rng = case.config.confidence, case.effort.replicates, case.rng(2)
    names = radiomics.feature_names(case.made.space.mask_labels)
    held, peers, synthetic = (radiomics.features(s) for s in (real, other, made))

    def compare(x: radiomics.Floats, patient: Ints) -> Estimate:
        return radiomics.median_wasserstein(held, real.patient, x, patient, confidence, replicates, rng)

    found, base = compare(synthetic, made.patient), compare(peers, other.patient)
    apart, usual = radiomics.wasserstein(held, synthetic), radiomics.wasserstein(held, peers)
    worst = int(np.argmax(apart - usual))
    findings = [
        finding(
            "radiomics distance, median feature", "fidelity", found, baseline=base.value, verdict=_against(found, base)
        ),
        finding(
            "radiomics distance, worst feature",
            "fidelity",
            Estimate(float(apart[worst]), np.nan, np.nan, found.n),
            baseline=float(usual[worst]),
            verdict=f"{names[worst]}, in standard deviations of real patients",
        ),
    ]
    shapes = radiomics.distributions(held, synthetic, names)
    rows = {n: {**shapes[n], "distance": apart[i], "baseline": usual[i]} for i, n in enumerate(names)}
    return findings, Figure("Features of held-out real and synthetic scans", "private", rows)


def utility_part(case: Case) -> Part:
    """Train on synthetic, test on held-out: the first class, the first covariate, and the masks."""
    budget = utility.Budget(
        case.effort.classifier_steps, case.config.confidence, case.effort.replicates, case.config.seed
    )
    conditions = case.made.space.conditions
    first_class = next((c for c in conditions if c.kind == "class" and len(c.classes) > 1), None)
    covariate = next((c for c in conditions if c.kind == "continuous"), None)
    findings: list[Finding] = []
    if first_class is not None:
        findings += _classification(case, first_class, budget)
    if covariate is not None:
        findings += _regression(case, covariate, budget)
    if case.made.space.mask_labels:
        findings += _segmentation(case, budget)
    return Part(tuple(findings))


def learners_seconds(case: Case) -> float:
    """Estimate what the learners of `utility_part` take, from a few steps of one of each kind on synthetic scans."""
    made, effort = case.made.take(np.arange(min(len(case.made), utility.BATCH))), case.effort
    first_class = next((c for c in made.space.conditions if c.kind == "class" and len(c.classes) > 1), None)
    seconds = 0.0
    if first_class is not None:
        few = _small(made, VOLUME)
        step = _step_seconds(case, lambda budget: utility.classify(few, few.take(np.arange(2)), first_class, budget))
        seconds += CLASSIFIERS * step * effort.classifier_steps
    if made.space.mask_labels:
        cut = _small(made, SEGMENTED_VOLUME)
        step = _step_seconds(case, lambda budget: utility.segment(cut, cut.take(np.arange(1)), budget))
        seconds += SEGMENTERS * step * effort.segmenter_steps
    return seconds


def _step_seconds(case: Case, fit: Callable[[utility.Budget], object]) -> float:
    """Time a step of a learner, less what a fit of one step takes; the very first loads what it needs."""

    def timed(steps: int) -> float:
        return seconds_of(lambda: fit(utility.Budget(steps, case.config.confidence, 1, case.config.seed)))

    timed(1)
    once = timed(1)
    return max(0.0, timed(1 + LOOK) - once) / LOOK


def _small(scans: Scans, volume: int) -> Scans:
    return shrink(scans, PLANE if scans.space.spatial_dims == 2 else volume)


def _classification(case: Case, condition: Condition, budget: utility.Budget) -> list[Finding]:
    train, test, made = (_small(s, VOLUME) for s in (case.train, case.holdout, case.made))
    found = _consistency(case, made, condition, budget)
    present = [len(np.unique(s.labels(condition))) for s in (train, test, made)]
    if min(present) < 2 or len(test.patients) < TOO_FEW:
        verdict = f"not measurable: needs two classes and at least {TOO_FEW} held-out patients"
        return [*found, finding(f"classification of {condition.name}, auc", "utility", None, verdict=verdict)]
    floor_set = utility.class_means(made, condition, utility.BATCH, case.config.seed)
    score = utility.classify(made, test, condition, budget)
    ceiling = utility.classify(train, test, condition, budget)
    floor = utility.classify(floor_set, test, condition, budget)
    for name in score:
        verdict = _between(score[name], floor[name].value, ceiling[name].value)
        label = f"classification of {condition.name}, {name}"
        found.append(
            finding(
                label, "utility", score[name], baseline=floor[name].value, control=ceiling[name].value, verdict=verdict
            )
        )
    return found


def _consistency(case: Case, made: Scans, condition: Condition, budget: utility.Budget) -> list[Finding]:
    """Half of the synthetic scans teach the class that was asked for, the other half test it: no real scan enters."""
    first, second = made.take(np.arange(0, len(made), 2)), made.take(np.arange(1, len(made), 2))
    if min(len(np.unique(s.labels(condition))) for s in (first, second)) < 2:
        return []
    score = utility.classify(first, second, condition, budget)["auc"]
    verdict = "synthetic against synthetic: can the class that was asked for be seen?"
    name = f"class {condition.name} visible in synthetic scans, auc"
    return [finding(name, "utility", score, case.made_provenance, baseline=0.5, verdict=verdict)]


def _regression(case: Case, condition: Condition, budget: utility.Budget) -> list[Finding]:
    if min(len(case.holdout.patients), len(case.train.patients)) < TOO_FEW:
        verdict = f"not measurable: needs at least {TOO_FEW} held-out patients"
        return [finding(f"regression of {condition.name}, r2", "utility", None, verdict=verdict)]
    features = {s: embed(scans.images) for s, scans in (("made", case.made), ("train", case.train))}
    target = {s: _values(scans, condition) for s, scans in (("made", case.made), ("train", case.train))}
    held, truth = embed(case.holdout.images), _values(case.holdout, condition)
    score = utility.regress(features["made"], target["made"], held, truth, case.holdout.patient, budget)
    ceiling = utility.regress(features["train"], target["train"], held, truth, case.holdout.patient, budget)
    guess = float(target["made"].mean())
    spread = float(np.square(truth - truth.mean()).sum())
    floor = {
        "r2": 1 - float(np.square(truth - guess).sum()) / spread if spread > 0 else float("nan"),
        "mean absolute error": float(np.abs(truth - guess).mean()),
    }
    found = []
    for name in score:
        verdict = _between(score[name], floor[name], ceiling[name].value, rising=name == "r2")
        label = f"regression of {condition.name}, {name}"
        found.append(
            finding(label, "utility", score[name], baseline=floor[name], control=ceiling[name].value, verdict=verdict)
        )
    return found


def _values(scans: Scans, condition: Condition) -> radiomics.Floats:
    return np.asarray([float(condition.decode(row)) for row in scans.column(condition)])


def _segmentation(case: Case, budget: utility.Budget) -> list[Finding]:
    train, test, made = (_small(s, SEGMENTED_VOLUME) for s in (case.train, case.holdout, case.made))
    if len(test.patients) < TOO_FEW:
        verdict = f"not measurable: needs at least {TOO_FEW} held-out patients"
        return [finding("segmentation, dice", "utility", None, verdict=verdict)]
    steps = utility.Budget(case.effort.segmenter_steps, budget.confidence, budget.replicates, budget.seed)
    score, ceiling = utility.segment(made, test, steps), utility.segment(train, test, steps)
    floor = utility.segment_floor(made, test, steps)
    return [
        finding(
            f"segmentation of label {label}, dice",
            "utility",
            score[label],
            baseline=floor[label].value,
            control=ceiling[label].value,
            verdict=_between(score[label], floor[label].value, ceiling[label].value),
        )
        for label in score
    ]


def _between(score: Estimate, floor: float, ceiling: float, *, rising: bool = True) -> str:
    """Say where a score lies between floor (baseline) and ceiling (control)."""
    better = score.value > floor if rising else score.value < floor
    if not better:
        return "no better than the synthetic means alone"
    reaches = score.high >= ceiling if rising else score.low <= ceiling
    return "real data's score lies within the interval" if reaches else "between the synthetic means and real data"
