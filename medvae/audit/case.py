"""One audit's material and effort, and the form in which each part of it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from medvae.audit.intervals import Estimate
from medvae.audit.material import Scans
from medvae.config import AuditConfig
from medvae.types import Finding, ModelRelease, Provenance

Group = Literal["fidelity", "utility", "privacy"]


@dataclass(frozen=True)
class Effort:
    """How much a tier looks at and computes. patients and scans are caps of each real split."""

    patients: int
    scans: int
    draws: int
    replicates: int
    pairs: int
    classifier_steps: int
    segmenter_steps: int
    control_patients: int
    control_steps: int


EFFORTS: Mapping[str, Effort] = {
    "quick": Effort(256, 4, 16, 200, 60, 120, 100, 16, 300),
    "standard": Effort(1000, 8, 64, 500, 200, 800, 800, 64, 2000),
    "full": Effort(4000, 16, 256, 1000, 400, 2000, 2000, 128, 6000),
}


@dataclass(frozen=True)
class Case:
    """Everything the parts look at. `made_provenance` is "dp" only where the model's privacy is claimed at all."""

    release: ModelRelease
    claim: Mapping[str, Any]
    config: AuditConfig
    train: Scans
    holdout: Scans
    made: Scans
    made_provenance: Provenance

    @property
    def effort(self) -> Effort:
        """What the tier allows."""
        return EFFORTS[self.config.tier]

    def rng(self, stream: int) -> np.random.Generator:
        """A generator of its own for each use, so that one part does not shift another's draws."""
        return np.random.default_rng([self.config.seed, stream])


@dataclass(frozen=True)
class Figure:
    """The series a figure is drawn from."""

    title: str
    provenance: Provenance
    data: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form used in audit.json."""
        return {"title": self.title, "provenance": self.provenance, "data": plain(self.data)}


@dataclass(frozen=True)
class Part:
    """What one part of the audit found. `notes`: facts for the decision, all of them private."""

    findings: tuple[Finding, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


def finding(
    name: str,
    group: Group,
    estimate: Estimate | None,
    provenance: Provenance = "private",
    *,
    baseline: float | None = None,
    control: float | None = None,
    verdict: str = "",
    n: int | None = None,
) -> Finding:
    """Build a finding; what is not a finite number becomes None, for JSON has no other word for it."""
    return Finding(
        name=name,
        group=group,
        value=None if estimate is None else finite(estimate.value),
        provenance=provenance,
        low=None if estimate is None else finite(estimate.low),
        high=None if estimate is None else finite(estimate.high),
        n=n if estimate is None else estimate.n,
        baseline=finite(baseline),
        control=finite(control),
        verdict=verdict,
    )


def finite(value: float | None) -> float | None:
    """Return a plain finite float, or None."""
    return None if value is None or not math.isfinite(value) else float(value)


def plain(data: Any) -> Any:
    """Return data as plain JSON: numpy numbers and arrays unwrapped, floats to six digits, no infinities."""
    if isinstance(data, Mapping):
        return {str(k): plain(v) for k, v in data.items()}
    if isinstance(data, np.ndarray):
        return plain(data.tolist())
    if isinstance(data, list | tuple):
        return [plain(v) for v in data]
    if isinstance(data, bool | np.bool_):
        return bool(data)
    if isinstance(data, np.integer):
        return int(data)
    if isinstance(data, float | np.floating):
        value = finite(float(data))
        return None if value is None else float(f"{value:.6g}")
    return data
