"""Closest records, with one random scan a patient so that both real groups are of one size: for debugging only."""

from __future__ import annotations

import numpy as np

from medvae.audit import neighbours
from medvae.audit.case import Case, finding
from medvae.audit.embedding import embed
from medvae.audit.intervals import Estimate
from medvae.audit.risks import one_each
from medvae.types import Finding

DIAGNOSTIC = "debugging only, never evidence of privacy"


def diagnostics(case: Case) -> list[Finding]:
    """Return closest-record shares and distances; nothing where fewer than two patients are held out."""
    held_out = case.holdout.patients
    if len(held_out) < 2 or len(case.train.patients) < 2:
        return []
    count = min(len(held_out), len(case.train.patients))
    chosen = [np.sort(case.rng(9 + i).permutation(p)[:count]) for i, p in enumerate((case.train.patients, held_out))]
    one, two = one_each(case.train.of(chosen[0]), case.rng(5)), one_each(case.holdout.of(chosen[1]), case.rng(6))
    first, second = case.holdout.halves(case.rng(7))
    found = []
    for name, view in (("embedding", lambda s: embed(s.images)), ("pixels", neighbours.pixels)):
        made, train, held = view(case.made), view(one), view(two)
        share = neighbours.closer_to_training(made, train, held, case.config.confidence)
        near = float(np.median(neighbours.closest(made, train)))
        usual = float(np.median(neighbours.closest(view(first), view(second))))
        title = f"closest record is a training one, {name}"
        found.append(finding(title, "privacy", share, baseline=0.5, verdict=DIAGNOSTIC))
        title = f"median distance to closest training record, {name}"
        estimate = Estimate(near, float("nan"), float("nan"), len(made))
        found.append(finding(title, "privacy", estimate, baseline=usual, verdict=DIAGNOSTIC))
    return found
