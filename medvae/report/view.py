"""From a report's JSON to what the templates show. Picks, orders and words; computes no number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medvae.errors import PrivacyError, RunError
from medvae.report.board import board_figures, board_view, entries
from medvae.report.figures import draw, strip
from medvae.report.series import arrange
from medvae.report.words import (
    BAD_SIGNS,
    CERTIFICATE_LIMITS,
    GOOD_SIGNS,
    GROUPS,
    OTHER_VERDICT,
    VERDICTS,
    exact,
    number,
    sentence,
)
from medvae.types import SHAREABLE

FRONT_ROWS = {"privacy": 4}
FRONT_ROWS_ELSE = 3
"""Findings of a group on the first two pages; all of them are in the appendix."""

TELLING = ("tpr at 1% fpr", "blind baseline", "positive control", "above the proven curve", "frechet", "coverage")
"""Names of findings that tell a board more than the further variants of one score."""

CLAIM_WORDS = {
    "epsilon": "epsilon",
    "delta": "delta",
    "unit": "Unit that is protected",
    "neighboring": "Neighbouring relation",
    "accountant": "Accountant",
    "patients": "Patients",
    "sample_rate": "Sample rate (q)",
    "noise_multiplier": "Noise multiplier (σ)",
    "max_grad_norm": "Clipping norm (C)",
    "steps": "Steps",
    "noise_source": "Noise source",
    "weights_sha256": "Model weights, SHA-256",
}


def audit_view(audit: Mapping[str, Any]) -> dict[str, Any]:
    """Arrange an audit.json for the template.

    Raises RunError where it is no audit, and PrivacyError where a report that is not marked internal holds
    a number or figure of provenance "private".
    """
    claim, findings = audit.get("claim"), audit.get("findings")
    if not isinstance(claim, Mapping) or not isinstance(findings, Sequence):
        raise RunError("this is not an audit.json: it has no claim or no findings, run `medvae audit` again")
    figures: Mapping[str, Any] = audit.get("figures") or {}
    internal = audit.get("audience") == "internal"
    if not internal:
        _refuse_private(list(entries(audit)))
    arranged = arrange(figures) | board_figures(audit)
    pictures = [draw(name, figure) for name, figure in arranged.items() if figure["kind"] != "table"]
    drawn = [p for p in pictures if p.uri]
    rows = [_finding(f) for f in findings]
    decision: Mapping[str, Any] = audit.get("decision") or {}
    tool: Mapping[str, Any] = audit.get("tool") or {}
    return {
        "internal": internal,
        "created": moment(audit.get("created", "")),
        "tool": f"{tool.get('name', 'medvae')} {tool.get('version', '')}".strip(),
        "words": [str(line) for line in audit.get("summary") or claim.get("plain_words") or ()],
        "tier": str(audit.get("tier", "")),
        "decision": _decision(decision),
        "claim": claim_view(claim),
        "measured": sum(row["provenance"] != "public" for row in rows),
        "groups": [_group(key, rows) for key in _group_keys(rows)],
        "findings": rows,
        "roc": [p for p in drawn if p.proven][:1],
        "ladder": [p for p in drawn if p.name == "ladder" and p.kind == "ladder"],
        "budget": [p for p in drawn if p.kind == "ledger"],
        "sheets": [p for p in drawn if p.kind == "images"],
        "histograms": [p for p in drawn if p.kind == "histogram"],
        "others": [p for p in drawn if p.kind not in ("images", "histogram", "ladder", "ledger")],
        "tables": [_table(figure) for figure in arranged.values() if figure["kind"] == "table"],
        "undrawn": [p for p in pictures if not p.uri],
        "not_tested": [str(line) for line in audit.get("not_tested") or ()],
        "board": board_view(audit, claim),
        "viewer": audit.get("viewer"),
    }


def certificate_view(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """Arrange a certificate.json for the template; raises RunError where it holds no claim."""
    claim = certificate.get("claim")
    if not isinstance(claim, Mapping):
        raise RunError("this is not a certificate.json: it has no claim, run `medvae release` again")
    shown = {"schema", "created", "tool", "claim", "checks", "plain_words", "limits", "verify", "title", "override"}
    cumulative = certificate.get("cumulative")
    tool: Mapping[str, Any] = certificate.get("tool") or {}
    words = certificate.get("plain_words") or claim.get("plain_words") or ()
    return {
        "title": str(certificate.get("title") or "Synthetic medical images"),
        "created": moment(certificate.get("created", "")),
        "tool": f"{tool.get('name', 'medvae')} {tool.get('version', '')}".strip(),
        "claim": {**claim_view(claim), "plain_words": [str(line) for line in words]},
        "checks": [_check(c) for c in certificate.get("checks") or () if isinstance(c, Mapping)],
        "override": certificate.get("override"),
        "facts": [pair for k, v in certificate.items() if k not in shown for pair in _flat(sentence(str(k)), v)],
        "cumulative": claim_view(cumulative) if isinstance(cumulative, Mapping) else None,
        "limits": [str(line) for line in certificate.get("limits") or CERTIFICATE_LIMITS],
        "verify": str(certificate.get("verify") or "medvae verify RELEASE"),
    }


def claim_view(claim: Mapping[str, Any]) -> dict[str, Any]:
    """Arrange a claim: its numbers in short and with every digit."""
    epsilon = claim.get("epsilon")
    rows = [(words, exact_or_text(claim[key])) for key, words in CLAIM_WORDS.items() if key in claim]
    known = {*CLAIM_WORDS, "mechanisms", "plain_words"}
    rest = [pair for k, v in claim.items() if k not in known for pair in _flat(sentence(str(k)), v)]
    return {
        "private": epsilon is not None,
        "epsilon": number(epsilon),
        "epsilon_exact": exact(epsilon),
        "delta": number(claim.get("delta")),
        "delta_exact": exact(claim.get("delta")),
        "unit": str(claim.get("unit", "patient")),
        "neighboring": str(claim.get("neighboring", "")),
        "accountant": str(claim.get("accountant", "")),
        "patients": exact(claim.get("patients")),
        "plain_words": [str(line) for line in claim.get("plain_words") or ()],
        "rows": rows,
        "rest": rest,
        "mechanisms": [_mechanism(m) for m in claim.get("mechanisms") or () if isinstance(m, Mapping)],
    }


def exact_or_text(value: Any) -> str:
    """Write a value with all its digits, and text without quotes."""
    return value if isinstance(value, str) else exact(value)


def moment(value: Any) -> str:
    """Write a time for a reader, in the zone it was given in."""
    return str(value).replace("T", " ").replace("+00:00", " UTC").replace("Z", " UTC")


def tone(verdict: str) -> str:
    """Sort a finding's verdict into good, bad or neutral, for its mark and its place."""
    if any(sign in verdict for sign in BAD_SIGNS):
        return "bad"
    return "good" if any(sign in verdict.lower() for sign in GOOD_SIGNS) else "neutral"


