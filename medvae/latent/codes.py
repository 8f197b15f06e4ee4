"""Codes of real scans: means and spreads of q(z | x, c), as a table of one row a scan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medvae.audit.material import Ints
from medvae.latent.case import Case, tensors
from medvae.types import FloatArray, Progress, decode_conditions


@dataclass(frozen=True)
class Codes:
    """row, patient: (N,); mean and spread (standard deviation): (N, d); condition: (N, K), encoded."""

    row: Ints
    patient: Ints
    mean: FloatArray
    spread: FloatArray
    condition: FloatArray


def encode(case: Case, rows: Ints, progress: Progress | None = None) -> Codes:
    """Return the codes of these rows of the cohort, in the order of patients."""
    parts: list[tuple[npt.NDArray[Any], ...]] = []
    for some, batch in case.batches(rows, progress):
        with torch.inference_mode():
            mean, log_variance = case.model.encode(*tensors(batch))
        parts.append((some, batch.patient, mean.numpy(), (0.5 * log_variance).exp().numpy(), batch.condition))
    return Codes(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def table(case: Case, codes: Codes) -> dict[str, list[Any]]:
    """Return columns by name: patient (the cohort's own number), scan, split, conditions, z0.., spread0.. ."""
    names = np.asarray(("train", "holdout"))
    rows = [decode_conditions(case.store.space.conditions, c) for c in codes.condition]
    columns: dict[str, list[Any]] = {
        "patient": codes.patient.tolist(),
        "scan": codes.row.tolist(),
        "split": names[case.store.split[codes.patient]].tolist(),
    }
    for condition in case.store.space.conditions:
        columns[condition.name] = [row[condition.name] for row in rows]
    for prefix, values in (("z", codes.mean), ("spread", codes.spread)):
        columns |= {f"{prefix}{j}": values[:, j].tolist() for j in range(values.shape[1])}
    return columns
