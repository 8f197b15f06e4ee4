"""Which scans a step sees: Poisson sampling of patients, then a few scans of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from medvae.dp.noise import NoiseSource
from medvae.types import Batch, ImageSpace

IntArray = npt.NDArray[np.int64]


class Scans(Protocol):
    """What training needs of a cohort store."""

    @property
    def space(self) -> ImageSpace:
        """The image space of the scans."""

    def rows(self, patients: IntArray) -> IntArray:
        """Return the rows of all scans of the given patients."""

    def load(self, rows: IntArray) -> Batch:
        """Return the scans in the given order."""


@dataclass(frozen=True)
class PatientSampler:
    """Draws each patient independently with probability `sample_rate`: the sampler the accountant assumes.

    Within a drawn patient at most `scans_per_patient` scans are chosen, uniformly and without replacement. That
    choice costs nothing: whatever it is, the patient contributes one clipped gradient.

    canaries: made-up patients that are drawn beside the real ones, by the same coin tosses; no count of patients
    includes them. Their ids are larger than any patient's.
    """

    store: Scans
    patients: IntArray
    sample_rate: float
    scans_per_patient: int
    canaries: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def expected_patients(self) -> float:
        """The expected number of patients of a step, from public numbers only."""
        return self.sample_rate * len(self.patients)

    def draw(self, source: NoiseSource) -> IntArray:
        """Return the rows of one step, patient after patient; often few, sometimes none."""
        chosen = self.draw_patients(source)
        return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)

    def draw_patients(self, source: NoiseSource) -> list[IntArray]:
        """Return the rows of one step as one array a drawn patient, in the order of `load`."""
        everyone = np.concatenate([self.patients, self.canaries])
        return self.choose_scans(np.sort(everyone[source.mask(len(everyone), self.sample_rate)]), source)

    def choose_scans(self, patients: IntArray, source: NoiseSource) -> list[IntArray]:
        """Return the rows that these patients give, one array each: all of theirs, or as many as a patient may give."""
        return [self._scans_of(patient, source) for patient in patients]

    def load(self, rows: IntArray) -> Batch:
        """Return the scans of the rows as a batch; no row at all is a batch of no scans."""
        if len(rows):
            return self.store.load(rows)
        space = self.store.space
        return Batch(
            x=np.zeros((0, space.channels, *space.spatial_shape), dtype=np.float32),
            condition=np.zeros((0, space.condition_width), dtype=np.float32),
            patient=np.zeros(0, dtype=np.int64),
        )

    def _scans_of(self, patient: np.int64, source: NoiseSource) -> IntArray:
        rows = self.store.rows(np.asarray([patient], dtype=np.int64))
        if len(rows) <= self.scans_per_patient:
            return rows
        # Ranking independent draws of a continuous distribution is a uniform choice without replacement.
        ranks = np.argsort(source.normal(len(rows)))
        return np.sort(rows[ranks[: self.scans_per_patient]])
