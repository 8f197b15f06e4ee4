"""Whether what is computed from a run's released model alone may leave: the checks of a release, without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medvae.gate.certificate import short_claim
from medvae.gate.checks import check_claim, check_run
from medvae.gate.evidence import read_evidence, read_privacy

AT_HOME = "; or keep what it draws at home, by --private"


def require_shareable(run: Path, report: Path | None) -> dict[str, Any]:
    """Return the claim that covers everything computed from RUN/model alone, by post-processing.

    report: the run's audit, or None. Raises NotReleasable, naming the check, where a release would be refused.
    """
    privacy = read_privacy(run)
    check_claim(privacy)
    check_run(read_evidence(run, privacy, report), remedy=AT_HOME)
    return short_claim(privacy)
