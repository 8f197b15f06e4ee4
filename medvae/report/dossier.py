"""Completes an audit.json with what a board asks beside the attacks: the epsilon ladder, the budget over time, the
three risks, the canary audit, dates and signatures. Everything shown later stands in the JSON after this step.

Sources: the run's public claim, its ledger and canary.json, which touch no patient, and (internal reports only) the
attacks that the audit itself ran. So a public report stays independent of every scan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from medvae.dp.accounting import pld_epsilon
from medvae.dp.tradeoff import in_short, reid_bound
from medvae.errors import MedvaeError
from medvae.gate.evidence import Spending, read_canary, read_spending
from medvae.report.volumes import volumes
from medvae.report.words import RESIDUAL_RISKS, SIGNATORIES
from medvae.synth.store import read_release
from medvae.types import Mechanism, ModelRelease

REVIEW_MONTHS = 12
BLIND_GUESS = 0.01  # the baseline of a risk that no attack measured
LADDER_RATE = 0.1  # the rate of false accusations, chosen beforehand, from which an attack's epsilon is read
REFUTED = "REFUTED"
NO_CANARIES = "whether the programme does what the claim says: no canary audit gave a result on this run"
CANARY_RESULT = (
    "part", "measurable", "accused", "confidence", "claimed_epsilon", "fdp_epsilon", "rates_epsilon", "gdp_epsilon",
    "visible_noise_factor",
)  # fmt: skip
RISKS = {
    "singling out": "Can one patient be picked out by what the release shows?",
    "linkability": "Can two pieces of knowledge be tied to one patient, or a patient to the cohort?",
    "inference": "Can something unknown about a patient be guessed better than without the release?",
}

Json = dict[str, Any]


def complete(audit: Mapping[str, Any], run: Path) -> Json:
    """Return the audit with its "board" and "viewer"; a decision can only become stricter by it.

    Raises RunError where the run's files are missing, and NotReleasable where its ledger is gone or was altered.
    """
    claim: Mapping[str, Any] = audit["claim"]
    mechanisms = [Mechanism.from_json(m) for m in claim["mechanisms"]]
    internal = audit.get("audience") == "internal"
    attacks: Mapping[str, Any] = (audit.get("attacks") or {}) if internal else {}
    canary = _canary(run, claim, mechanisms)
    release = read_release(run / "model")
    board = {
        "ladder": _ladder(claim, mechanisms, canary, attacks),
        "ledger": _ledger(read_spending(run, claim["delta"]), claim),
        "risks": _risks(claim, mechanisms, attacks, internal),
        "subgroup": _worst(attacks.get("subgroups") or []),
        "canary": canary,
        "model": _model(release),
        "residual_risks": list(RESIDUAL_RISKS),
        "review_date": _later(str(audit.get("created", ""))[:10]),
        "signatories": list(SIGNATORIES),
    }
    protected = claim["epsilon"] is not None and bool(claim["releasable"])
    viewer = volumes(release, "dp" if protected else "private") if protected or internal else None
    not_tested = [str(line) for line in audit.get("not_tested") or ()]
    if canary is None or canary["verdict"] == "NOT_MEASURABLE":
        not_tested.insert(0, NO_CANARIES)
    return {
        **audit,
        "not_tested": not_tested,
        "summary": _summary(audit, attacks, canary),
        "decision": _decision(audit["decision"], canary),
        "board": board,
        "viewer": viewer,
    }


def _canary(run: Path, claim: Mapping[str, Any], mechanisms: Sequence[Mechanism]) -> Json | None:
    """Judge canary.json anew; None where the run has none."""
    document = read_canary(run)
    if document is None:
        return None
    bound = document.get("weights_sha256") == claim.get("weights_sha256")
    if not bound or document.get("receipt_digest") != claim.get("receipt_digest"):
        return _unusable("canary.json is of another run or model: it says nothing here")
    from medvae.dp import canaries

    try:
        found = canaries.judge(document, mechanisms, claim["delta"])
    except MedvaeError as error:
        return _unusable(str(error))
    return {
        "provenance": "canary",
        "verdict": found.verdict,
        "count": document.get("count"),
        "words": [*found.reasons, *found.words],
        "checks": [answer.to_json() for answer in found.answers],
        "results": [{k: _finite(row.get(k)) for k in CANARY_RESULT} for row in found.results],
    }


def _unusable(words: str) -> Json:
    empty: Json = {"count": None, "checks": [], "results": []}
    return {"provenance": "canary", "verdict": "NOT_MEASURABLE", "words": [words]} | empty


def _ladder(
    claim: Mapping[str, Any], mechanisms: Sequence[Mechanism], canary: Json | None, attacks: Mapping[str, Any]
) -> Json:
    """Return the claimed epsilon, every lower bound that was found, and the smallest fault that would have shown."""
    epsilon, delta = claim["epsilon"], claim["delta"]
    rows = []
    if epsilon is not None:
        rows.append(_rung("claimed, by proof", epsilon, "claim", "public", in_short(epsilon, mechanisms)))
    result = _whole(canary)
    if result is not None and epsilon is not None:
        share = f"{100 * (result.get('confidence') or 0.95):g} %"
        for key, label, kind, words in (
            (
                "fdp_epsilon",
                "found on canaries, by guesses (f-DP)",
                "found",
                f"a lower bound that holds in {share} of audits",
            ),
            (
                "rates_epsilon",
                "found on canaries, by error rates",
                "found",
                f"a lower bound that holds in {share} of audits",
            ),
            ("gdp_epsilon", "if the curve is Gaussian", "estimate", "a description in one number, and no bound"),
        ):
            if result.get(key) is not None:
                rows.append(_rung(label, result[key], kind, "canary", words))
        factor = result.get("visible_noise_factor")
        if factor:
            weaker = [replace(m, noise_multiplier=m.noise_multiplier * factor) for m in mechanisms]
            words = (
                f"a leak as strong as noise of {factor:.2g} times the claim would be accused 9 times in 10; a weaker "
                "one would probably stay unseen (the noise itself is checked more exactly)"
            )
            rows.append(_rung("smallest fault it could see", pld_epsilon(weaker, delta), "fault", "canary", words))
    found = _attack_epsilon(attacks, delta)
    if found is not None:
        words = f"from the attack chosen beforehand, at {LADDER_RATE:.0%} wrong accusations; 95 % confidence"
        rows.append(_rung("found on real patients", found, "found", "private", words))
    seen = any(row["kind"] == "fault" for row in rows)
    blind = "No canary audit stands behind this claim: a fault of the programme would not have been seen."
    if result is not None:
        blind = "Scores of so few canaries and steps could accuse no fault; only the noise itself was checked."
    origin = "private" if found is not None else "canary" if result is not None else "public"
    return {"provenance": origin, "delta": delta, "rows": rows, "words": "" if seen or epsilon is None else blind}


def _rung(label: str, epsilon: float, kind: str, provenance: str, words: str) -> Json:
    return {"label": label, "epsilon": _finite(epsilon), "kind": kind, "provenance": provenance, "words": words}


def _whole(canary: Json | None) -> Json | None:
    """Return the canaries' result for all stages together, or for the one stage there is."""
    results = canary["results"] if canary else []
    return next((r for r in results if r["part"] == "all"), results[0] if results else None)


