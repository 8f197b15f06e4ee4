"""From attacks to findings, figures and the report's own list: what each number is allowed to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medvae.audit import membership
from medvae.audit.attacks import Family, Pool
from medvae.audit.case import Case, Figure, Part, finding
from medvae.audit.copies import FALSE_FLAGS
from medvae.audit.inference import Risk
from medvae.audit.intervals import Estimate, auc
from medvae.audit.membership import Rate, Scores
from medvae.audit.risks import Copies, risk_json
from medvae.audit.shadows import Shadows
from medvae.audit.subgroups import Subgroup, subgroups
from medvae.types import Finding, Mechanism

INVALID = "INVALID: the blind baseline tells members from non-members"
INCONCLUSIVE = "INCONCLUSIVE: the attack did not break the model that was made to leak"
GUESSING = "no better than guessing, as far as this many patients can tell"


def nothing(reason: str) -> Part:
    """Return the part of a membership attack that could not be made: one sentence, and no number."""
    found = finding("membership, primary attack, auc", "privacy", None, verdict=reason)
    attacks: dict[str, Any] = {"primary": None, "state": "not measurable", "reason": reason, "membership": []}
    return Part((found,), {}, {"membership": "not measurable", "reason": reason}, attacks)


def membership_part(
    case: Case, families: Mapping[str, Family], blind: Estimate, primary: str | None, shadows: Sequence[Shadows]
) -> Part:
    """Return all membership attacks with baseline, controls, and the test against the proof."""
    attacks = {name: scores for family in families.values() for name, scores in family.attacks.items()}
    control = {name: scores for family in families.values() for name, scores in family.control.items()}
    blind_found = _blind(blind)
    why_not = "no attack could be made" if primary is None else membership.measurable(attacks[primary])
    if primary is None or why_not:
        part = nothing(why_not)
        return Part((*part.findings, blind_found), {}, part.notes, {**part.attacks, **_shadows(shadows)})
    attacks = {name: s for name, s in attacks.items() if not membership.measurable(s)}
    order = sorted(attacks, key=lambda name: name != primary)
    confidence = case.config.confidence
    areas = {name: membership.area(attacks[name], confidence) for name in order}
    state = _state(blind, control.get(primary))
    above = membership.excess(attacks, primary, lambda fpr: _bound(case.claim, fpr), confidence)
    rows = [
        _row(case, name, family, areas[name], blind)
        for name in order
        for family in families.values()
        if name in family.attacks
    ]
    findings = [
        *(_area(name, areas[name], blind, control.get(name), state) for name in order),
        *(_rate(case, primary, attacks[primary], control.get(primary), asked, state) for asked in RATES),
        _against_proof(above, case.claim, state, areas[primary].n),
        blind_found,
        *_controls(attacks[primary], control.get(primary), case),
    ]
    alarms = membership.false_alarms(attacks[primary].others, confidence, case.config.seed)
    found = {
        "primary": primary,
        "state": state or "measured",
        "reason": None,
        "members": len(attacks[primary].members),
        "others": len(attacks[primary].others),
        "membership": rows,
        "strongest": max(order, key=lambda name: areas[name].value),
        "above_proven": {"value": above, "verdict": findings[len(order) + len(RATES)].verdict},
        "blind": {"auc": blind._asdict(), "valid": _valid(blind)},
        "negative_control": {"false_alarms": alarms._asdict(), "expected": 1 - confidence},
        **_shadows(shadows),
    }
    notes = {
        "membership": state or "measured",
        "refuted": above > 0 and not state.startswith("INVALID"),
        "auc": areas[primary],
    }
    return Part(tuple(findings), _figures(case, attacks, control, primary, areas), notes, found)


RATES = tuple(sorted(membership.FALSE_POSITIVE_RATES, key=lambda rate: (rate != 0.01, rate)))


def _bound(claim: Mapping[str, Any], fpr: membership.Floats) -> membership.Floats:
    """Return the proven limit of the TPR; 1 where nothing is proven."""
    from medvae.dp.tradeoff import tpr_bound

    if claim["epsilon"] is None:
        return np.ones_like(fpr)
    return np.asarray(tpr_bound([Mechanism.from_json(m) for m in claim["mechanisms"]], fpr), dtype=np.float64)


def _valid(blind: Estimate) -> bool:
    return blind.low <= 0.5 <= blind.high


def _blind(blind: Estimate) -> Finding:
    verdict = (
        "valid: members and non-members cannot be told apart without the model"
        if _valid(blind)
        else "INVALID: members and non-members differ without the model, so no membership result below can be believed"
    )
    return finding("membership, blind baseline, auc", "privacy", blind, baseline=0.5, verdict=verdict)


def broken(control: Scores | None) -> bool:
    """Whether an attack told members of its positive control from non-members, as it must."""
    return control is not None and auc(control.members, control.others) >= membership.BROKEN_AUC


def _state(blind: Estimate, control: Scores | None) -> str:
    if not _valid(blind):
        return INVALID
    return "" if broken(control) else INCONCLUSIVE


def _area(name: str, area: Estimate, blind: Estimate, control: Scores | None, state: str) -> Finding:
    verdict = state or _own_verdict(area, blind, control)
    beside = None if control is None else auc(control.members, control.others)
    title = f"membership, {name}, auc"
    return finding(title, "privacy", area, baseline=blind.value, control=beside, verdict=verdict)


def _own_verdict(area: Estimate, blind: Estimate, control: Scores | None) -> str:
    if not _valid(blind):
        return INVALID
    if area.low > 0.5:
        return "better than guessing: some membership shows"
    return GUESSING if broken(control) else f"{GUESSING}; this attack is weak: it did not break its positive control"


def _row(case: Case, name: str, family: Family, area: Estimate, blind: Estimate) -> dict[str, Any]:
    """Return one attack in the report's own list."""
    scores, control, confidence = family.attacks[name], family.control.get(name), case.config.confidence
    score, *how = name.rsplit(", ", 2) if family.name == "white-box" else (name, "reference generators")
    return {
        "name": name,
        "family": family.name,
        "threat_model": family.threat_model,
        "score": score,
        "calibration": how[0],
        "auc": area._asdict(),
        "tpr": [_rate_json(case, membership.rate(scores, asked, confidence)) for asked in RATES],
        "roc": membership.curve(scores),
        "control": None
        if control is None or membership.measurable(control)
        else {
            "what": family.control_is,
            "auc": membership.area(control, confidence)._asdict(),
            "tpr": [_rate_json(case, membership.rate(control, asked, confidence), leaky=True) for asked in RATES],
        },
        "verdict": _own_verdict(area, blind, control),
    }


