"""Reads what the gate judges: the run's public claim, its model, the cohort's ledger, the public audit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvae.dp.ledger import Budget, Entry, Receipt
from medvae.dp.ledger_place import SHARED, ledger_of_run
from medvae.errors import MedvaeError, NotReleasable, PrivacyError, RunError
from medvae.gate.reports import AUDIT_FILE, edited
from medvae.schemas import version
from medvae.synth.store import read_release
from medvae.types import ImageSpace, Mechanism, ModelRelease

CANARY_FILE = "canary.json"


@dataclass(frozen=True)
class Spending:
    """What the cohort's ledger says.

    entries: all rows; runs: number of charged runs; epsilon: of all of them together at the run's own delta;
    budget: the limit in force; against_budget: the same total at the budget's delta.
    """

    entries: tuple[Entry, ...]
    runs: int
    epsilon: float
    budget: Budget | None
    against_budget: float


@dataclass(frozen=True)
class Audit:
    """The public audit, the internal one where it is there, and the decisions of both in words.

    edited: not as the audit wrote it. Of the internal one only its claim, its moment, its decision and the names of
    what was measured are looked at.
    """

    public: Mapping[str, Any]
    decisions: tuple[str, ...]
    internal: Mapping[str, Any] | None = None
    edited: bool = False

    @property
    def findings(self) -> list[Mapping[str, Any]]:
        """What was measured, by name, in the fuller of the two reports."""
        found = (self.public if self.internal is None else self.internal).get("findings")
        return [f for f in found if isinstance(f, Mapping)] if isinstance(found, list) else []


@dataclass(frozen=True)
class Evidence:
    """All that the gate knows of a run: public, or an output of a private mechanism; no training state."""

    privacy: Mapping[str, Any]
    model: ModelRelease
    spending: Spending
    audit: Audit | None = None
    canary: Mapping[str, Any] | None = None

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """The mechanisms the run claims."""
        return tuple(Mechanism.from_json(m) for m in self.privacy["mechanisms"])

    @property
    def receipt(self) -> Receipt:
        """The receipt the run shows."""
        return Receipt.from_json(dict(self.privacy["receipt"]))

    @property
    def space(self) -> ImageSpace:
        """The image space of the model."""
        return self.model.space


def read_privacy(run: Path) -> dict[str, Any]:
    """Read RUN/privacy.json; raises RunError where it is missing or of another version."""
    data = _read_json(
        run / "privacy.json",
        "this folder is no finished run: train with `medvae train COHORT -o RUN`, or give it --resume",
    )
    if data.get("schema") != version("privacy"):
        raise RunError(f"the run is not of version {version('privacy')}: train again with this medvae")
    return data


def read_evidence(run: Path, privacy: Mapping[str, Any], report: Path | None) -> Evidence:
    """Read the model, the ledger and the audit of a run whose privacy.json keeps to its schema.

    Raises RunError for missing or torn files, and NotReleasable where the ledger is gone or was altered.
    """
    model = read_release(run / "model")
    try:
        _ = model.space
    except (KeyError, TypeError, ValueError, IndexError, MedvaeError):
        raise RunError("model.json does not describe an image space: the run was altered, train again") from None
    spending = read_spending(run, privacy["delta"])
    audit = None if report is None else _read_audit(run, report)
    return Evidence(privacy, model, spending, audit, read_canary(run))


def read_canary(run: Path) -> dict[str, Any] | None:
    """Read RUN/canary.json, what the planted canaries showed; None where the run has none."""
    path = run / CANARY_FILE
    if not path.is_file():
        return None
    return _read_json(path, "canary.json of this run is torn: train again, or restore it")


def read_spending(run: Path, delta: float) -> Spending:
    """Read the ledger that a run was charged to; epsilon at `delta`. Raises as `read_evidence` does."""
    own = _read_json(run / "private" / "run.json", "the run's private/run.json is missing: release from the run itself")
    location = str(own.get("ledger", ""))
    if not location:
        raise RunError("private/run.json names no ledger: the run was altered, train again")
    on_disk = location.removeprefix("sqlite:///")
    if location != SHARED and "://" not in on_disk and not Path(on_disk).is_file():
        # Opening it would make an empty one, and hide that the proof is gone.
        raise NotReleasable("receipt: the cohort's ledger is not where the run left it, so no receipt can be checked")
    try:
        ledger = ledger_of_run(own)
        entries, budget = ledger.events(), ledger.budget()
        spent = ledger.spent(delta)
        against_budget = spent if budget is None else ledger.spent(budget.delta)
    except PrivacyError as error:
        raise NotReleasable(f"receipt: {error}") from None
    runs = sum(e.kind == "reserve" and e.private for e in entries)
    return Spending(entries, runs, spent, budget, against_budget)


def _read_audit(run: Path, report: Path) -> Audit:
    missing = "this folder is no report: make one with `medvae audit RUN -o REPORT`"
    public = _read_json(report / "public" / AUDIT_FILE, missing)
    internal = report / "internal" / AUDIT_FILE
    inside = _read_json(internal, missing) if internal.exists() else None
    audits = [public] + ([] if inside is None else [inside])
    return Audit(public, tuple(_decision(a.get("decision")) for a in audits), inside, edited(run, report))


def _decision(decision: Any) -> str:
    """Return the decision in words, whether it stands alone or with its reasons."""
    if isinstance(decision, Mapping):
        decision = decision.get("verdict", decision.get("decision", ""))
    return str(decision)


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError(missing) from None
    if not isinstance(data, dict):
        raise RunError(missing)
    return data
