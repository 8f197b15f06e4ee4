"""The board's part of a small audit, and two small volumes for its viewer."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from medvae.report.words import RESIDUAL_RISKS

SHAPE = (6, 8, 5)


def rung(label: str, epsilon: float, kind: str, provenance: str) -> dict[str, Any]:
    words = "noise of 0.77 times the claim or less would be accused 9 times in 10"
    return {"label": label, "epsilon": epsilon, "kind": kind, "provenance": provenance, "words": words}


def risk(kind: str, value: float | None, provenance: str, **more: Any) -> dict[str, Any]:
    row = {
        "kind": kind, "question": f"Can {kind} be done by what this release shows?",
        "provenance": provenance, "value": value, "low": None,
        "high": None, "n": None, "attack": None, "control": None, "blind_guess": 0.01, "proven_limit": 0.2434567,
        "evidence": "proof alone; no attack was run", "verdict": "limited by proof",
    }  # fmt: skip
    return row | more


def ledger() -> dict[str, Any]:
    shared = {"ended": True, "words": "at most 73 of 1,000 patients are named rightly"}
    first = {"utc": "2026-01-02T09:00:00+00:00", "epsilon": 3.1234567, "cumulative": 3.1234567, "this": False}
    second = {"utc": "2026-01-05T09:00:00+00:00", "epsilon": 7.998237461, "cumulative": 8.7654321, "this": True}
    budget = {"epsilon": 10.0, "delta": 1e-05}
    rows = [first | shared, second | shared]
    return {"provenance": "public", "delta": 1e-05, "budget": budget, "not_private": 1, "rows": rows}


def make_board(audience: str) -> dict[str, Any]:
    """Return the board's part of an audit."""
    private = audience == "internal"
    rungs = [
        rung("claimed, by proof", 7.998237461, "claim", "public"),
        rung("found on canaries, f-DP", 4.612345, "found", "canary"),
        rung("if the curve is Gaussian", 6.4012, "estimate", "canary"),
        rung("smallest fault it could see", 11.2345678, "fault", "canary"),
    ]
    risks = [risk(kind, None, "public") for kind in ("singling out", "linkability", "inference")]
    subgroup = None
    if private:
        rungs.append(rung("found on real patients", 0.3123, "found", "private"))
        measured = {"low": -0.011234, "high": 0.0612345, "n": 105, "evidence": "attack: nearest pairs"}
        risks[0] = risk("singling out", 0.0212345, "private", **measured)
        subgroup = {
            "provenance": "private", "name": "size small", "tested": 4, "members": 31, "value": 0.5678912,
            "low": 0.4612345, "high": 0.6612345, "verdict": "no better than guessing",
        }  # fmt: skip
    result = {
        "part": "all", "measurable": True, "claimed_epsilon": 7.998237461, "rates_epsilon": 4.1234567,
        "accused": False, "fdp_epsilon": 4.612345, "gdp_epsilon": 6.4012,
        "confidence": 0.95, "visible_noise_factor": 0.7712345,
    }  # fmt: skip
    return {
        "ladder": {"provenance": "private" if private else "canary", "delta": 1e-05, "rows": rungs, "words": ""},
        "ledger": ledger(),
        "risks": risks,
        "subgroup": subgroup,
        "canary": {
            "provenance": "canary",
            "verdict": "PASS",
            "count": 1000,
            "words": ["No threshold accused the claim."],
            "checks": [{"name": "noise of dpsgd", "ok": True, "detail": "sigma 1.0021 of the claim"}],
            "results": [result],
        },
        "model": {"modality": "MR", "spatial_shape": [32, 48, 32], "conditions": ["size"]},
        "residual_risks": list(RESIDUAL_RISKS),
        "review_date": "2027-01-05",
        "signatories": ["Data steward", "Data protection officer", "Clinical lead", "Chair of the board"],
    }


def make_viewer(shape: tuple[int, ...] = SHAPE) -> dict[str, Any]:
    """Return two scans: the first is bright in the upper half of every axis, the second dark."""
    volumes = np.zeros((2, *shape), dtype=np.uint8)
    volumes[(0, *(slice(n // 2, None) for n in shape))] = 200
    return {
        "provenance": "dp",
        "shape": list(shape),
        "spacing_mm": [1.0] * len(shape),
        "labels": ["synthetic scan 1: size small", "synthetic scan 2: size large"],
        "uint8_base64": base64.b64encode(volumes.tobytes()).decode(),
    }
