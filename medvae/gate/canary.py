"""The canary audit behind the gate: what a release says of it, and a third party's check of that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medvae.dp.canaries import Judgement, judge, unjudged
from medvae.errors import MedvaeError, NotReleasable
from medvae.gate.evidence import read_canary
from medvae.gate.outcome import Check
from medvae.schemas import problem
from medvae.types import Mechanism

FILE = "privacy/canary.json"
RESULT_TOLERANCE = 2e-3  # another version of the accountant may place its grid otherwise


def published(run: Path, mechanisms: Sequence[Mechanism], delta: float) -> dict[str, Any] | None:
    """Return canary.json as a release holds it: the opened part of the run's, and all else judged anew.

    None where the run has none. Raises NotReleasable where it breaks its schema, so that no other word of the run
    passes with it.
    """
    document = read_canary(run)
    if document is None:
        return None
    found = problem("canary", document)
    if found is not None:
        raise NotReleasable(f"canary.json is not as it should be: {found}")
    try:
        return {**unjudged(document), **judge(document, mechanisms, delta).to_json()}
    except MedvaeError as error:
        raise NotReleasable(str(error)) from None


def canary_check(
    document: Mapping[str, Any], claim: Mapping[str, Any], mechanisms: Sequence[Mechanism], *, overridden: bool = False
) -> Check:
    """Judge the published scores and opened coins against a certificate's claim, and what was said of them.

    overridden: the certificate says that an accusation by scores was let pass; nothing else may be.
    """
    found = problem("canary", document)
    if found is not None:
        return Check("canaries", False, f"canary.json: {found}")
    bound = (document["receipt_digest"], document["weights_sha256"], document["delta"])
    if bound != (claim["receipt"]["digest"], claim["weights_sha256"], claim["delta"]):
        return Check("canaries", False, "canary.json is of another run, model or delta than the certificate")
    try:
        judgement = judge(document, mechanisms, claim["delta"])
    except MedvaeError as error:
        return Check("canaries", False, str(error))
    accused_only = bool(judgement.results) and all(answer.ok for answer in judgement.answers)
    if judgement.verdict == "REFUTED" and not (overridden and accused_only):
        return Check("canaries", False, f"the claim is refuted: {judgement.reasons[0]}")
    if not _as_stated(document, judgement):
        return Check("canaries", False, "what canary.json says of its scores is not what they give")
    return Check("canaries", True, _detail(document, judgement))


def _detail(document: Mapping[str, Any], judgement: Judgement) -> str:
    if judgement.verdict != "PASS":
        return ("let pass by the data holder: " if judgement.verdict == "REFUTED" else "") + judgement.reasons[0]
    whole = judgement.results[-1]
    return (
        f"{document['count']} made-up patients, coins as committed, do not refute the claim; from this one run epsilon "
        f"is at least {whole['fdp_epsilon']:.2f} by guesses and {whole['rates_epsilon']:.2f} by error rates"
    )


def _as_stated(document: Mapping[str, Any], judgement: Judgement) -> bool:
    stated, found = document["results"], judgement.results
    return (
        document["verdict"] == judgement.verdict
        and len(stated) == len(found)
        and all(s.keys() == f.keys() for s, f in zip(stated, found, strict=True))
        and all(_same(s[k], f[k]) for s, f in zip(stated, found, strict=True) for k in f if k != "rows")
    )


def _same(stated: Any, found: Any) -> bool:
    if isinstance(found, float) and isinstance(stated, int | float):
        return math.isclose(stated, found, rel_tol=RESULT_TOLERANCE, abs_tol=RESULT_TOLERANCE)
    return bool(stated == found)
