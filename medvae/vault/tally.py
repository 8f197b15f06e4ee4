"""What is counted while the scans go by, one at a time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medvae.errors import CohortError
from medvae.types import FloatArray
from medvae.vault.scan import Skipped

MAX_MASK_LABELS = 8
Identical = Literal["note", "merge", "refuse"]


def fingerprint(stored: npt.NDArray[Any], raw: FloatArray) -> str:
    """Return a hash of an image as it is stored and of its raw shape, sum and ends; compared and never published.

    Hashing all raw voxels would take longer than to decode them. Two scans that agree in all of this are one and the
    same to whatever is trained on them.
    """
    about = (raw.shape, float(raw.sum(dtype=np.float64)), float(raw.min()), float(raw.max()))
    mac = hashlib.blake2b(repr(about).encode(), digest_size=16)
    mac.update(np.ascontiguousarray(stored).data)
    return mac.hexdigest()


@dataclass(repr=False)
class Tally:
    """Counts of skipped scans, images that several patients share, and holders of mask labels.

    identical: what an image means that occurs under two patients, alike in every stored voxel and in its raw shape,
    sum and ends. copies: whether an image that one patient has twice is dropped.
    """

    skipped: Skipped
    identical: Identical = "note"
    copies: bool = False
    seen: dict[bytes, int] = field(default_factory=dict)
    shared: int = 0
    same: dict[int, int] = field(default_factory=dict)
    label_holders: dict[int, set[int]] = field(default_factory=dict)

    def take(self, digest: str, labels: list[int], patient: int, files: tuple[str, ...]) -> bool:
        """Look at one scan of a patient, by number; return whether it is kept."""
        key = bytes.fromhex(digest)
        owner = self.seen.get(key)
        self.seen.setdefault(key, patient)
        if owner is not None and self.person(owner) != self.person(patient):
            self.shared += 1
            if self.identical == "merge":
                low, high = sorted((self.person(owner), self.person(patient)))
                self.same[high] = low
                self.skipped.leave("same pixels as a scan of another patient", *files)
                return False
        elif owner is not None and self.copies:
            self.skipped.leave("same pixels as another file", *files)
            return False
        for label in labels:
            self.label_holders.setdefault(label, set()).add(patient)
        return True

    def person(self, patient: int) -> int:
        """Return the number that stands for all patients that turned out to be this one."""
        while patient in self.same:
            patient = self.same[patient]
        return patient

    def people(self) -> dict[int, int]:
        """Return the patients that are another's, and whose."""
        return {p: self.person(p) for p in self.same}

    def check_shared(self) -> None:
        """Raise CohortError where patients share images and the config refuses that."""
        if self.shared and self.identical == "refuse":
            raise CohortError(
                f"{self.shared} images are identical, as stored, to an image of another patient: give one person "
                "one id, or choose --identical merge"
            )

    def mask_labels(self) -> tuple[int, ...]:
        """Return the sorted labels. Raises CohortError for too many, or one that a single patient holds."""
        if len(self.label_holders) > MAX_MASK_LABELS:
            raise CohortError(
                f"the masks hold {len(self.label_holders)} labels, more than {MAX_MASK_LABELS}: merge labels"
            )
        alone = sum(len({self.person(p) for p in h}) == 1 for h in self.label_holders.values())
        if alone:
            raise CohortError(
                f"{alone} of {len(self.label_holders)} mask labels are held by one patient only, which would single "
                "the patient out: merge labels"
            )
        return tuple(sorted(self.label_holders))

    def notes(self) -> list[str]:
        """Return warnings about what went by."""
        if not self.shared:
            return []
        if self.identical == "merge":
            return [f"{len(self.same)} patient ids share an image with another and count as the same patient"]
        return [
            f"{self.shared} images are identical, as stored, to an image of another patient: if these are one "
            "person, epsilon does not protect them as one; check the patient ids, or choose --identical merge"
        ]

    def reasons(self) -> list[dict[str, Any]]:
        """Return the skipped by reason, most frequent first."""
        ranked = sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))
        return [{"reason": reason, "count": count} for reason, count in ranked if count]
