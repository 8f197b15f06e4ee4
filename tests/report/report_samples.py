"""Audits and a certificate as the package writes them, small, with every kind of figure."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from board_samples import make_board, make_viewer
from PIL import Image

FPR = [0.0, *np.logspace(-5, 0, 40).tolist()]
CLAIM: dict[str, Any] = {
    "epsilon": 7.998237461,
    "delta": 1e-05,
    "unit": "patient",
    "neighboring": "add-remove",
    "accountant": "pld",
    "patients": 105,
    "sample_rate": 0.2,
    "noise_multiplier": 1.2345678901,
    "max_grad_norm": 1.0,
    "steps": 300,
    "mechanisms": [
        {
            "name": "moments",
            "event": {"type": "gaussian", "noise_multiplier": 31.25, "sample_rate": 1.0, "count": 1},
        },
        {
            "name": "dpsgd",
            "event": {
                "type": "poisson_sampled_gaussian",
                "noise_multiplier": 1.2345678901,
                "sample_rate": 0.2,
                "count": 300,
            },
        },
    ],
    "noise_source": "os_entropy:chacha20",
    "plain_words": [
        "If an attacker accepts one wrong accusation in 1,000, at most 77 of 1,000 patients can be named rightly.",
        "Epsilon 8 is a weak promise: the proof alone does not exclude that some patients are recognised.",
    ],
    "receipt": {"run_id": "r1", "ledger_id": "l1", "sequence": 1, "digest": "ab" * 32},
    "weights_sha256": "cd" * 32,
}


BAND = {
    "confidence": 0.95,
    "low": {"fpr": [0.02, 0.2, 1.0], "tpr": [0.0, 0.07, 0.97]},
    "high": {"fpr": [0.0, 0.04, 0.98], "tpr": [0.03, 0.2, 1.0]},
}


def finding(name: str, group: str, value: float | None, provenance: str, **more: Any) -> dict[str, Any]:
    empty = {"low": None, "high": None, "n": None, "baseline": None, "control": None, "verdict": ""}
    return {"name": name, "group": group, "value": value, "provenance": provenance} | empty | more


def png() -> str:
    stream = io.BytesIO()
    Image.fromarray(np.arange(64 * 32, dtype=np.uint8).reshape(32, 64)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def histogram() -> dict[str, Any]:
    edges = np.linspace(0, 1, 13).tolist()
    shares = (np.hanning(14)[1:-1] / 6).tolist()
    return {"edges": edges, "real": shares, "synthetic": shares[::-1], "distance": 0.213, "baseline": 0.1}


def make_audit(audience: str) -> dict[str, Any]:
    """Return an audit.json with every kind of figure, known by kind or by data."""
    series = [{"label": "proven limit", "x": [0.001, 1.0], "y": [0.077, 1.0]}]
    findings = [
        finding("proven limit of tpr at 0.1% fpr", "privacy", 0.0769123, "public", baseline=0.001, n=105),
        finding(
            "membership, elbo, auc", "privacy", 0.5123456789012345, "private",
            low=0.43211, high=0.59, n=131, baseline=0.4831, control=0.9812, verdict="no better than guessing",
        ),
        finding("membership, above the proven curve", "privacy", 0.0, "private", verdict="under the proven curve"),
        finding("tpr at 1% fpr", "privacy", None, "private", n=26, verdict="not measurable: needs 100 non-members"),
        finding(
            "frechet distance", "fidelity", 12.34567, "private",
            low=10.1, high=15.25, n=200, baseline=3.21, control=44.5, verdict="further than real patients are",
        ),
        finding("diversity, ms-ssim", "fidelity", 0.61, "dp", low=0.58, high=0.63, n=60),
        finding("segmentation, dice", "utility", 0.69, "private", low=0.65, high=0.72, n=32, baseline=0.31),
    ]  # fmt: skip
    figures: dict[str, Any] = {
        "proven curve": {
            "title": "What the proof allows any attack",
            "provenance": "public",
            "data": {"fpr": FPR, "tpr_bound": np.sqrt(FPR).tolist(), "epsilon": 7.998237461, "delta": 1e-05},
        },
        "empirical roc": {
            "title": "Membership attack on real patients",
            "provenance": "private",
            "data": {
                "score": "elbo",
                "curves": {"model": {"fpr": [0.0, 0.1, 1.0], "tpr": [0.0, 0.12, 1.0], "band": BAND}},
            },
        },
        "attack scores": {
            "title": "Every score of the attack",
            "provenance": "private",
            "data": {"rows": [{"score": "elbo", "auc": 0.531234, "control auc": None}]},
        },
        "feature distributions": {
            "title": "Features of real and synthetic scans",
            "provenance": "private",
            "data": {"mean": histogram(), "entropy": histogram()},
        },
        "synthetic scans": {
            "title": "Synthetic scans",
            "provenance": "dp",
            "data": {"png_base64": png(), "columns": 8, "captions": ["small", "large"], "alternative": "two scans"},
        },
        "ladder": {"kind": "curve", "title": "A ladder", "provenance": "dp", "data": {"series": series, "log": True}},
        "classes": {
            "kind": "bars",
            "title": "Scans by class",
            "provenance": "dp",
            "data": {"labels": ["small", "large"], "values": [50, 50]},
        },
        "future": {"kind": "hologram", "title": "A hologram", "provenance": "dp", "data": {}},
    }
    shareable = ("public", "dp", "canary")
    if audience == "public":
        findings = [f for f in findings if f["provenance"] in shareable]
        figures = {k: v for k, v in figures.items() if v["provenance"] in shareable}
    return {
        "schema": "medvae.audit/1",
        "created": "2026-01-05T10:00:00+00:00",
        "tool": {"name": "medvae-dp", "version": "0.1.0"},
        "claim": CLAIM,
        "findings": findings,
        "figures": figures,
        "not_tested": ["Attacks with shadow models.", "Attribute inference."],
        "decision": {"verdict": "CONDITIONAL", "reasons": ["epsilon 8 is a weak promise: share under an agreement"]},
        "summary": CLAIM["plain_words"],
        "board": make_board(audience),
        "viewer": make_viewer(),
        "tier": "quick",
        "audience": audience,
    }


def make_certificate() -> dict[str, Any]:
    return {
        "schema": "medvae.certificate/1",
        "title": "Synthetic hippocampi",
        "created": "2026-01-05",
        "tool": {"name": "medvae-dp", "version": "0.1.0"},
        "claim": CLAIM,
        "cumulative": {"epsilon": 9.1234567, "delta": 1e-05, "runs": 2, "budget": None, "words": "All runs together."},
        "plain_words": CLAIM["plain_words"],
        "limits": ["A passed check is no proof."],
        "checks": [{"name": "receipt_matches", "ok": True, "detail": "sequence 1"}, {"name": "noise", "ok": False}],
        "software": {"code_sha256": "ef" * 32},
    }
