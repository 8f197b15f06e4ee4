"""One audit's material and effort, and the form in which each part of it answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvae.audit.intervals import Estimate
from medvae.audit.material import Scans
from medvae.config import AuditConfig
from medvae.types import Finding, ModelRelease, Provenance

Group = Literal["fidelity", "utility", "privacy"]


@dataclass(frozen=True)
class Effort:
    """How much a tier looks at and computes.

    patients and scans are caps of each real split where alikeness is measured; pool, of patients that shadow models
    train on; judged, of patients a side whom the costly attacks score. deep_minutes: longest that shadow models by
    DP-SGD may take, None for as long as it takes. made: synthetic volumes for the attacks that need many (five times
    as many in 2D).
    """

    patients: int
    scans: int
    draws: int
    replicates: int
    pairs: int
    classifier_steps: int
    segmenter_steps: int
    control_patients: int
    control_steps: int
    pool: int
    judged: int
    closed_shadows: int
    deep_shadows: int
    deep_minutes: float | None
    generators: int
    made: int
    guesses: int


EFFORTS: Mapping[str, Effort] = {
    "quick": Effort(256, 4, 64, 200, 60, 120, 100, 32, 1000, 1000, 250, 16, 0, 0.0, 4, 200, 500),
    "standard": Effort(1000, 8, 64, 500, 200, 800, 800, 32, 2000, 4000, 1000, 64, 8, 10.0, 4, 300, 2000),
    "full": Effort(4000, 16, 256, 1000, 400, 2000, 2000, 64, 4000, 20000, 4000, 256, 64, None, 16, 2000, 5000),
}


@dataclass(frozen=True)
class Case:
    """Everything the parts look at. `made_provenance` is "dp" only where the model's privacy is claimed at all.

    train and holdout: what alikeness is measured on; members and others: the same splits, as many as attacks take.
    folder: where shadow models are kept between audits of this very run and cohort, or None.
    """

    release: ModelRelease
    claim: Mapping[str, Any]
    config: AuditConfig
    train: Scans
    holdout: Scans
    made: Scans
    made_provenance: Provenance
    members: Scans
    others: Scans
    folder: Path | None = None

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
    """What one part of the audit found. notes: facts for the decision; attacks: for the report. Both are private."""

    findings: tuple[Finding, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    attacks: Mapping[str, Any] = field(default_factory=dict)


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


def seconds_of(work: Callable[[], object]) -> float:
    """Do the work and return how long it took by the clock."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


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
