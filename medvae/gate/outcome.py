"""The answer of one check, and the rule by which answers open the gate or keep it closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from medvae.errors import NotReleasable

OVERRIDE = "; or record why it may leave all the same, by --override REASON"


@dataclass(frozen=True)
class Check:
    """One answer of the gate or of a verifier. overridable: a judgement, and not a fact, where it is not ok."""

    name: str
    ok: bool
    detail: str
    overridable: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form used in certificates and by `medvae verify`."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


def pass_all(
    subject: Any, checks: Sequence[Callable[[Any], Check]], override: str | None = None, remedy: str = OVERRIDE
) -> list[Check]:
    """Return all answers; raises NotReleasable at the first breach that is a fact, or that nobody took upon them.

    override: the reason for which breaches that are judgements are let pass; they stay marked as not ok. remedy:
    what a refused judgement names as the way on.
    """
    answers = []
    for check in checks:
        answer = check(subject)
        if not answer.ok and not (override and answer.overridable):
            way = remedy if answer.overridable else ""
            raise NotReleasable(f"the gate is closed: {answer.name}: {answer.detail}{way}")
        answers.append(answer)
    return answers


def overridden(checks: Sequence[Check], reason: str | None) -> dict[str, Any] | None:
    """Return the reason and what it let pass, as certificates and reports print it; None where nothing was."""
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.ok]
    return {"reason": reason, "overridden": failed} if failed else None
