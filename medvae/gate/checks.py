"""What the gate looks at before it opens: each check is a pure function that says what it saw.

No check reads a scan or a private statistic: the run's public claim, its model card, and the ledger are enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medvae.config import Recipe, build
from medvae.crosscheck import SMALLEST_ERROR, agree
from medvae.dp import tradeoff
from medvae.dp.accounting import canonical
from medvae.dp.delta import check_delta
from medvae.dp.marks import NOISE, PATIENTS, WEIGHTS, marks
from medvae.errors import ConfigError
from medvae.gate import findings
from medvae.gate.evidence import Evidence
from medvae.gate.outcome import OVERRIDE, pass_all
from medvae.gate.outcome import Check as Check
from medvae.schemas import problem
from medvae.types import Mechanism

EPSILON_TOLERANCE = 1e-6  # relative: rounding, and no more
BOUND_TOLERANCE = 1e-4  # another version of the accountant may place its grid otherwise
AGREEMENT = 0.01  # relative: how far two accountants may lie apart


def check_claim(privacy: Mapping[str, Any]) -> list[Check]:
    """Check privacy.json alone, before anything else of the run is opened; raises NotReleasable at the first breach."""
    return pass_all(privacy, (_schema, _releasable, _noise, _unit))


def check_run(evidence: Evidence, override: str | None = None, remedy: str = OVERRIDE) -> list[Check]:
    """Check model, accounting, receipt, budget, canaries and audit; raises NotReleasable at the first breach.

    override: the recorded reason for letting pass what is a judgement (`gate.findings`) and never a fact; remedy: the
    way on that a refused judgement names.
    """
    facts = (_delta, _headline, _accountants, _receipt, _budget, _weights)
    audits = (findings.report, findings.canary, findings.attacks, findings.decision)
    return pass_all(evidence, [*facts, *audits], override, remedy)


def recompute(mechanisms: Sequence[Mechanism], claim: Mapping[str, Any]) -> Check:
    """Recompute epsilon by PLD, which must not exceed the claim, and by PRV, which must agree with PLD to 1 %.

    The figure that the claim gives for PRV must be PRV's.
    """
    epsilon, delta, stated = claim["epsilon"], claim["delta"], claim["crosscheck"]["epsilon"]
    pld, prv, agreed = agree(mechanisms, delta, AGREEMENT)
    if stated is None or not math.isclose(stated, prv, rel_tol=AGREEMENT, abs_tol=2 * SMALLEST_ERROR):
        return Check("epsilon", False, f"the claim says that PRV gave {stated}, and PRV gives {prv:.6g}")
    detail = f"claimed {epsilon:.6g}, PLD {pld:.6g}, PRV {prv:.6g}, at delta {delta:.3g}"
    return Check("epsilon", agreed and pld <= epsilon * (1 + EPSILON_TOLERANCE), detail)


def headline(claim: Mapping[str, Any], mechanisms: Sequence[Mechanism]) -> Check:
    """Check that steps, sample rate and noise multiplier on top of a claim are those of a charged mechanism.

    Or those of the one Gaussian that all unsampled ones compose to, where that is the claim.
    """
    stated = (claim["noise_multiplier"], claim["sample_rate"], claim["steps"])
    found = [(m.noise_multiplier, m.sample_rate, m.count) for m in mechanisms] + list(canonical(mechanisms))
    words = f"{stated[2]} steps at sample rate {stated[1]:.4g} with noise multiplier {stated[0]:.4g}"
    return Check("headline", stated in found, words)


def bounds(claim: Mapping[str, Any], mechanisms: Sequence[Mechanism]) -> Check:
    """Recompute what the claim says of any attack: the curve, the advantage and mu may not be stated too small."""
    curve = claim["trade_off"]
    pairs = [
        (claim["mu"], tradeoff.gdp_mu(mechanisms)),
        (claim["advantage"], tradeoff.advantage(mechanisms)),
        *zip(curve["tpr_at_most"], tradeoff.tpr_bound(mechanisms, curve["fpr"]).tolist(), strict=True),
    ]
    ok = all(found <= stated + BOUND_TOLERANCE * max(1.0, stated) for stated, found in pairs)
    return Check("bounds", ok, f"advantage at most {pairs[1][1]:.4g}, and the curve at {len(curve['fpr'])} rates")


def delta_rule(delta: float, patients: int) -> Check:
    """Check that delta is below 1/patients."""
    try:
        warnings = check_delta(delta, patients)
    except ConfigError as error:
        return Check("delta", False, str(error))
    return Check("delta", True, warnings[0] if warnings else f"{delta:.3g}, far below 1/patients ({1 / patients:.3g})")


def _schema(privacy: Mapping[str, Any]) -> Check:
    found = problem("privacy", privacy)
    return Check("privacy.json", found is None, found or "keeps to its schema")


def _releasable(privacy: Mapping[str, Any]) -> Check:
    reasons = "; ".join(str(r) for r in privacy["reasons"]) or "the run is marked as not releasable"
    if not privacy["releasable"]:
        return Check("releasable", False, reasons)
    return Check("releasable", privacy["epsilon"] is not None, "a finite epsilon, and no mark against release")


def _noise(privacy: Mapping[str, Any]) -> Check:
    source = str(privacy["noise_source"])
    return Check("noise source", source.startswith("os_entropy"), f"noise and sampling come from {source}")


def _unit(privacy: Mapping[str, Any]) -> Check:
    unit, neighboring = privacy["unit"], privacy["neighboring"]
    ok = (unit, neighboring) == ("patient", "add-remove")
    return Check("unit", ok, f"unit {unit}, {neighboring} neighbours")


def _delta(evidence: Evidence) -> Check:
    return delta_rule(evidence.privacy["delta"], evidence.privacy["patients"])


def _accountants(evidence: Evidence) -> Check:
    return recompute(evidence.mechanisms, evidence.privacy)


def _headline(evidence: Evidence) -> Check:
    return headline(evidence.privacy, evidence.mechanisms)


def _receipt(evidence: Evidence) -> Check:
    """Find the run in the ledger: same digest, mechanisms and delta, and ended with these very weights."""
    receipt, entries = evidence.receipt, evidence.spending.entries
    rows = {e.kind: e for e in entries if e.run_id == receipt.run_id}
    reserved, ended = rows.get("reserve"), rows.get("commit")
    weights = evidence.model.card["weights_sha256"]
    noted = marks(reserved.note) if reserved is not None else {}
    faults = {
        "the ledger holds no run of this receipt": reserved is None or reserved.receipt != receipt,
        "the ledger charged other mechanisms": reserved is not None and reserved.mechanisms != evidence.mechanisms,
        "the ledger charged at another delta": reserved is not None and reserved.delta != evidence.privacy["delta"],
        "the ledger noted another noise source": noted.get(NOISE) != evidence.privacy["noise_source"],
        "the ledger noted another number of patients": noted.get(PATIENTS) != str(evidence.privacy["patients"]),
        "the ledger does not say that the run ended": ended is None,
        "the run ended with other weights than these": ended is not None and marks(ended.note).get(WEIGHTS) != weights,
    }
    found = [words for words, wrong in faults.items() if wrong]
    return Check(
        "receipt", not found, found[0] if found else f"row {receipt.sequence} of the ledger, charged and ended"
    )


def _budget(evidence: Evidence) -> Check:
    spending = evidence.spending
    if spending.budget is None:
        return Check("budget", True, "no budget is set for this cohort")
    limit = spending.budget.epsilon
    ok = spending.against_budget <= limit * (1 + EPSILON_TOLERANCE)
    return Check("budget", ok, f"{spending.against_budget:.6g} of {limit:g} spent at delta {spending.budget.delta:.3g}")


def _weights(evidence: Evidence) -> Check:
    """Hold the card against its types; the digest of the weights was compared when the model was read."""
    try:
        build(Recipe, **evidence.model.card["recipe"])
    except (ConfigError, KeyError, TypeError):
        return Check("model", False, "model.json holds no recipe of this version")
    if not all(np.isfinite(w).all() for w in evidence.model.weights.values()):
        return Check("model", False, "some weights are not finite numbers: the training diverged")
    return Check("model", True, f"weights of SHA-256 {evidence.model.card['weights_sha256']}")
