"""One `cohort.npz`: images, labels, conditions and masks as plain arrays, opened with allow_pickle=False."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.synth.staging import staged_file
from medvae.types import Progress, SyntheticCohort, encode_conditions


def write_npz(
    cohort: SyntheticCohort, folder: Path, claim: Mapping[str, Any] | None = None, progress: Progress | None = None
) -> list[str]:
    """Write FOLDER/cohort.npz and return its name.

    images: (N, *spatial) float32 in [0, 1]; labels: (N,) int64, the index of the first class condition, or -1 where
    there is none; label_names: its classes; conditions: (N, K) float32 as `encode_conditions` gives them;
    condition_names: the K columns, "name=class" or "name"; masks: (N, *spatial) uint8, where the model makes them.
    `claim` is not used. Raises RunError where the file exists.
    """
    arrays = npz_arrays(cohort)
    with staged_file(folder / "cohort.npz") as path, path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    if progress is not None:
        progress(len(cohort), len(cohort))
    return ["cohort.npz"]


def npz_arrays(cohort: SyntheticCohort) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of `cohort.npz` by name."""
    conditions = cohort.space.conditions
    first = next((c for c in conditions if c.kind == "class"), None)
    names = [n for c in conditions for n in ([f"{c.name}={k}" for k in c.classes] or [c.name])]
    labels = [-1 if first is None else first.classes.index(str(row[first.name])) for row in cohort.conditions]
    arrays: dict[str, npt.NDArray[Any]] = {
        "images": cohort.images.astype(np.float32, copy=False),
        "labels": np.asarray(labels, dtype=np.int64),
        "label_names": np.asarray(first.classes if first else (), dtype=np.str_),
        "conditions": np.stack([encode_conditions(conditions, row) for row in cohort.conditions]),
        "condition_names": np.asarray(names, dtype=np.str_),
    }
    if cohort.masks is not None:
        arrays["masks"] = cohort.masks
    return arrays
