"""RUN/privacy.json: the claim of a finished run, with all that it must never be stated without."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from medvae.crosscheck import prv_epsilon
from medvae.dp.ledger import Receipt
from medvae.dp.noise import FLOATING_POINT
from medvae.dp.tradeoff import plain_words
from medvae.train.randomness import Randomness
from medvae.types import ImageSpace, PrivacyPlan
from medvae.version import __version__

SCHEMA = "medvae.privacy/1"
SAMPLER = "Poisson sampling of patients: each is drawn independently with probability sample_rate at every step"
LIBRARIES = ("torch", "opacus", "dp-accounting", "monai", "numpy", "cryptography", "safetensors")


def privacy_claim(
    plan: PrivacyPlan,
    space: ImageSpace,
    randomness: Randomness,
    receipt: Receipt,
    fingerprint: str,
    warnings: Sequence[str],
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of privacy.json.

    fingerprint: keyed, of the cohort. asked: the goal of the settings, as `Goal.to_json` gives it. epsilon is None
    where no noise was added. `releasable` is True only where `reasons`, why it is not, is empty.
    """
    reasons = not_releasable(plan, randomness)
    epsilon = plan.epsilon if plan.private else None
    cross = prv_epsilon(plan.mechanisms, plan.delta) if plan.private else None
    return {
        "schema": SCHEMA,
        "epsilon": epsilon,
        "delta": plan.delta,
        "unit": plan.unit,
        "neighboring": plan.neighboring,
        "accountant": plan.accountant,
        "asked": dict(asked),
        "sample_rate": plan.sample_rate,
        "noise_multiplier": plan.noise_multiplier,
        "max_grad_norm": plan.max_grad_norm,
        "steps": plan.steps,
        "mechanisms": [m.to_json() for m in plan.mechanisms],
        "sampler": SAMPLER,
        "noise_source": randomness.name,
        "floating_point": f"{FLOATING_POINT}; added in float64 to float32 sums, then rounded to float32",
        "releasable": not reasons,
        "reasons": reasons,
        "patients": plan.patients,
        "patients_public": True,
        "declared_public": declared_public(space),
        "receipt": receipt.to_json(),
        "crosscheck": {"accountant": "prv", "epsilon": cross},
        "fingerprint": fingerprint,
        "plain_words": plain_words(plan.epsilon, plan.delta, plan.mechanisms),
        "warnings": list(warnings),
        "versions": versions(),
    }


def not_releasable(plan: PrivacyPlan, randomness: Randomness) -> list[str]:
    """Return why a run may never be released; empty where nothing speaks against it."""
    reasons = []
    if not math.isfinite(plan.epsilon):
        reasons.append("no noise was added: train with a finite --dp-epsilon")
    if not randomness.releasable:
        reasons.append(f"the noise came from a source that can be repeated ({randomness.name}), for tests only")
    return reasons


def declared_public(space: ImageSpace) -> list[str]:
    """Return what the run took for public knowledge, so that it cost no budget."""
    facts = [
        "the number of training patients",
        "the shape, spacing and modality of the images",
        "the rule of intensity: constants, or each scan's own percentiles",
    ]
    for condition in space.conditions:
        what = "class names" if condition.kind == "class" else "range"
        facts.append(f"the {what} of condition {condition.name!r}")
    return [*facts, "the labels of the masks"] if space.mask_labels else facts


def public_cohort(claim: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a claim says of a public cohort that helped: who it is, and that it is not protected.

    facts: fingerprint, scans and patients of that cohort; no name.
    """
    words = (
        f"a second cohort of {facts['scans']} scans of {facts['patients']} patients (fingerprint "
        f"{facts['fingerprint'][:16]}), declared public by the data holder, on which the network was pretrained: this "
        "claim does not protect it at all"
    )
    return {"public_cohort": dict(facts), "declared_public": [*claim["declared_public"], words]}


def versions() -> dict[str, str]:
    """Return the versions of what trained the model."""
    found = {name: metadata.version(name) for name in LIBRARIES}
    return {"medvae": __version__, "python": platform.python_version(), **found}
