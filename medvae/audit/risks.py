"""Copies and the three risks of the European guidance, measured on one audit's material."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.audit import copies, inference
from medvae.audit.case import Case
from medvae.audit.embedding import embed
from medvae.audit.inference import Risk
from medvae.audit.intervals import Estimate
from medvae.audit.material import Scans
from medvae.audit.membership import MIN_PATIENTS
from medvae.audit.synthetic_only import projection
from medvae.types import FloatArray

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

TABLE_FEATURES = 4
PLANTED = 200
COMPARED = 4000
FOUND = 0.99


@dataclass(frozen=True)
class Copies:
    """Share of synthetic scans flagged, of scans of chance flagged (falsely), of planted copies found.

    false_flags: on scans that had no part in setting the limit; None where they are too few, `chance` of them.
    twins: scans of chance that are in the training data voxel by voxel, and so say nothing of chance.
    """

    threshold: float
    share: Estimate
    false_flags: Estimate | None
    planted_found: Estimate
    chance: int
    twins: int

    @property
    def copied(self) -> bool:
        """Whether more is flagged than chance explains."""
        return self.share.low > copies.FALSE_FLAGS

    @property
    def verdict(self) -> str:
        """What the shares say together."""
        if self.planted_found.value < FOUND:
            return f"INCONCLUSIVE: only {self.planted_found.value:.0%} of planted copies were found"
        if self.copied:
            return "copies of training scans: more synthetic scans are flagged than chance explains"
        return "no more flagged than by chance, and planted copies are found"

    @property
    def words(self) -> str:
        """What a reader must know of false flags, or why there is no number."""
        if self.false_flags is None:
            needs, half = copies.NEEDED, self.chance // 2
            return f"not measurable: needs {needs} scans that had no part in setting the limit, there are {half}"
        twins = f"; {self.twins} scans that the training data hold twice were set aside" if self.twins else ""
        return f"scans that no model made and that had no part in setting the limit{twins}"

    def to_json(self) -> dict[str, Any]:
        """Return the form in audit.json."""
        return {
            "threshold": self.threshold,
            "flagged": round(self.share.value * self.share.n),
            "n": self.share.n,
            "share": self.share._asdict(),
            "false_flags": None if self.false_flags is None else self.false_flags._asdict(),
            "false_flags_words": self.words,
            "planted_found": self.planted_found._asdict(),
            "verdict": self.verdict,
        }


def find_copies(case: Case) -> Copies | None:
    """Look for training scans among the synthetic ones; None where too few held-out patients say what chance is."""
    if len(case.others.patients) < MIN_PATIENTS or len(case.made) < 1:
        return None
    rng = case.rng(21)
    train, held = (scans.take(np.sort(rng.permutation(len(scans))[:COMPARED])) for scans in (case.members, case.others))
    return search_copies(case.made.images, train, held, case.config.confidence, case.config.seed)


def search_copies(made: FloatArray, train: Scans, held: Scans, confidence: float, seed: int) -> Copies:
    """Look for scans of `train` among synthetic images (N, *spatial); `held`: scans of people the model never saw.

    Chance is what held-out scans, and training scans against all other patients', come to. A random half of it sets
    the limit; the other half says how often a scan is flagged falsely.
    """
    planted = copies.planted(train.images, PLANTED, seed)
    queries = np.concatenate([made, held.images, train.images, planted])
    nobody = [np.full(len(q), -1) for q in (made, held.images, planted)]
    own = np.concatenate([nobody[0], nobody[1], train.patient, nobody[2]])
    ends = np.cumsum([len(made), len(held), len(train)])
    found, place = copies.nearest(queries, train.images, own, train.patient)
    ours, outside, within, known = np.split(found, ends)
    chance = np.concatenate([outside, within])
    single, setting = chance > copies.IDENTICAL, _halves(len(held), place[ends[1] : ends[2]], seed)
    if single.sum() < MIN_PATIENTS:  # a cohort of twins: no limit can then find a planted copy, and the verdict says so
        single[:] = True
    enough = min((single & setting).sum(), (single & ~setting).sum()) >= copies.NEEDED
    limit = copies.threshold(chance[single & setting] if enough else chance[single])
    return Copies(
        limit,
        copies.share_below(ours, limit, confidence),
        copies.share_below(chance[single & ~setting], limit, confidence) if enough else None,
        copies.share_below(known, limit, confidence),
        int(single.sum()),
        int((~single).sum()),
    )


def _halves(held: int, nearest: Ints, seed: int) -> Bools:
    """Return a random half (held + N,); two training scans that are each other's nearest fall on the same side."""
    own = np.arange(len(nearest))
    pair = np.where(nearest[nearest] == own, np.minimum(own, nearest), own)
    rng = np.random.default_rng([seed, 47])
    return np.concatenate([rng.random(held) < 0.5, (rng.random(len(nearest)) < 0.5)[pair]])


def inference_risks(case: Case) -> list[Risk]:
    """Return singling out, linkability, and the inference of every condition and image quantity.

    Their intervals hold together at the confidence asked for (Bonferroni): with many tests, one would else find
    somebody exposed in one audit of five.
    """
    rng = case.rng(22)
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
    confidence = 1 - (1 - case.config.confidence) / (2 + len(secrets))
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