def _rate_json(case: Case, rate: Rate, leaky: bool = False) -> dict[str, Any]:
    limit = None if leaky or case.claim["epsilon"] is None else float(_bound(case.claim, np.asarray([rate.asked]))[0])
    return {
        "fpr": rate.asked,
        "value": rate.value,
        "low": rate.low,
        "high": rate.high,
        "realised_fpr": rate.realised,
        "fpr_high": rate.fpr_high,
        "needs": rate.needs,
        "proven_limit": limit,
        "words": rate.words,
    }


def _rate(case: Case, primary: str, scores: Scores, control: Scores | None, asked: float, state: str) -> Finding:
    confidence = case.config.confidence
    name = f"membership, {primary}, tpr at {asked * 100:g}% fpr"
    got = membership.rate(scores, asked, confidence)
    leaky = None if control is None else membership.rate(control, asked, confidence).value
    if got.value is None or got.low is None or got.high is None:
        return finding(name, "privacy", None, n=got.others, baseline=asked, control=leaky, verdict=got.words)
    limit = float(_bound(case.claim, np.asarray([asked]))[0])
    words = "no limit is proven for this model" if case.claim["epsilon"] is None else f"proven limit {limit:.3g}"
    return finding(
        name,
        "privacy",
        Estimate(got.value, got.low, got.high, got.members),
        baseline=asked,
        control=leaky,
        verdict="; ".join(part for part in (state, words, got.words) if part),
    )


def _against_proof(above: float, claim: Mapping[str, Any], state: str, n: int) -> Finding:
    name = "membership, above the proven curve"
    if claim["epsilon"] is None:
        return finding(name, "privacy", None, verdict="no curve is proven for this model")
    verdict = "ABOVE the proven curve: the claim is refuted" if above > 0 else "under the proven curve"
    estimate = Estimate(above, float("nan"), float("nan"), n)
    return finding(name, "privacy", estimate, baseline=0.0, verdict=f"{state}; {verdict}" if state else verdict)


def _controls(scores: Scores, control: Scores | None, case: Case) -> list[Finding]:
    name, confidence = "membership, positive control, auc", case.config.confidence
    if control is None or membership.measurable(control):
        verdict = f"not measurable: needs {4 * membership.MIN_PATIENTS} patients and finite scores"
        positive = finding(name, "privacy", None, verdict=verdict)
    else:
        verdict = "broken, as it must be" if broken(control) else f"NOT broken: below {membership.BROKEN_AUC}"
        positive = finding(name, "privacy", membership.area(control, confidence), baseline=0.5, verdict=verdict)
    alarms = membership.false_alarms(scores.others, confidence, case.config.seed)
    calm = alarms.value <= 3 * (1 - confidence)
    verdict = "as rare as its confidence says" if calm else "too often: the intervals are too narrow here"
    title = "membership, negative control, false alarms"
    return [positive, finding(title, "privacy", alarms, baseline=1 - confidence, verdict=verdict)]


