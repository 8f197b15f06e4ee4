"""What a run claims, what follows from the claim by mathematics, and the part of the decision that may be published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medvae.audit.case import Figure, Part, finding
from medvae.audit.intervals import Estimate
from medvae.errors import RunError
from medvae.types import Mechanism

SCHEMA = "medvae.privacy/1"
# What is carried over from privacy.json: an allow-list, so that nothing new slips into a public report.
COPIED = (
    "epsilon",
    "delta",
    "unit",
    "neighboring",
    "accountant",
    "asked",
    "sample_rate",
    "noise_multiplier",
    "max_grad_norm",
    "steps",
    "mechanisms",
    "noise_source",
    "releasable",
    "patients",
    "reasons",
    "crosscheck",
    "declared_public",
    "plain_words",
    "versions",
)
REQUIRED = (
    "epsilon",
    "delta",
    "unit",
    "neighboring",
    "accountant",
    "mechanisms",
    "releasable",
    "patients",
    "fingerprint",
)
ACCOUNTANTS_AGREE = 0.01
CURVE_POINTS = 121


def read_privacy(run: Path) -> dict[str, Any]:
    """Read RUN/privacy.json.

    Raises RunError where it is missing, of another version, or lacks a part of the claim.
    """
    try:
        data = json.loads((run / "privacy.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError("this folder holds no finished run: let `medvae train` end, or give it --resume") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise RunError(f"the run is not of version {SCHEMA}: train again with this medvae")
    missing = [key for key in REQUIRED if key not in data]
    if missing:
        raise RunError(f"privacy.json of the run lacks {missing[0]!r}: train again")
    return data


def make_claim(privacy: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the claim as the reports print it, from public facts only."""
    from medvae.dp.tradeoff import plain_words

    receipt, copied = privacy.get("receipt") or {}, {key: privacy[key] for key in COPIED if key in privacy}
    if privacy["epsilon"] is not None:  # never words that the numbers do not say
        copied["plain_words"] = plain_words(privacy["epsilon"], privacy["delta"], mechanisms_of(copied))
    return {
        **copied,
        "receipt_digest": receipt.get("digest"),
        "weights_sha256": card.get("weights_sha256"),
    }


def mechanisms_of(claim: Mapping[str, Any]) -> list[Mechanism]:
    """Return the mechanisms of a claim."""
    return [Mechanism.from_json(m) for m in claim["mechanisms"]]


def claim_part(claim: Mapping[str, Any]) -> Part:
    """Return what the proof alone limits: public findings and the curve. Empty where nothing is proven."""
    if claim["epsilon"] is None:
        return Part()
    from medvae.dp.tradeoff import advantage, tpr_bound

    mechanisms = mechanisms_of(claim)
    fpr = np.concatenate([[0.0], np.logspace(-5, 0, CURVE_POINTS)])
    limit = np.asarray(tpr_bound(mechanisms, fpr), dtype=np.float64)

    def proven(name: str, value: float, baseline: float, verdict: str) -> Any:
        estimate = Estimate(value, float("nan"), float("nan"), int(claim["patients"]))
        return finding(name, "privacy", estimate, "public", baseline=baseline, verdict=verdict)

    findings = [
        proven(
            f"proven limit of tpr at {rate:.1%} fpr",
            float(tpr_bound(mechanisms, np.asarray([rate]))[0]),
            rate,
            "no attack can do better, whatever it knows; the baseline is guessing",
        )
        for rate in (0.001, 0.01, 0.1)
    ]
    findings.append(
        proven(
            "proven limit of membership advantage", advantage(mechanisms), 0.0, "largest tpr minus fpr of any attack"
        )
    )
    data = {"fpr": fpr, "tpr_bound": limit, "epsilon": claim["epsilon"], "delta": claim["delta"]}
    return Part(tuple(findings), {"proven curve": Figure("What the proof allows any attack", "public", data)})


def public_decision(claim: Mapping[str, Any]) -> dict[str, Any]:
    """Decide from the claim and its checks alone; no number measured on a patient has a say.

    A decision that hung on private numbers would itself be a private statistic, and could not be published.
    """
    from medvae.dp.tradeoff import STRONG_EPSILON, WEAK_EPSILON

    refusals, conditions = [], []
    epsilon, delta, patients = claim["epsilon"], float(claim["delta"]), max(1, int(claim["patients"]))
    if epsilon is None:
        refusals.append("the model was trained without noise: nothing is proven")
    if not claim["releasable"]:
        refusals += [str(reason) for reason in claim.get("reasons", [])] or ["the run is marked as not releasable"]
    if epsilon is not None and not claim.get("receipt_digest"):
        refusals.append("the ledger holds no receipt of this run")
    if epsilon is not None and not _accountants_agree(claim):
        refusals.append("the two accountants differ by more than 1 %")
    if epsilon is not None and epsilon > WEAK_EPSILON:
        conditions.append(
            f"epsilon {epsilon:.3g} (delta {delta:.2g}, unit {claim['unit']}, {claim['neighboring']}, "
            f"{claim['accountant']}) is a weak promise: share only under an agreement that forbids re-identification"
        )
    if delta > 1 / (10 * patients):
        conditions.append(f"delta {delta:.2g} is large for {patients} patients: let someone judge it before sharing")
    if not refusals and not conditions:
        strength = "strong" if epsilon <= STRONG_EPSILON else "moderate"
        reasons = [f"the claim is complete, its checks passed, and epsilon {epsilon:.3g} is a {strength} promise"]
        return {"verdict": "RELEASE", "reasons": reasons, "provenance": "public"}
    verdict = "DO NOT RELEASE" if refusals else "CONDITIONAL"
    return {"verdict": verdict, "reasons": list(dict.fromkeys(refusals + conditions)), "provenance": "public"}


def _accountants_agree(claim: Mapping[str, Any]) -> bool:
    other = (claim.get("crosscheck") or {}).get("epsilon")
    return other is None or abs(float(other) - claim["epsilon"]) <= ACCOUNTANTS_AGREE * claim["epsilon"]


def internal_decision(public: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, Any]:
    """Add what was measured on patients to the public decision; it can only become stricter."""
    refusals, conditions = [], []
    state = str(notes["membership"])
    if notes.get("refuted"):
        refusals.append("an attack on real patients went above the proven curve: the claim is refuted, find the defect")
    if state.startswith("INVALID"):
        conditions.append("membership results are INVALID: training and held-out patients differ without the model")
    elif state.startswith("INCONCLUSIVE"):
        conditions.append("membership results are INCONCLUSIVE: the attack did not break its positive control")
    elif state == "not measurable":
        conditions.append(f"membership was not measured ({notes['reason']}): only the proof speaks")
    if notes.get("copied"):
        conditions.append("more synthetic scans look like copies of training scans than chance explains: look at them")
    exposed, tested = notes.get("exposed", (0, 0))
    if exposed:
        conditions.append(
            f"{exposed} of {tested} tests of singling out, linkability and inference find training patients more "
            "exposed than others (by intervals that hold together)"
        )
    order = ("RELEASE", "CONDITIONAL", "DO NOT RELEASE")
    own = "DO NOT RELEASE" if refusals else "CONDITIONAL" if conditions else "RELEASE"
    verdict = max(str(public["verdict"]), own, key=order.index)
    kept = [] if public["verdict"] == "RELEASE" and verdict != "RELEASE" else list(public["reasons"])
    return {"verdict": verdict, "reasons": refusals + conditions + kept, "provenance": "private"}
