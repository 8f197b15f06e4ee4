"""The audit of one run: material, parts, decision, and two reports kept apart by provenance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from medvae.audit.case import EFFORTS, Case, Figure, Part, plain
from medvae.audit.claim import claim_part, internal_decision, make_claim, public_decision, read_privacy
from medvae.audit.material import MAX_ELEMENTS, Scans, Store, load_scans, subset, synthetic_scans
from medvae.audit.untested import ALWAYS, untested
from medvae.config import AuditConfig, Recipe, build
from medvae.errors import RunError
from medvae.types import SHAREABLE, ImageSpace, ModelRelease, Progress, Provenance

SCHEMA = "medvae.audit/1"
SHADOWS = "shadows"


def audit(
    run: Path,
    out: Path,
    config: AuditConfig,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Audit a finished run and write OUT/internal/audit.json and OUT/public/audit.json; return the internal one.

    note: is told, before the attacks begin, what a tier without a bound in time will cost on this machine.

    The public report holds only what the claim says and what the released model alone shows; it does not depend on
    a single real scan, which tests/audit/test_audit_run.py checks byte by byte.

    Raises RunError where `run` is no finished run, its cohort is gone or was edited since training, or `out` is not
    empty.
    """
    from medvae.synth.staging import staged_folder
    from medvae.synth.store import read_release

    tell = progress or (lambda done, total: None)
    with staged_folder(out) as folder:
        privacy = read_privacy(run)
        release = read_release(run / "model")
        store = open_store(run, privacy, release.space)
        shadows = run / "private" / SHADOWS
        case = _material(release, store, make_claim(privacy, release.card), config, shadows, tell)
        if note is not None and case.effort.deep_minutes is None:
            from medvae.audit.forecast import forecast, in_words

            note(in_words(config.tier, forecast(case)))
        parts = _measure(case, tell)
        recipe = build(Recipe, **release.card["recipe"])
        internal, public = reports(case.claim, parts, config, untested(recipe))
        for name, report in (("internal", internal), ("public", public)):
            (folder / name).mkdir()
            text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
            (folder / name / "audit.json").write_text(text + "\n", encoding="utf-8")
    tell(STEPS, STEPS)
    return internal


STEPS = 100


def open_store(run: Path, privacy: Mapping[str, Any], space: ImageSpace) -> Store:
    """Open the cohort a run was trained on.

    Raises RunError where it cannot be found, is of another shape, or is not what the model was trained on.
    """
    from medvae.errors import CohortError
    from medvae.vault.store import open_cohort

    try:
        path = Path(json.loads((run / "private" / "run.json").read_text(encoding="utf-8"))["cohort"])
        store = cast(Store, open_cohort(path).reveal())
    except (OSError, ValueError, KeyError, TypeError, CohortError):
        raise RunError("the cohort of this run cannot be opened: audit on the machine where it was trained") from None
    if store.space != space:
        raise RunError("the cohort has another shape or other conditions than the model: audit the run that it trained")
    if store.fingerprint() != privacy["fingerprint"]:
        raise RunError("the cohort was edited since this run was trained on it: restore it, or train again")
    if len(store.patients("train")) != privacy["patients"]:
        raise RunError("privacy.json names another number of patients than the cohort has: it was altered, train again")
    return store


