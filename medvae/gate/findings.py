"""What the gate asks of the audits before it opens: the report on attacks, and the canaries of the training itself.

A fault here is either a fact, which stays refused, or a judgement, which the data holder may override with a reason
that is recorded in the certificate and the public report. A report of another run or model, one that names a private
number, and a canary test that fails by more than chance are facts. That attacks did not run, a decision against the
release, and an accusation by canaries (which a correct build meets in up to 1 of 20 runs) are judgements.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from medvae.dp import canaries
from medvae.dp.marks import CANARIES, marks
from medvae.errors import MedvaeError
from medvae.gate.evidence import Audit, Evidence
from medvae.gate.outcome import Check
from medvae.schemas import problem

REQUIRED_ATTACKS = ("membership",)
"""First words of the findings without which no release leaves: the attack on membership with its controls."""
CLAIMED = ("epsilon", "delta", "mechanisms", "patients")
"""What a report has to say of the claim."""
SAME = (
    *CLAIMED,
    *("unit", "neighboring", "accountant", "sample_rate", "noise_multiplier", "max_grad_norm", "steps"),
    *("noise_source", "releasable", "crosscheck", "declared_public"),
)
"""What a report may not say otherwise than the run does."""


def report(evidence: Evidence) -> Check:
    """The report must be of this very run and model, made after them, and its public part free of private numbers."""
    audit = evidence.audit
    if audit is None:
        return Check("audit", True, "no report was given")
    faults = {
        "the report was edited since the audit wrote it": audit.edited,
        "the report is of another run": any(
            _claim(a).get("receipt_digest") != evidence.receipt.digest for a in _both(audit)
        ),
        "the report is of another model, or older than it": any(
            _claim(a).get("weights_sha256") != evidence.model.card["weights_sha256"] for a in _both(audit)
        ),
        "the report states another claim than the run": any(_differs(_claim(a), evidence) for a in _both(audit)),
        "the report was made before the run ended": any(_older(a, evidence) for a in _both(audit)),
        "the public report names something private, or is not as it should be": (
            audit.public.get("audience") != "public" or problem("audit", audit.public) is not None
        ),
    }
    found = [words for words, wrong in faults.items() if wrong]
    return Check("audit", not found, found[0] if found else "the report is of this run and model")


def attacks(evidence: Evidence) -> Check:
    """The attacks that a release requires must have run on this model."""
    if evidence.audit is None:
        words = "no audit of this run was found: make one with `medvae audit RUN -o REPORT`"
        return Check("attacks", False, words, overridable=True)
    ran = {str(f.get("name", "")).split(",")[0] for f in evidence.audit.findings}
    missing = [name for name in REQUIRED_ATTACKS if name not in ran]
    words = f"the audit ran no attack on {missing[0]}: audit the run again" if missing else "all required ones ran"
    return Check("attacks", not missing, words, overridable=True)


def decision(evidence: Evidence) -> Check:
    """Neither the public nor the internal audit may have decided against the release."""
    if evidence.audit is None:
        return Check("decision", True, "no audit, no decision")
    against = any("DO NOT" in d.upper().replace("_", " ") for d in evidence.audit.decisions)
    words = "the audit decided DO NOT RELEASE" if against else f"the audit decided {evidence.audit.decisions[0]}"
    return Check("decision", not against, words, overridable=True)


def canary(evidence: Evidence) -> Check:
    """Canaries planted in this training must not refute its claim; judged anew, from scores and opened coins."""
    document = evidence.canary
    coins, seen = (_recorded(evidence, kind) for kind in ("reserve", "commit"))
    if document is None:
        planted = coins is not None or planted_by(evidence.model.card.get("recipe"))
        words = "the run planted canaries and canary.json is missing" if planted else "this run planted no canaries"
        return Check("canaries", not planted, words)
    if document.get("receipt_digest") != evidence.receipt.digest:
        return Check("canaries", False, "canary.json is of another run")
    if document.get("weights_sha256") != evidence.model.card["weights_sha256"]:
        return Check("canaries", False, "canary.json is of another model, or older than it")
    if coins is None or (document.get("commitment") or {}).get("digest") != coins:
        return Check("canaries", False, "the coins of canary.json are not those recorded before the first step")
    if canaries.unjudged_digest(document) != seen:
        return Check("canaries", False, "canary.json was altered since the run ended")
    try:
        found = canaries.judge(document, evidence.mechanisms, evidence.privacy["delta"])
    except MedvaeError as error:
        return Check("canaries", False, str(error))
    failed = [a for a in found.answers if not a.ok]
    if failed:
        return Check("canaries", False, f"they refute the claim: {failed[0].name}: {failed[0].detail}")
    if found.verdict == "REFUTED":
        return Check("canaries", False, f"they refute the claim: {found.reasons[0]}", overridable=True)
    words = {"PASS": "nothing they show speaks against the claim"}.get(found.verdict, "too few to test the claim")
    return Check("canaries", True, f"{document.get('count')} planted: {words}")


def _both(audit: Audit) -> list[Mapping[str, Any]]:
    return [audit.public] if audit.internal is None else [audit.public, audit.internal]


def _claim(report: Mapping[str, Any]) -> Mapping[str, Any]:
    claim = report.get("claim")
    return claim if isinstance(claim, Mapping) else {}


def _differs(claim: Mapping[str, Any], evidence: Evidence) -> bool:
    """Whether a report's claim lacks a number of the run's, or has another."""
    missing = any(key not in claim for key in CLAIMED)
    return missing or any(
        claim[key] != evidence.privacy[key] for key in SAME if key in claim and key in evidence.privacy
    )


def planted_by(recipe: Mapping[str, Any] | None) -> bool:
    """Whether a recipe, as a model's card holds it, plants canaries."""
    return bool(((recipe or {}).get("canaries") or {}).get("enabled"))


def _recorded(evidence: Evidence, kind: str) -> str | None:
    """Return the digest of canaries that the ledger recorded at the start or the end of this run."""
    notes = [e.note for e in evidence.spending.entries if e.kind == kind and e.run_id == evidence.receipt.run_id]
    return marks(notes[0]).get(CANARIES) if notes else None


def _older(report: Mapping[str, Any], evidence: Evidence) -> bool:
    """Whether a report names a moment before the ledger's record of the run's end; whole seconds count as equal."""
    ended = [e.utc for e in evidence.spending.entries if e.kind == "commit" and e.run_id == evidence.receipt.run_id]
    try:
        made = datetime.fromisoformat(str(report.get("created")))
        return any(made < datetime.fromisoformat(utc).replace(microsecond=0) for utc in ended)
    except (ValueError, TypeError):  # no moment at all, or one without a zone
        return True
