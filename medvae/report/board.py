"""The board's part of a report, arranged for the templates. Picks, orders and words; computes no number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medvae.report.frameworks import CROSSWALK, ISO_27559, NIST_800_226, table
from medvae.report.words import RESIDUAL_RISKS, SIGNATORIES, exact, number, sentence

CANARY_WORDS = {
    "PASS": ("good", "passed: nothing seen on planted patients speaks against the claim"),
    "REFUTED": ("bad", "REFUTED: planted patients leaked more than the claim allows"),
    "NOT_MEASURABLE": ("neutral", "gave no result"),
}
NO_CANARY = ("neutral", "was not run, so a fault of the programme would not have been seen")


def board_view(audit: Mapping[str, Any], claim: Mapping[str, Any]) -> dict[str, Any]:
    """Arrange "board" of an audit.json; a report without one (of an older version) gets empty parts."""
    board: Mapping[str, Any] = audit.get("board") or {}
    canary = board.get("canary")
    tone, words = CANARY_WORDS.get(str(canary["verdict"]), NO_CANARY) if canary else NO_CANARY
    facts = _facts(audit, board, claim, words)
    risks = [{**row, "title": sentence(row["kind"])} for row in board.get("risks") or ()]
    return {
        "risks": risks,
        "front_risks": _front(risks),
        "subgroup": board.get("subgroup"),
        "ladder": board.get("ladder") or {"rows": [], "words": ""},
        "ledger": board.get("ledger"),
        "canary": canary,
        "canary_tone": tone,
        "canary_words": words,
        "fault": _fault(board),
        "iso": table(ISO_27559, facts),
        "nist": table(NIST_800_226, facts),
        "crosswalk": table(CROSSWALK, facts),
        "model": [(sentence(str(k)), _text(v)) for k, v in (board.get("model") or {}).items()],
        "attacks": _attacks(audit.get("attacks") or {}),
        "risks_that_remain": [str(line) for line in board.get("residual_risks") or RESIDUAL_RISKS],
        "review_date": str(board.get("review_date") or ""),
        "signatories": [str(line) for line in board.get("signatories") or SIGNATORIES],
    }  # fmt: skip


def entries(audit: Mapping[str, Any]) -> Iterator[Any]:
    """Yield every part of a report that must name a provenance."""
    board: Mapping[str, Any] = audit.get("board") or {}
    yield from audit.get("findings") or ()
    yield from (audit.get("figures") or {}).values()
    for key in ("ladder", "ledger", "subgroup", "canary"):
        if board.get(key):
            yield board[key]
    yield from board.get("risks") or ()
    yield from (board.get("ladder") or {}).get("rows") or ()
    for key in ("viewer", "attacks"):
        if audit.get(key):
            yield audit[key]


def board_figures(audit: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the ladder and the ledger as figures, where they hold anything."""
    board: Mapping[str, Any] = audit.get("board") or {}
    titles = {"ladder": "How far proof and tests lie apart", "ledger": "Budget spent on these patients"}
    return {
        key: {"kind": key, "title": title, "provenance": board[key]["provenance"], "data": board[key]}
        for key, title in titles.items()
        if board.get(key) and board[key]["rows"]
    }


def _front(risks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One row a risk: the attack that found most; all of them are in the appendix."""
    most: dict[str, Mapping[str, Any]] = {}
    for row in risks:
        best = most.get(row["kind"])
        if best is None or (row["value"] or -1.0) > (best["value"] or -1.0):
            most[row["kind"]] = row
    return list(most.values())


def _fault(board: Mapping[str, Any]) -> Mapping[str, Any] | None:
    rows = (board.get("ladder") or {}).get("rows") or ()
    return next((row for row in rows if row["kind"] == "fault"), None)


def _facts(audit: Mapping[str, Any], board: Mapping[str, Any], claim: Mapping[str, Any], canary: str) -> dict[str, str]:
    fault, subgroup, ledger = _fault(board), board.get("subgroup"), board.get("ledger") or {}
    limits = [r.get("proven_limit") for r in board.get("risks") or () if r.get("blind_guess") == 0.01]
    spent = ledger["rows"][-1]["cumulative"] if ledger.get("rows") else None
    budget = ledger.get("budget")
    private = claim.get("epsilon") is not None
    return {
        "epsilon": number(claim.get("epsilon")) if private else "without limit (no noise)",
        "delta": number(claim.get("delta")),
        "patients": exact(claim.get("patients")),
        "tested": f"tier “{audit.get('tier', '')}”, canary audit: {canary}",
        "review": str(board.get("review_date") or "a date still to be set"),
        "budget": (
            f"All runs together spent epsilon {number(spent)}"
            + (f" of a budget of {number(budget['epsilon'])}." if budget else "; no budget is set.")
        ),
        "subgroup": "the worst subgroup found is named below the three risks."
        if subgroup
        else "no subgroup was tested in this report.",
        "canary": canary,
        "fault": f"{sentence(str(fault['words']))}." if fault else "The smallest visible fault is unknown.",
        "noise": f"Noise comes from {claim.get('noise_source', 'an unnamed source')}, added in double precision.",
        "limit": f"{number(100 * limits[0])} %" if limits and limits[0] is not None else "an unknown share",
    }


def _attacks(attacks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row an attack of the membership family, with its power on the model made to leak."""
    found = []
    for attack in attacks.get("membership") or ():
        control: Mapping[str, Any] = (attack.get("control") or {}).get("auc") or {}
        found.append(
            {
                "name": sentence(str(attack.get("name", ""))),
                "threat": str(attack.get("threat_model", "")),
                "auc": attack.get("auc") or {},
                "control": control.get("value"),
                "strongest": attack.get("name") == attacks.get("strongest"),
                "primary": attack.get("name") == attacks.get("primary"),
                "verdict": sentence(str(attack.get("verdict", ""))),
            }
        )
    return found


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_text(v) for v in value) or "none"
    return value if isinstance(value, str) else exact(value)
