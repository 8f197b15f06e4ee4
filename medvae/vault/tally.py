"""What is counted while the scans go by, one at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from medvae.errors import CohortError
from medvae.vault.scan import Volume

MAX_MASK_LABELS = 8


@dataclass(repr=False)
class Tally:
    """Counts of skipped scans, images that several patients share, and holders of mask labels."""

    skipped: Counter[str]
    seen: dict[bytes, str] = field(default_factory=dict)
    shared: int = 0
    label_holders: dict[int, set[str]] = field(default_factory=dict)

    def look(self, volume: Volume, labels: frozenset[int], patient: str) -> None:
        """Notice images that occur, voxel by voxel, under more than one patient, and who holds which mask label."""
        digest = hashlib.sha256(str(volume.array.shape).encode() + volume.array.tobytes()).digest()
        if self.seen.setdefault(digest, patient) != patient:
            self.shared += 1
        for label in labels:
            self.label_holders.setdefault(label, set()).add(patient)

    def mask_labels(self) -> tuple[int, ...]:
        """Return the sorted labels. Raises CohortError for too many, or one that a single patient holds."""
        if len(self.label_holders) > MAX_MASK_LABELS:
            raise CohortError(
                f"the masks hold {len(self.label_holders)} labels, more than {MAX_MASK_LABELS}: merge labels"
            )
        alone = sum(len(h) == 1 for h in self.label_holders.values())
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
        return [
            f"{self.shared} images are identical, voxel by voxel, to an image of another patient: if these are one "
            "person, epsilon does not protect them as one; check the patient ids"
        ]

    def reasons(self) -> list[dict[str, Any]]:
        """Return the skipped by reason, most frequent first."""
        ranked = sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))
        return [{"reason": reason, "count": count} for reason, count in ranked if count]
