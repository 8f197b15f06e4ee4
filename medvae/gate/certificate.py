"""The certificate: the whole privacy claim of a release, as privacy.json and the ledger prove it, and no more."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from medvae.dp import tradeoff
from medvae.dp.noise import FLOATING_POINT
from medvae.gate.evidence import Evidence
from medvae.gate.outcome import Check
from medvae.schemas import version

TOOL = {"name": "medvae-dp", "version": metadata.version("medvae-dp")}
# False-positive rates at which the trade-off curve is written down; a reader may recompute any other.
FPR = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHORT = ("epsilon", "delta", "unit", "neighboring", "accountant")

UNIT_WORDS = (
    "One unit is one patient with all their scans, as grouped by the identifiers given at ingest: "
    "one person under two identifiers would be two units."
)
SAMPLER_WORDS = (
    "Poisson sampling of patients: at every step each patient is drawn independently with probability sample_rate, "
    "from the same keystream as the noise; an empty draw is a step too."
)
PATIENTS_WORDS = "The number of patients is treated as public: delta and the sample rate are set from it."
FLOAT_WORDS = (
    f"The noise is {FLOATING_POINT}, added in float64 before sums are rounded to float32. The proof is for real "
    "numbers: attacks on floating-point rounding are made harder by this and are not excluded by the proof."
)
CUMULATIVE_WORDS = (
    "All charged runs in this cohort's ledger together, failed ones included. The same scans ingested a second time "
    "are another cohort with a ledger of its own, and are not counted here."
)
LIMITS = (
    "The numbers bound what anyone can learn about one patient from this release and all other charged runs on the "
    "cohort; they say nothing about what the scans tell of patients in general.",
    "A passed check or audit is no proof: the proof is the mathematics, if the software was built as described.",
    "Related patients, or one person under two identifiers, are protected less than one unit is.",
    "This certificate is evidence for a decision on release, and no legal determination.",
)


def short_claim(privacy: Mapping[str, Any]) -> dict[str, Any]:
    """Return epsilon with all that it must never be said without."""
    return {key: privacy[key] for key in SHORT}


def predicate(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the signature says beside the digests: the claim in short, and how many images it covers."""
    claim, made = certificate["claim"], certificate["release"]
    return {**short_claim(claim), "receipt": claim["receipt"], "count": made["count"], "formats": made["formats"]}


def claim_words(claim: Mapping[str, Any]) -> str:
    """Say epsilon as it must always be said: with delta, unit, neighbouring relation and accountant."""
    return (
        f"epsilon {claim['epsilon']:.4g} (delta {claim['delta']:.3g}, unit {claim['unit']}, "
        f"{claim['neighboring']} neighbours, {str(claim['accountant']).upper()} accountant)"
    )


def build(
    evidence: Evidence,
    checks: Sequence[Check],
    *,
    title: str,
    count: int,
    formats: Sequence[str],
    conditions: str,
    signer: Mapping[str, str],
    override: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return certificate.json: the claim of the run, the cohort's spending, what the gate checked, who signed.

    conditions: where the conditions came from, in words; override: of `outcome.overridden`. Every value is taken by
    name from what is public; the run's free text does not pass.
    """
    privacy, spending, audit = evidence.privacy, evidence.spending, evidence.audit
    return {
        "schema": version("certificate"),
        "title": title,
        "created": datetime.now(UTC).date().isoformat(),
        "tool": TOOL,
        "claim": _claim(evidence),
        "cumulative": {
            "epsilon": spending.epsilon,
            **{key: privacy[key] for key in SHORT if key != "epsilon"},
            "runs": spending.runs,
            "budget": None if spending.budget is None else dataclasses.asdict(spending.budget),
            "words": CUMULATIVE_WORDS,
        },
        "plain_words": tradeoff.plain_words(privacy["epsilon"], privacy["delta"], evidence.mechanisms),
        "limits": list(LIMITS),
        "checks": [check.to_json() for check in checks],
        "override": None if override is None else dict(override),
        "release": {"count": count, "formats": list(formats), "conditions": conditions},
        "audit": None if audit is None else {"decision": audit.decisions[0], "folder": "audit"},
        "software": software(privacy),
        "signer": dict(signer),
    }


def _claim(evidence: Evidence) -> dict[str, Any]:
    privacy, mechanisms = evidence.privacy, evidence.mechanisms
    keys = ("sample_rate", "noise_multiplier", "max_grad_norm", "steps", "patients", "noise_source", "fingerprint")
    masks = ["synthetic masks"] if evidence.space.mask_labels else []
    return {
        **short_claim(privacy),
        **{key: privacy[key] for key in keys},
        "mu": tradeoff.gdp_mu(mechanisms),
        "advantage": tradeoff.advantage(mechanisms),
        "trade_off": {"fpr": list(FPR), "tpr_at_most": tradeoff.tpr_bound(mechanisms, FPR).tolist()},
        "mechanisms": [m.to_json() for m in mechanisms],
        "charged": [m.name for m in mechanisms],
        "crosscheck": {key: privacy["crosscheck"][key] for key in ("accountant", "epsilon")},
        "receipt": evidence.receipt.to_json(),
        "weights_sha256": evidence.model.card["weights_sha256"],
        "unit_words": UNIT_WORDS,
        "sampler": SAMPLER_WORDS,
        "patients_words": PATIENTS_WORDS,
        "floating_point": FLOAT_WORDS,
        "declared_public": list(privacy["declared_public"]),
        **({"public_cohort": dict(privacy["public_cohort"])} if "public_cohort" in privacy else {}),
        "released": ["synthetic images", *masks, "the conditions asked for", "this claim"],
    }


def software(privacy: Mapping[str, Any]) -> dict[str, Any]:
    """Return what made the run and the release: versions, a digest of the code and of the pinned versions."""
    package = Path(__file__).parents[1]
    return {
        "code_sha256": _code_digest(package),
        "lock_sha256": _lock_digest(package.parent),
        "trained_with": {str(k): str(v) for k, v in privacy["versions"].items()},
        "released_with": {"python": platform.python_version()} | _versions(),
    }


def _versions() -> dict[str, str]:
    names = ("numpy", "torch", "monai", "opacus", "dp-accounting", "cryptography", "pydicom", "highdicom", "nibabel")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _code_digest(package: Path) -> str:
    """Return a digest of the package's source as it ran: names and bytes of all modules, in order."""
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(path.relative_to(package).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _lock_digest(root: Path) -> str:
    lock = root / "constraints.txt"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "unknown"
