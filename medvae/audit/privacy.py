"""The privacy part of an audit: what is proven, what the attack finds, and whether the attack can be believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from medvae.audit import membership, neighbours
from medvae.audit.case import Case, Figure, Part, finding
from medvae.audit.embedding import embed
from medvae.audit.intervals import Estimate, auc
from medvae.audit.material import Scans, shrink
from medvae.audit.membership import Scores
from medvae.types import Finding, Mechanism

CONTROL_PLANE, CONTROL_VOLUME = 32, 16
DIAGNOSTIC = "debugging only, never evidence of privacy"


def privacy_part(case: Case) -> Part:
    """Membership attack with baseline and controls, then the diagnostics."""
    rng = case.rng(3)
    count = len(case.holdout.patients)
    members = case.train.of(np.sort(rng.permutation(case.train.patients)[:count]))
    others = case.holdout.of(np.sort(rng.permutation(case.holdout.patients)[: len(members.patients)]))
    fewest = len(others.patients)
    diagnostics = _diagnostics(case, members, others)
    if fewest < membership.MIN_PATIENTS:
        verdict = f"not measurable: {fewest} held-out patients, needs at least {membership.MIN_PATIENTS}"
        found = finding(f"membership, {membership.PRIMARY}, auc", "privacy", None, verdict=verdict)
        return Part((found, *diagnostics), notes={"membership": "not measurable", "reason": verdict})

    from medvae.nets.build import load_release

    seed, confidence = case.config.seed, case.config.confidence
    blind = _blind(case, members, others)
    control = _control(case)
    attacks = membership.attack(load_release(case.release), members, others, case.effort.draws, seed)
    why_not = membership.measurable(attacks[membership.PRIMARY])
    if why_not:
        found = finding(f"membership, {membership.PRIMARY}, auc", "privacy", None, verdict=why_not)
        return Part((found, blind, *diagnostics), notes={"membership": "not measurable", "reason": why_not})

    attacks = {name: scores for name, scores in attacks.items() if not membership.measurable(scores)}
    state = _state(blind, control)
    above = membership.excess(attacks, lambda fpr: _bound(case.claim, fpr), confidence)
    findings = [
        *_areas(attacks, blind, control, state, confidence),
        *_rates(case, attacks[membership.PRIMARY], control, state),
        _against_proof(above, case.claim, state, fewest),
        blind,
        *_controls(attacks, control, confidence, seed),
    ]
    notes = {
        "membership": state or "measured",
        "refuted": above > 0 and not state.startswith("INVALID"),
        "auc": membership.area(attacks[membership.PRIMARY], confidence),
    }
    return Part((*findings, *diagnostics), _figures(case, attacks, control), notes)


def _bound(claim: Mapping[str, Any], fpr: membership.Floats) -> membership.Floats:
    """Return the proven limit of the TPR; 1 where nothing is proven."""
    from medvae.dp.tradeoff import tpr_bound

    if claim["epsilon"] is None:
        return np.ones_like(fpr)
    return np.asarray(tpr_bound([Mechanism.from_json(m) for m in claim["mechanisms"]], fpr), dtype=np.float64)


def _blind(case: Case, members: Scans, others: Scans) -> Finding:
    inside, outside = (membership.patient_means(embed(s.images), s.patient) for s in (members, others))
    found = membership.blind_baseline(inside, outside, case.config.confidence, case.config.seed)
    fair = found.low <= 0.5 <= found.high
    verdict = (
        "valid: members and non-members cannot be told apart without the model"
        if fair
        else "INVALID: members and non-members differ without the model, so no membership result below can be believed"
    )
    return finding("membership, blind baseline, auc", "privacy", found, baseline=0.5, verdict=verdict)


def _control(case: Case) -> dict[str, Scores]:
    """Attack a non-private model trained to overfit; its members and non-members are both training patients."""
    from medvae.audit.control import overfit

    pool = shrink(case.train, CONTROL_PLANE if case.train.space.spatial_dims == 2 else CONTROL_VOLUME)
    order = case.rng(4).permutation(pool.patients)
    size = min(case.effort.control_patients, len(order) // 2)
    inside, outside = pool.of(order[:size]), pool.of(order[size : 2 * size])
    if size < membership.MIN_PATIENTS:
        return {}
    model = overfit(inside, case.effort.control_steps, case.config.seed)
    return membership.attack(model, inside, outside, case.effort.draws, case.config.seed)


def _broken(control: Mapping[str, Scores]) -> bool:
    primary = control.get(membership.PRIMARY)
    return primary is not None and auc(primary.members, primary.others) >= membership.BROKEN_AUC


def _state(blind: Finding, control: Mapping[str, Scores]) -> str:
    if blind.verdict.startswith("INVALID"):
        return "INVALID: the blind baseline tells members from non-members"
    if not _broken(control):
        return "INCONCLUSIVE: the attack did not break the model that was made to leak"
    return ""


def _areas(
    attacks: Mapping[str, Scores], blind: Finding, control: Mapping[str, Scores], state: str, confidence: float
) -> list[Finding]:
    found = []
    for name in sorted(attacks, key=lambda n: n != membership.PRIMARY):
        estimate = membership.area(attacks[name], confidence)
        beside = auc(control[name].members, control[name].others) if name in control else None
        seen = "no better than guessing, as far as this many patients can tell"
        verdict = state or (seen if estimate.low <= 0.5 else "better than guessing: some membership shows")
        found.append(
            finding(
                f"membership, {name}, auc", "privacy", estimate, baseline=blind.value, control=beside, verdict=verdict
            )
        )
    return found


def _rates(case: Case, scores: Scores, control: Mapping[str, Scores], state: str) -> list[Finding]:
    found = []
    for asked in membership.FALSE_POSITIVE_RATES:
        name = f"membership, {membership.PRIMARY}, tpr at {asked:.0%} fpr"
        got = membership.rate(scores, asked, case.config.confidence)
        if got.value is None or got.low is None or got.high is None:
            have = len(scores.others)
            verdict = f"not measurable: needs {got.needs} non-members, there are {have}"
            found.append(finding(name, "privacy", None, n=have, baseline=asked, verdict=verdict))
            continue
        leaky = membership.rate(control[membership.PRIMARY], asked, case.config.confidence) if control else None
        limit = float(_bound(case.claim, np.asarray([asked]))[0])
        words = "no limit is proven for this model" if case.claim["epsilon"] is None else f"proven limit {limit:.3g}"
        estimate = Estimate(got.value, got.low, got.high, len(scores.members))
        beside = None if leaky is None else leaky.value
        found.append(
            finding(
                name,
                "privacy",
                estimate,
                baseline=asked,
                control=beside,
                verdict=f"{state}; {words}" if state else words,
            )
        )
    return found


def _against_proof(above: float, claim: Mapping[str, Any], state: str, n: int) -> Finding:
    if claim["epsilon"] is None:
        return finding(
            "membership, above the proven curve", "privacy", None, verdict="no curve is proven for this model"
        )
    verdict = "ABOVE the proven curve: the claim is refuted" if above > 0 else "under the proven curve"
    estimate = Estimate(above, float("nan"), float("nan"), n)
    return finding(
        "membership, above the proven curve",
        "privacy",
        estimate,
        baseline=0.0,
        verdict=f"{state}; {verdict}" if state else verdict,
    )


def _controls(
    attacks: Mapping[str, Scores], control: Mapping[str, Scores], confidence: float, seed: int
) -> list[Finding]:
    name = "membership, positive control, auc"
    primary = control.get(membership.PRIMARY)
    if primary is None or membership.measurable(primary):
        verdict = f"not measurable: needs {2 * membership.MIN_PATIENTS} training patients and finite scores"
        positive = finding(name, "privacy", None, verdict=verdict)
    else:
        verdict = "broken, as it must be" if _broken(control) else f"NOT broken: below {membership.BROKEN_AUC}"
        positive = finding(name, "privacy", membership.area(primary, confidence), baseline=0.5, verdict=verdict)
    alarms = membership.false_alarms(attacks[membership.PRIMARY].others, confidence, seed)
    calm = alarms.value <= 3 * (1 - confidence)
    verdict = "as rare as its confidence says" if calm else "too often: the intervals are too narrow here"
    negative = finding(
        "membership, negative control, false alarms", "privacy", alarms, baseline=1 - confidence, verdict=verdict
    )
    return [positive, negative]


def _figures(case: Case, attacks: Mapping[str, Scores], control: Mapping[str, Scores]) -> dict[str, Figure]:
    confidence = case.config.confidence
    rows = []
    for name, scores in attacks.items():
        found = membership.area(scores, confidence)
        row: dict[str, Any] = {"score": name, "auc": found.value, "low": found.low, "high": found.high}
        for asked in membership.FALSE_POSITIVE_RATES:
            row[f"tpr at {asked:.0%} fpr"] = membership.rate(scores, asked, confidence).value
        leaky = control.get(name)
        rows.append(row | {"control auc": None if leaky is None else auc(leaky.members, leaky.others)})
    curves: dict[str, Any] = {"model": membership.curve(attacks[membership.PRIMARY])}
    if membership.PRIMARY in control:
        curves["positive control"] = membership.curve(control[membership.PRIMARY])
    return {
        "empirical roc": Figure(
            "Membership attack on real patients", "private", {"score": membership.PRIMARY, "curves": curves}
        ),
        "attack scores": Figure("Every score of the membership attack", "private", {"rows": rows}),
    }


def _diagnostics(case: Case, members: Scans, others: Scans) -> list[Finding]:
    """Closest records, with one random scan a patient so that both real groups are of one size."""
    if len(others.patients) < 2:
        return []
    one, two = _one_each(members, case.rng(5)), _one_each(others, case.rng(6))
    first, second = case.holdout.halves(case.rng(7))
    found = []
    for name, view in (("embedding", lambda s: embed(s.images)), ("pixels", neighbours.pixels)):
        made, train, held = view(case.made), view(one), view(two)
        share = neighbours.closer_to_training(made, train, held, case.config.confidence)
        near = float(np.median(neighbours.closest(made, train)))
        usual = float(np.median(neighbours.closest(view(first), view(second))))
        found.append(
            finding(f"closest record is a training one, {name}", "privacy", share, baseline=0.5, verdict=DIAGNOSTIC)
        )
        estimate = Estimate(near, float("nan"), float("nan"), len(made))
        found.append(
            finding(
                f"median distance to closest training record, {name}",
                "privacy",
                estimate,
                baseline=usual,
                verdict=DIAGNOSTIC,
            )
        )
    return found


def _one_each(scans: Scans, rng: np.random.Generator) -> Scans:
    return scans.take(np.asarray([rng.choice(np.flatnonzero(scans.patient == p)) for p in scans.patients]))
