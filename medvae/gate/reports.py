"""Which audits a run has had: where the latest report is, and whether a report is still as the audit wrote it.

Kept in the run's private folder, for paths tell of a hospital. What is not kept there (a run that could not be written
to, a report that was moved) is not compared.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from medvae.gate.manifest import digest
from medvae.synth.staging import write_durably

AUDIT_FILE = "audit.json"
AUDITS = Path("private") / "audits.json"
SCHEMA = "medvae.audits/1"
SIDES = ("public", "internal")


def remember(run: Path, report: Path) -> None:
    """Note where a run's new report is, and the digests of its two parts; a run that is read-only notes nothing."""
    place = str(report.resolve())
    digests = {side: digest(report / side / AUDIT_FILE) for side in SIDES}
    known = {**_reports(run), place: digests}
    text = json.dumps({"schema": SCHEMA, "latest": place, "reports": known}, indent=2)
    with suppress(OSError):
        write_durably(run / AUDITS, text.encode() + b"\n")


def latest(run: Path) -> Path | None:
    """Return the report of the run's latest audit, where it is still there; the gate checks that it fits."""
    place = _read(run).get("latest")
    return Path(place) if isinstance(place, str) and (Path(place) / "public" / AUDIT_FILE).is_file() else None


def edited(run: Path, report: Path) -> bool:
    """Whether a report lacks a part that the audit wrote there, or has another than it wrote."""
    wrote = _reports(run).get(str(report.resolve()))
    if not isinstance(wrote, dict):
        return False
    files = {side: report / side / AUDIT_FILE for side in SIDES}
    return any(not path.is_file() or digest(path) != wrote.get(side) for side, path in files.items())


def _reports(run: Path) -> dict[str, Any]:
    found = _read(run).get("reports")
    return found if isinstance(found, dict) else {}


def _read(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / AUDITS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
