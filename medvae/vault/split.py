"""Patients as integers, their cap, and a split into train and holdout that no other patient influences."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from medvae.errors import CohortError
from medvae.vault.scan import Split
from medvae.vault.table import Row


def _digest(purpose: str, seed: int, patient: str) -> bytes:
    return hashlib.sha256(f"{purpose}:{seed}:{patient}".encode()).digest()


def split_of(patient: str, holdout: float, seed: int) -> Split:
    """Return where a patient belongs: a hash of the id alone, read as a uniform number, below `holdout` or not."""
    number = int.from_bytes(_digest("medvae-split", seed, patient)[:8], "big") / 2**64
    return "holdout" if number < holdout else "train"


def assign(rows: Sequence[Row], holdout: float, seed: int) -> dict[str, Split]:
    """Return the split of every patient; one that the source or its table fixes goes before the hash.

    Raises CohortError where scans of one patient are fixed to both sides.
    """
    fixed: dict[str, set[Split | None]] = defaultdict(set)
    for row in rows:
        fixed[row.patient].add(row.split)
    torn = sum(len(s) > 1 for s in fixed.values())
    if torn:
        raise CohortError(
            f"{torn} of {len(fixed)} patients are in both splits: keep all scans of a patient on one side"
        )
    sides: dict[str, Split] = {}
    for patient, given in fixed.items():
        (side,) = given
        sides[patient] = split_of(patient, holdout, seed) if side is None else side
    return sides


def number_patients(rows: Sequence[Row], seed: int) -> dict[str, int]:
    """Return an integer for every patient, in the order of a hash: names and their order leave no trace."""
    patients = sorted({r.patient for r in rows}, key=lambda p: (_digest("medvae-order", seed, p), p))
    return {p: i for i, p in enumerate(patients)}


def cap(rows: Sequence[Row], limit: int, seed: int) -> list[Row]:
    """Return at most `limit` rows a patient, in the given order; the draw depends on the patient and the seed alone."""
    places: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        places[row.patient].append(i)
    kept: set[int] = set()
    for patient, mine in places.items():
        if len(mine) > limit:
            seed_bytes = _digest("medvae-cap", seed, patient)
            rng = np.random.default_rng(int.from_bytes(seed_bytes[:8], "big"))
            mine = [mine[int(i)] for i in rng.permutation(len(mine))[:limit]]
        kept.update(mine)
    return [row for i, row in enumerate(rows) if i in kept]


def spelling(patients: Iterable[str]) -> list[str]:
    """Return a warning where ids differ from another one in case, leading zeros or separators alone.

    A separator between two digits tells ids apart: 1-23 is not 12-3.
    """
    ids = set(patients)
    bare = Counter(_bare(i) for i in ids)
    alike = sum(count for count in bare.values() if count > 1)
    if not alike:
        return []
    return [
        f"{alike} of {len(ids)} patient ids differ from another one only in case, separators or leading zeros: if "
        "these are one person, epsilon does not protect them as one; give a table with one id a person"
    ]


def _bare(patient: str) -> str:
    joined = re.sub(r"(?<!\d)[\s_.^-]+|[\s_.^-]+(?!\d)", "", patient.casefold())
    return re.sub(r"(?<!\d)0+(?=\d)", "", joined)