def _refuse_private(entries: Sequence[Any]) -> None:
    for entry in entries:
        given = entry.get("provenance") if isinstance(entry, Mapping) else None
        if given not in SHAREABLE:
            raise PrivacyError(
                f"a public report was about to show something of provenance {given!r}: "
                "mark the report internal, or leave such entries out"
            )


def _finding(finding: Mapping[str, Any]) -> dict[str, Any]:
    numeric = ("value", "low", "high", "n", "baseline", "control")
    verdict = str(finding.get("verdict") or "")
    return {
        "name": str(finding.get("name", "")),
        "title": sentence(str(finding.get("name", ""))),
        "group": str(finding.get("group", "other")),
        "provenance": str(finding.get("provenance", "")),
        "verdict": sentence(verdict),
        "tone": tone(verdict),
        "strip": strip(finding),
        "short": {k: number(finding.get(k)) for k in numeric},
        "exact": {k: exact(finding.get(k)) for k in numeric},
        "has": {k: finding.get(k) is not None for k in numeric},
    }


def _group_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    present = {str(row["group"]) for row in rows}
    return [k for k in GROUPS if k in present] + sorted(present - set(GROUPS))


def _group(key: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arrange one group for the front pages: what went badly first, then what was measured, then what was derived."""
    title, question = GROUPS.get(key, (sentence(key), ""))
    mine = [row for row in rows if row["group"] == key]
    lead = next((row for row in mine if row["provenance"] != "public"), None)

    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, bool, bool]:
        telling = any(word in row["name"].lower() for word in TELLING)
        return row["tone"] != "bad", row["provenance"] == "public", row is not lead, not telling

    mine.sort(key=rank)
    bad = sum(row["tone"] == "bad" for row in mine)
    measured = sum(row["provenance"] != "public" for row in mine)
    rows_here = FRONT_ROWS.get(key, FRONT_ROWS_ELSE)
    front = mine[: max(rows_here, min(bad, 2 * rows_here))]
    return {"title": title, "question": question, "front": front, "more": len(mine) - len(front), "measured": measured}


def _table(figure: Mapping[str, Any]) -> dict[str, Any]:
    data = figure["data"]
    rows = [row for row in data["rows"] if isinstance(row, Mapping)] if isinstance(data, Mapping) else []
    head = list(dict.fromkeys(str(key) for row in rows for key in row))
    cells = [[exact_or_text(row.get(key)) for key in head] for row in rows]
    return {
        "title": str(figure["title"]),
        "provenance": str(figure["provenance"]),
        "head": [sentence(key) for key in head],
        "rows": cells,
    }


def _decision(decision: Mapping[str, Any]) -> dict[str, Any]:
    verdict = str(decision.get("verdict") or "NO DECISION")
    style, mark, meaning = VERDICTS.get(verdict.upper().replace("_", " "), OTHER_VERDICT)
    reasons = [str(line) for line in decision.get("reasons") or ()]
    return {
        "verdict": verdict.replace("_", " "),
        "style": style,
        "mark": mark,
        "meaning": meaning,
        "reasons": reasons,
        "override": decision.get("override"),
    }


def _mechanism(mechanism: Mapping[str, Any]) -> dict[str, str]:
    event: Mapping[str, Any] = mechanism.get("event") or {}
    row = {k: exact(event.get(k)) for k in ("noise_multiplier", "sample_rate", "count")}
    return {"name": sentence(str(mechanism.get("name", ""))), "type": sentence(str(event.get("type", ""))), **row}


def _check(check: Mapping[str, Any]) -> dict[str, Any]:
    name = sentence(str(check.get("name", "")))
    return {"name": name, "ok": check.get("ok") is True, "detail": str(check.get("detail") or "")}


def _flat(name: str, value: Any, depth: int = 0) -> list[tuple[str, str]]:
    """Flatten nested values to rows of a name and a text; a deep mapping, or a list of versions, takes one row."""
    if isinstance(value, Mapping):
        flat = not any(isinstance(v, Mapping | list | tuple) for v in value.values())
        versions = len(value) > 5 and all(isinstance(v, str) for v in value.values())
        if flat and (depth or versions):
            return [(name, "; ".join(f"{k} {exact_or_text(v)}" for k, v in value.items()) or "–")]
        return [pair for k, v in value.items() for pair in _flat(f"{name}: {sentence(str(k))}", v, depth + 1)]
    if isinstance(value, list | tuple):
        if all(not isinstance(v, Mapping | list | tuple) for v in value):
            return [(name, "; ".join(exact_or_text(v) for v in value) or "–")]
        return [pair for i, v in enumerate(value, start=1) for pair in _flat(f"{name} {i}", v, depth + 1)]
    return [(name, exact_or_text(value))]