def _material(
    release: ModelRelease, store: Store, claim: Mapping[str, Any], config: AuditConfig, folder: Path, tell: Progress
) -> Case:
    effort = EFFORTS[config.tier]
    members, others = (
        load_scans(store, split, effort.pool, _rng(config, stream))
        for stream, split in ((11, "train"), (12, "holdout"))
    )
    train, holdout = (
        subset(scans, effort.patients, effort.scans, _rng(config, stream))
        for stream, scans in ((13, members), (14, others))
    )
    tell(3, STEPS)
    made = _synthetic(release, config, lambda done, total: tell(3 + 12 * done // total, STEPS))
    # Without a claim that holds, what the model makes is as private as the scans it saw.
    protected = claim["epsilon"] is not None and bool(claim["releasable"])
    origin: Provenance = "dp" if protected else "private"
    return Case(release, claim, config, train, holdout, made, origin, members, others, folder)


def _rng(config: AuditConfig, stream: int) -> Any:
    import numpy as np

    return np.random.default_rng([config.seed, stream])


def _synthetic(release: ModelRelease, config: AuditConfig, tell: Progress) -> Scans:
    """Make the cohort that is judged: conditions spread evenly, no real label histogram involved."""
    import math

    from medvae.synth.sample import generate, spread_conditions

    space = release.space
    count = min(config.synthetic, max(2, MAX_ELEMENTS // (space.channels * math.prod(space.spatial_shape))))
    rows = spread_conditions(space, count, config.seed)
    return synthetic_scans(generate(release, rows, config.seed, progress=tell))


def _measure(case: Case, tell: Progress) -> list[Part]:
    from medvae.audit.privacy import privacy_part
    from medvae.audit.quality import fidelity_part, utility_part

    stages: Sequence[tuple[Callable[[], Part], int]] = (
        (lambda: claim_part(case.claim), 16),
        (lambda: fidelity_part(case), 25),
        (lambda: utility_part(case), 40),
        (lambda: privacy_part(case, lambda done, total: tell(40 + 59 * done // total, STEPS)), 99),
    )
    parts = []
    for measure, done in stages:
        parts.append(measure())
        tell(done, STEPS)
    return parts


def reports(
    claim: Mapping[str, Any], parts: Sequence[Part], config: AuditConfig, not_tested: Sequence[str] = ALWAYS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the internal and the public report; the public one is built from shareable things alone."""
    from medvae.version import __version__

    findings = [f for part in parts for f in part.findings]
    figures: dict[str, Figure] = {k: v for part in parts for k, v in part.figures.items()}
    notes: dict[str, Any] = {k: v for part in parts for k, v in part.notes.items()}
    open_decision = public_decision(claim)
    head = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": {"name": "medvae-dp", "version": __version__},
        "tier": config.tier,
        "settings": config.model_dump(mode="json", exclude={"cluster"}),
        "claim": dict(claim),
        "not_tested": list(not_tested),
    }
    internal = head | {
        "audience": "internal",
        "findings": [plain(f.to_json()) for f in findings],
        "figures": {k: v.to_json() for k, v in figures.items()},
        "summary": [*_proof_in_words(claim), *_attack_in_words(notes)],
        "decision": internal_decision(open_decision, notes),
        "attacks": {"provenance": "private", **plain({k: v for part in parts for k, v in part.attacks.items()})},
    }
    public = head | {
        "audience": "public",
        "findings": [plain(f.to_json()) for f in findings if f.provenance in SHAREABLE],
        "figures": {k: v.to_json() for k, v in figures.items() if v.provenance in SHAREABLE},
        "summary": [
            *_proof_in_words(claim),
            "Attacks on real patients were run; their results describe patients and stay in the internal report.",
        ],
        "decision": open_decision,
    }
    return internal, public


def _proof_in_words(claim: Mapping[str, Any]) -> list[str]:
    words = [str(line) for line in claim.get("plain_words", [])]
    return [*words, "A passed audit is no proof; the proof is the mathematics, if built as described."]


def _attack_in_words(notes: Mapping[str, Any]) -> list[str]:
    state, area = str(notes["membership"]), notes.get("auc")
    if area is None:
        return [f"The membership attack gave no number: {notes.get('reason', state)}."]
    said = (
        f"The attack that was named beforehand tells a member from a non-member in {100 * area.value:.0f} % of pairs "
        f"({100 * area.low:.0f} to {100 * area.high:.0f} %; a coin: 50 %)."
    )
    return [said] if state == "measured" else [f"{said} But this result is {state}."]
