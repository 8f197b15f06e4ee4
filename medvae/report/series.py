"""From the "figures" of an audit.json to the kinds that can be drawn: curve, histogram, bars, images, table.

A figure may name its kind, or be known by what its data hold. Numbers are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medvae.report.words import number, sentence
from medvae.types import SHAREABLE

ROC = "roc"
ROC_AXES = {"x_label": "others wrongly accused (FPR)", "y_label": "participants found (TPR)", "log": True}
ROC_LABELS = {
    "model": "attack on this model",
    "positive control": "same attack on a leaking model",
}


def arrange(figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return figures by name, each {"kind", "title", "provenance", "data"}; the ROC, if there is one, comes first.

    The proven curve and the attacks' curves become one figure, for the one says little without the other.
    """
    given = {str(name): figure for name, figure in figures.items() if isinstance(figure, Mapping)}
    roc_parts = {name: figure for name, figure in given.items() if kind_of(figure) == ROC}
    arranged: dict[str, dict[str, Any]] = {}
    if roc_parts:
        arranged[ROC] = _one_roc(list(roc_parts.values()))
    for name, figure in given.items():
        if name in roc_parts:
            continue
        head = {"provenance": figure.get("provenance", "private"), "title": figure.get("title") or sentence(name)}
        if kind_of(figure) == "features":
            arranged |= {f"{name}: {n}": head | f for n, f in _features(figure["data"]).items()}
        else:
            arranged[name] = head | {"kind": kind_of(figure), "data": figure.get("data")}
    return arranged


def kind_of(figure: Mapping[str, Any]) -> str:
    """Return the kind a figure names, or the one its data tell."""
    data = figure.get("data")
    if figure.get("kind"):
        return str(figure["kind"])
    if not isinstance(data, Mapping):
        return "unknown"
    known = {"tpr_bound": ROC, "curves": ROC, "png_base64": "images", "rows": "table"}
    found = next((kind for key, kind in known.items() if key in data), None)
    if found:
        return found
    features = bool(data) and all(isinstance(v, Mapping) and "edges" in v for v in data.values())
    return "features" if features else "unknown"


def _one_roc(parts: list[Mapping[str, Any]]) -> dict[str, Any]:
    series = []
    for part in parts:
        data = part["data"]
        if "tpr_bound" in data:
            series.append({"label": "proven limit", "x": data.get("fpr"), "y": data["tpr_bound"]})
    for part in parts:
        for name, curve in (part["data"].get("curves") or {}).items():
            band = {"band": _band(curve["band"])} if curve.get("band") else {}
            series.append({"label": ROC_LABELS.get(name, name), "x": curve.get("fpr"), "y": curve.get("tpr")} | band)
    origins = [str(part.get("provenance", "private")) for part in parts]
    private = next((origin for origin in origins if origin not in SHAREABLE), None)
    title = "What the proof allows any attack" if len(series) == 1 else "Attacks under the proven limit"
    return {"kind": "curve", "title": title, "provenance": private or origins[0], "data": {"series": series} | ROC_AXES}


def _band(band: Mapping[str, Any]) -> dict[str, Any]:
    edges = {edge: {"x": band[edge]["fpr"], "y": band[edge]["tpr"]} for edge in ("low", "high")}
    return {"label": f"its {100 * float(band['confidence']):g} % band"} | edges


def _features(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """One histogram a feature, the one furthest apart first."""
    found = {}
    for name in sorted(data, key=lambda n: -float(data[n].get("distance") or 0)):
        row = data[name]
        series = [{"label": k, "edges": row["edges"], "density": row.get(k)} for k in ("real", "synthetic")]
        label = "share of scans over the feature's value"
        if row.get("distance") is not None:
            label = f"apart by {number(row['distance'])}; real scans by {number(row.get('baseline'))}"
        found[name] = {"kind": "histogram", "title": sentence(name), "data": {"series": series, "x_label": label}}
    return found
