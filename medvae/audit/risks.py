"""Copies and the three risks of the European guidance, measured on one audit's material."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from medvae.audit import copies, inference
from medvae.audit.case import Case
from medvae.audit.embedding import embed
from medvae.audit.inference import Risk
from medvae.audit.intervals import Estimate
from medvae.audit.material import Scans
from medvae.audit.membership import MIN_PATIENTS
from medvae.audit.synthetic_only import projection

TABLE_FEATURES = 4
PLANTED = 200
COMPARED = 4000
FOUND = 0.99


@dataclass(frozen=True)
class Copies:
    """Share of synthetic scans flagged, of held-out scans flagged (falsely), of planted copies found."""

    threshold: float
    share: Estimate
    false_flags: Estimate
    planted_found: Estimate

    @property
    def verdict(self) -> str:
        """What the three shares say together."""
        if self.planted_found.value < FOUND:
            return f"INCONCLUSIVE: only {self.planted_found.value:.0%} of planted copies were found"
        if self.share.low > copies.FALSE_FLAGS:
            return "copies of training scans: more synthetic scans are flagged than chance explains"
        return "no more flagged than by chance, and planted copies are found"

    def to_json(self) -> dict[str, Any]:
        """Return the form in audit.json."""
        return {
            "threshold": self.threshold,
            "flagged": round(self.share.value * self.share.n),
            "n": self.share.n,
            "share": self.share._asdict(),
            "false_flags": self.false_flags._asdict(),
            "planted_found": self.planted_found._asdict(),
            "verdict": self.verdict,
        }


def find_copies(case: Case) -> Copies | None:
    """Look for training scans among the synthetic ones; None where too few held-out patients say what chance is."""
    if len(case.others.patients) < MIN_PATIENTS or len(case.made) < 1:
        return None
    confidence, rng = case.config.confidence, case.rng(21)
    train = case.members.images[np.sort(rng.permutation(len(case.members))[:COMPARED])]
    held = case.others.images[np.sort(rng.permutation(len(case.others))[:COMPARED])]
    average = case.made.images.mean(0)
    planted = copies.planted(train, PLANTED, case.config.seed)
    queries = np.concatenate([case.made.images, held, planted])
    match = copies.best_match(queries, train, average)
    made, chance, known = np.split(match, [len(case.made), len(case.made) + len(held)])
    limit = copies.threshold(chance)
    return Copies(limit, *(copies.share_above(m, limit, confidence) for m in (made, chance, known)))


def inference_risks(case: Case) -> list[Risk]:
    """Return singling out, linkability, and the inference of every condition and image quantity."""
    rng, confidence = case.rng(22), case.config.confidence
    size = min(len(case.members.patients), len(case.others.patients))
    if size < MIN_PATIENTS or len(case.made) < MIN_PATIENTS:
        return []
    groups = [one_each(_some(side, size, rng), rng) for side in (case.members, case.others)]
    made = embed(case.made.images)
    view = projection(made)
    features = [view(f) for f in (made, *(embed(g.images) for g in groups))]
    tables = [
        inference.table(scans, f[:, :TABLE_FEATURES]) for scans, f in zip((case.made, *groups), features, strict=True)
    ]
    secrets = [i for i, name in enumerate(tables[0].names) if not name.startswith("feature ")]
    return [
        inference.single_out(*_three(tables), case.effort.guesses, confidence, case.config.seed),
        inference.link(*_three(features), confidence),
        *(inference.infer(i, *_three(tables), confidence) for i in secrets),
    ]


def _three(items: list[Any]) -> tuple[Any, Any, Any]:
    return items[0], items[1], items[2]


def one_each(scans: Scans, rng: np.random.Generator) -> Scans:
    """Return one random scan of each patient."""
    return scans.take(np.asarray([rng.choice(np.flatnonzero(scans.patient == p)) for p in scans.patients]))


def _some(scans: Scans, patients: int, rng: np.random.Generator) -> Scans:
    return scans.of(np.sort(rng.permutation(scans.patients)[:patients]))


def risk_json(risk: Risk) -> Mapping[str, Any]:
    """Return the form in audit.json."""
    rates = {key: getattr(risk, key)._asdict() for key in ("risk", "attack", "control", "baseline")}
    return {"name": risk.name, "kind": risk.kind, **rates, "verdict": risk.verdict}
