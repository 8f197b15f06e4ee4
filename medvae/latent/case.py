"""A finished run's model beside a cohort of real scans that it can read, and the scans in small batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from medvae.audit.material import Ints
from medvae.errors import CohortError
from medvae.nets.build import load_release
from medvae.nets.cvae import ConditionalVAE
from medvae.synth.store import read_release
from medvae.types import Batch, ImageSpace, Progress
from medvae.vault.store import CohortStore, open_cohort

Split = Literal["train", "holdout", "all"]
ELEMENTS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Case:
    """model: for evaluation; store: the cohort, whose scans have the model's shape and conditions."""

    model: ConditionalVAE
    store: CohortStore

    def rows(self, split: Split, patients: int | None = None, seed: int = 0) -> Ints:
        """Return the rows of a split, patient after patient, or of at most so many patients drawn by the seed."""
        every = np.arange(self.store.info["patients"]) if split == "all" else self.store.patients(split)
        if patients is not None and patients < len(every):
            every = np.sort(np.random.default_rng(seed).permutation(every)[:patients])
        if not len(every):
            raise CohortError(f"the cohort has no patient in its split {split!r}: take another split")
        return self.store.rows(every)

    def batches(self, rows: Ints, progress: Progress | None = None) -> Iterator[tuple[Ints, Batch]]:
        """Yield rows and their scans, few at a time: memory does not grow with the cohort."""
        space = self.store.space
        at_once = max(1, ELEMENTS_AT_ONCE // (space.channels * int(np.prod(space.spatial_shape))))
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            batch = self.store.load(some)
            yield some[np.lexsort((some, self.store.patient[some]))], batch  # the order that `load` gives
            if progress is not None:
                progress(min(start + at_once, len(rows)), len(rows))


def open_case(run: Path, cohort: Path) -> Case:
    """Open both. Raises RunError or CohortError where one cannot be used, or where the model reads other scans."""
    model = load_release(read_release(run / "model"))
    store: CohortStore = open_cohort(cohort).reveal()
    require_same(model.space, store.space)
    return Case(model, store)


def require_same(model: ImageSpace, cohort: ImageSpace) -> None:
    """Raise CohortError, with the first difference, where scans of `cohort` are not what the model was trained on."""
    checks: tuple[tuple[str, Callable[[ImageSpace], object], str], ...] = (
        ("shape", lambda s: list(s.spatial_shape), "--shape"),
        ("spacing in mm", lambda s: [round(v, 4) for v in s.spacing_mm], "--spacing-mm"),
        ("mask labels", lambda s: list(s.mask_labels), "masks of the same labels"),
        ("conditions", lambda s: [c.name for c in s.conditions], "--condition"),
        ("condition values", lambda s: [c.to_json() for c in s.conditions], "--condition NAME=..."),
        ("intensity scale", lambda s: [s.intensity.mode, s.intensity.low, s.intensity.high], "--intensity"),
    )
    for name, value, remedy in checks:
        if value(model) != value(cohort):
            raise CohortError(
                f"the model knows the {name} {value(model)} and the cohort has {value(cohort)}: ingest it anew with "
                f"{remedy} as for training"
            )


def tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scans (B, C, *spatial) and conditions (B, K) as tensors."""
    return torch.from_numpy(batch.x), torch.from_numpy(batch.condition)
