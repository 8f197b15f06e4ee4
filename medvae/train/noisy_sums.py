"""Noisy sums over patients: the one way in which the closed form reads a cohort.

Every release of that stage is `noisy_sum` of a vector a scan, whose norm is clipped to 1; a patient counts with the
average over the patient's scans, so adding or removing one patient moves a sum by at most 1 in norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medvae.dp.noise import NoiseSource
from medvae.train.mixture import Grouped
from medvae.types import Batch, ImageSpace

Array = npt.NDArray[np.float64]

# Voxels loaded at a time: a pass streams, so its memory does not grow with the cohort.
CHUNK_VOXELS = 2**20
# Numbers that the scans loaded at a time may contribute: second moments of many coefficients are wider than a scan.
CHUNK_NUMBERS = 2**26


class ScanSource(Protocol):
    """What this stage needs of a cohort: scans by row, and the rows of some patients."""

    @property
    def space(self) -> ImageSpace:
        """The cohort's public image space."""
        ...

    def rows(self, patients: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the rows of these patients' scans."""
        ...

    def load(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Load scans; patients sorted."""
        ...


@dataclass(frozen=True)
class Pass:
    """One pass over the training patients: yields (x, condition, patient) a chunk of whole patients.

    width: numbers that a scan contributes, where that is what fills the memory.
    """

    source: ScanSource
    patients: npt.NDArray[np.int64]
    width: int = 1

    def __iter__(self) -> Iterator[Batch]:
        rows = [self.source.rows(self.patients[i : i + 1]) for i in range(len(self.patients))]
        space = self.source.space
        voxels = space.channels * int(np.prod(space.spatial_shape))
        limit = max(1, min(CHUNK_VOXELS // voxels, CHUNK_NUMBERS // self.width))
        chunk: list[npt.NDArray[np.int64]] = []
        for mine in rows:
            if chunk and sum(map(len, chunk)) + len(mine) > limit:
                yield self.source.load(np.concatenate(chunk))
                chunk = []
            chunk.append(mine)
        if chunk:
            yield self.source.load(np.concatenate(chunk))


def patient_average(vectors: Tensor, patient: npt.NDArray[np.int64]) -> Tensor:
    """Return the average vector of each patient, (patients, D), from one a scan, (B, D)."""
    index = torch.from_numpy(np.unique(patient, return_inverse=True)[1])
    count = torch.bincount(index).to(vectors.dtype)
    total = torch.zeros(len(count), vectors.shape[1], dtype=vectors.dtype).index_add_(0, index, vectors)
    return total / count[:, None]


def clip_rows(vectors: Tensor, radius: float) -> Tensor:
    """Scale rows of (B, D) down to norm `radius`, then divide by it: every row ends with norm at most 1.

    A row that is not finite has no norm to scale by and counts as zero.
    """
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return torch.where(torch.isfinite(norms), vectors, 0.0) / torch.clamp(norms.nan_to_num(posinf=1.0), min=radius)


class Canaries(Protocol):
    """Made-up patients that take part in every release, on coordinates of their own behind those released."""

    def vectors(self) -> Iterator[tuple[Tensor, npt.NDArray[np.int64]]]:
        """Yield contributions before any clip, one a scan (B, m), and whose they are, sorted, (B,)."""
        ...

    def saw(self, name: str, noised: Array) -> None:
        """Look at what became of their coordinates (m,)."""

    def rehearse(self, name: str, contribution: Callable[[Batch], Tensor | Grouped], noise_multiplier: float) -> None:
        """Take made-up scans, and no patient's, the way of a release that was just made."""


def clipped_sum(vectors: Tensor, patient: npt.NDArray[np.int64]) -> Tensor:
    """Return the sum over patients (D,) of averages over their scans' vectors (B, D), each of norm at most 1."""
    return clip_rows(patient_average(vectors.double(), patient), 1.0).sum(0)


def grouped_sum(made: Grouped, patient: npt.NDArray[np.int64]) -> Tensor:
    """Return the sum over patients (groups * D,) of averages over their scans' e_group (x) vector.

    Each scan's vector is clipped to norm 1, and so an average over a patient's scans has norm at most 1.
    """
    _, index, scans = np.unique(patient, return_inverse=True, return_counts=True)
    rows = clip_rows(made.vectors.double(), 1.0) / torch.from_numpy(scans[index])[:, None]
    total = torch.zeros(made.groups, rows.shape[1], dtype=torch.float64).index_add_(0, made.group, rows)
    return total.flatten()


def noisy_sum(
    scans: Pass,
    contribution: Callable[[Batch], Tensor | Grouped],
    noise_multiplier: float,
    noise: NoiseSource,
    name: str = "",
    canaries: Canaries | None = None,
) -> Array:
    """Release the sum over patients of `contribution`, averaged over each patient's scans, with Gaussian noise.

    contribution: batch -> (B, D), rows of norm at most 1 whatever the scans hold, or such rows in groups. The L2
    sensitivity to one patient is then 1, so this is the Gaussian mechanism with this noise multiplier. The bound is
    enforced, not trusted.
    """
    total: Tensor | None = None
    for batch in scans:
        made = contribution(batch)
        vectors = grouped_sum(made, batch.patient) if isinstance(made, Grouped) else clipped_sum(made, batch.patient)
        total = vectors if total is None else total + vectors
    if total is None:
        raise ValueError("no patients")
    released = len(total)
    if canaries is not None:
        total = torch.cat([total, torch.stack([clipped_sum(*made_up) for made_up in canaries.vectors()]).sum(0)])
    noised = np.asarray(total.numpy() + noise_multiplier * noise.normal(len(total)), dtype=np.float64)
    if canaries is not None:
        canaries.saw(name, noised[released:])
    return noised[:released]