def _attack_epsilon(attacks: Mapping[str, Any], delta: float) -> float | None:
    """Return log((TPR_low - delta) / FPR_high), at least 0: what the attack on real patients shows of epsilon.

    Each bound holds at 97.5 % (Clopper & Pearson 1934), so both hold at 95 %; the ratio is bounded by e^epsilon
    (Kairouz, Oh & Viswanath 2015, theorem 2.1).
    """
    from scipy.stats import beta

    listed = attacks.get("membership") or []
    if attacks.get("state") != "measured" or not listed:
        return None
    row = next((r for r in listed[0].get("tpr") or [] if r.get("fpr") == LADDER_RATE), None)
    others = int(attacks.get("others") or 0)
    if row is None or row.get("low") is None or row.get("realised_fpr") is None or not others:
        return None
    wrong = round(row["realised_fpr"] * others)
    high = 1.0 if wrong >= others else float(beta.ppf(0.975, wrong + 1, others - wrong))
    return max(0.0, math.log(max(row["low"] - delta, 1e-12) / high))


def _ledger(spending: Spending, claim: Mapping[str, Any]) -> Json:
    """Return each charged run with its own and the running total of epsilon, at the claim's delta; no free text."""
    delta = claim["delta"]
    ended = {e.run_id for e in spending.entries if e.kind == "commit"}
    reserved = [e for e in spending.entries if e.kind == "reserve"]
    charged: list[Mechanism] = []
    rows = []
    for entry in (e for e in reserved if e.private):
        charged += entry.mechanisms
        total = pld_epsilon(charged, delta)
        rows.append(
            {
                "utc": entry.utc,
                "epsilon": pld_epsilon(entry.mechanisms, delta),
                "cumulative": total,
                "ended": entry.run_id in ended,
                "this": entry.receipt.digest == claim.get("receipt_digest"),
                "words": in_short(total, charged),
            }
        )
    budget = None if spending.budget is None else {"epsilon": spending.budget.epsilon, "delta": spending.budget.delta}
    return {
        "provenance": "public",
        "delta": delta,
        "budget": budget,
        "rows": rows,
        "not_private": sum(not e.private for e in reserved),
    }