def _figures(
    case: Case,
    attacks: Mapping[str, Scores],
    control: Mapping[str, Scores],
    primary: str,
    areas: Mapping[str, Estimate],
) -> dict[str, Figure]:
    confidence = case.config.confidence
    rows = []
    for name, area in areas.items():
        row: dict[str, Any] = {"score": name, "auc": area.value, "low": area.low, "high": area.high}
        for asked in membership.FALSE_POSITIVE_RATES:
            row[f"tpr at {asked * 100:g}% fpr"] = membership.rate(attacks[name], asked, confidence).value
        leaky = control.get(name)
        rows.append(row | {"control auc": None if leaky is None else auc(leaky.members, leaky.others)})
    shown = attacks[primary]
    curves: dict[str, Any] = {"model": membership.curve(shown) | {"band": membership.band(shown, confidence)}}
    if primary in control:
        curves["positive control"] = membership.curve(control[primary])
    data = {"score": primary, "curves": curves}
    return {
        "empirical roc": Figure("Membership attack on real patients", "private", data),
        "attack scores": Figure("Every membership attack", "private", {"rows": rows}),
    }


def _shadows(shadows: Sequence[Shadows]) -> dict[str, Any]:
    return {
        "shadows": {
            "asked": sum(s.asked for s in shadows),
            "trained": sum(len(s) for s in shadows),
            "failed": sum(s.failed for s in shadows),
            "resumed": sum(s.resumed for s in shadows),
            "seconds": sum(s.seconds for s in shadows),
            "words": "; ".join(s.words for s in shadows if s.words),
        }
    }


def subgroup_part(case: Case, families: Mapping[str, Family], primary: str | None, pool: Pool) -> Part:
    """Return the primary attack within each class, and the worst of them."""
    family = next((f for f in families.values() if primary in f.attacks), None)
    if primary is None or family is None or membership.measurable(family.attacks[primary]):
        return Part()
    scores = family.attacks[primary]
    about = pool if len(scores.members) + len(scores.others) == len(pool.member) else pool.only_judged()
    found = subgroups(scores, about.scans, about.member, case.config.confidence)
    if not found:
        return Part()
    rows = [_subgroup(group) for group in found]
    measured = [g for g in found if g.area is not None]
    worst = max(measured, key=lambda g: g.area.value if g.area else 0.0) if measured else None
    name = "membership, worst subgroup, auc"
    if worst is None:
        line = finding(name, "privacy", None, verdict=found[0].verdict)
    else:
        verdict = f"{worst.condition} {worst.value}, the worst of {len(measured)}: {worst.verdict}"
        line = finding(name, "privacy", worst.area, baseline=0.5, verdict=verdict)
    table = [
        {"subgroup": f"{r['condition']} {r['class']}", **{k: r[k] for k in ("members", "others")}}
        | {k: (r["auc"] or {}).get(k) for k in ("value", "low", "high")}
        | {"p, corrected": r["p_corrected"]}
        for r in rows
    ]
    figure = Figure("The primary attack by subgroup, intervals corrected together", "private", {"rows": table})
    return Part((line,), {"subgroup risk": figure}, {}, {"subgroups": rows})


def _subgroup(group: Subgroup) -> dict[str, Any]:
    return {
        "condition": group.condition,
        "class": group.value,
        "members": group.members,
        "others": group.others,
        "auc": None if group.area is None else group.area._asdict(),
        "p": group.p,
        "p_corrected": group.p_corrected,
        "verdict": group.verdict,
    }


def copies_part(found: Copies) -> Part:
    """Return findings about copies."""
    lines = (
        finding(
            "copies, flagged share",
            "privacy",
            found.share,
            baseline=FALSE_FLAGS,
            control=found.planted_found.value,
            verdict=found.verdict,
        ),
        finding(
            "copies, false flags",
            "privacy",
            found.false_flags,
            baseline=FALSE_FLAGS,
            verdict=found.words,
            n=found.chance,
        ),
    )
    return Part(lines, {}, {"copied": found.copied}, {"copies": found.to_json()})


def risks_part(found: Sequence[Risk]) -> Part:
    """Return findings about singling out, linkability and inference."""
    if not found:
        verdict = f"not measurable: needs at least {membership.MIN_PATIENTS} patients on either side"
        return Part((finding("singling out risk", "privacy", None, verdict=verdict),), {}, {}, {"risks": []})
    lines = [
        finding(
            risk.name,
            "privacy",
            risk.risk,
            baseline=risk.baseline.value,
            control=risk.control.value,
            verdict=risk.verdict,
        )
        for risk in found
    ]
    rows = [
        {
            "attack": risk.name,
            "risk": risk.risk.value,
            "low": risk.risk.low,
            "high": risk.risk.high,
            "success, training": risk.attack.value,
            "success, held out": risk.control.value,
            "naive guess": risk.baseline.value,
        }
        for risk in found
    ]
    figure = Figure("Singling out, linkability and inference", "private", {"rows": rows})
    exposed = {"exposed": (sum(risk.exposed for risk in found), len(found))}
    return Part(tuple(lines), {"attribute risks": figure}, exposed, {"risks": [risk_json(risk) for risk in found]})