def _risks(
    claim: Mapping[str, Any], mechanisms: Sequence[Mechanism], attacks: Mapping[str, Any], internal: bool
) -> list[Json]:
    """Return one row an attack on each of the three risks, and a row by proof alone where none was run."""
    alone = "proof alone; no attack was run" if internal else "proof; what attacks found stays internal"
    rows = []
    for kind, question in RISKS.items():
        measured = [r for r in attacks.get("risks") or [] if r.get("kind") == kind]
        for risk in measured or [{}]:
            blind = _blind(risk)
            limit = None if claim["epsilon"] is None else reid_bound(mechanisms, blind)
            value = risk.get("risk") or {}
            rows.append(
                {
                    "kind": kind,
                    "question": question,
                    "evidence": f"attack: {risk['name']}" if risk else alone,
                    "provenance": "private" if risk else "public",
                    **{k: _finite(value.get(k)) for k in ("value", "low", "high", "n")},
                    "attack": _finite((risk.get("attack") or {}).get("value")),
                    "control": _finite((risk.get("control") or {}).get("value")),
                    "blind_guess": blind,
                    "proven_limit": limit,
                    "verdict": str(risk.get("verdict") or ("limited by proof" if limit is not None else "no limit")),
                }
            )
    return rows


def _blind(risk: Mapping[str, Any]) -> float:
    given = (risk.get("baseline") or {}).get("value")
    return float(given) if isinstance(given, int | float) and 0 < given < 1 else BLIND_GUESS


def _worst(subgroups: Sequence[Mapping[str, Any]]) -> Json | None:
    """Return the subgroup that the attack tells best, of all that were tested."""
    known = [g for g in subgroups if (g.get("auc") or {}).get("value") is not None]
    if not known:
        return None
    worst = max(known, key=lambda g: float(g["auc"]["value"]))
    return {
        "provenance": "private",
        "name": f"{worst.get('condition')} {worst.get('class')}",
        "tested": len(known),
        "members": worst.get("members"),
        **{k: _finite(worst["auc"].get(k)) for k in ("value", "low", "high")},
        "verdict": str(worst.get("verdict") or ""),
    }


def _model(release: ModelRelease) -> Json:
    """Return what the model card says in public: the images it makes, and how it was trained."""
    space, recipe = release.space, release.card["recipe"]
    stages = [name for name in ("moments", "dpsgd") if (recipe.get(name) or {}).get("enabled")]
    return {
        "images": f"{' x '.join(str(n) for n in space.spatial_shape)} voxels, modality {space.modality}",
        "spacing_mm": list(space.spacing_mm),
        "conditions": [c.name for c in space.conditions],
        "mask_labels": list(space.mask_labels),
        "recipe": str(recipe.get("name", "")),
        "stages": stages,
        "latent_dim": (recipe.get("model") or {}).get("latent_dim"),
    }


def _summary(audit: Mapping[str, Any], attacks: Mapping[str, Any], canary: Json | None) -> list[str]:
    lines = [str(line) for line in audit.get("summary") or ()]
    told = [words for words in (_attack_words(attacks),) if words]
    if canary is not None:
        told += canary["words"][:1]
    return [*lines[:2], *told, *lines[2:]]


def _attack_words(attacks: Mapping[str, Any]) -> str:
    """Say what the attack chosen beforehand found, beside the proven limit, at the least rate that was measurable."""
    listed = attacks.get("membership") or []
    rows = [r for r in (listed[0].get("tpr") or [] if listed else []) if r.get("value") is not None]
    if not rows or attacks.get("state") != "measured":
        return ""
    row = min(rows, key=lambda r: float(r["fpr"]))
    limit = row.get("proven_limit")
    words = (
        f"At {100 * row['fpr']:g} wrong accusations in 100, the attack chosen before the audit found "
        f"{100 * row['value']:.3g} of 100 patients (95 % interval {100 * row['low']:.3g} to {100 * row['high']:.3g})"
    )
    return words + ("." if limit is None else f"; the proven limit is {100 * limit:.3g}.")


def _decision(decision: Mapping[str, Any], canary: Json | None) -> Json:
    if canary is None or canary["verdict"] != REFUTED:
        return dict(decision)
    words = "the canary audit refutes the claim: " + "; ".join(canary["words"])
    reasons = [r for r in decision["reasons"] if decision["verdict"] != "RELEASE"]
    return {**decision, "verdict": "DO NOT RELEASE", "reasons": [words, *reasons]}


def _later(day: str) -> str:
    """Return the day a year on, or nothing where the report has no date."""
    try:
        start = date.fromisoformat(day)
    except ValueError:
        return ""
    months = start.month - 1 + REVIEW_MONTHS
    return start.replace(year=start.year + months // 12, month=months % 12 + 1, day=min(start.day, 28)).isoformat()


def _finite(value: Any) -> Any:
    """Return None for numbers that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
