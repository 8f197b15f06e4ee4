"""The figures of a report, drawn from the series in the JSON: small SVGs that read in grey, with words beside them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import quoteattr

from medvae.report import board_figures
from medvae.report.ink import BLUE, INK, ORANGE, finite
from medvae.report.painters import bar_rows, paint
from medvae.report.words import number, sentence

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A drawn figure. `uri` is a data URI, or empty where the figure's kind is not known or its data do not fit."""

    name: str
    title: str
    kind: str
    provenance: str
    uri: str
    alt: str
    note: str = ""

    @property
    def proven(self) -> bool:
        """Whether this is the trade-off (ROC) figure that belongs on the first page."""
        words = f"{self.name} {self.title}".lower()
        return self.kind == "curve" and any(word in words for word in ("roc", "trade", "proven"))


def draw(name: str, figure: Mapping[str, Any]) -> Picture:
    """Draw one figure of `series.arrange`; never raises: what cannot be drawn is listed by its title."""
    kind = str(figure.get("kind", "unknown"))
    title = str(figure.get("title") or sentence(name))
    provenance = str(figure.get("provenance", "private"))
    data = figure.get("data")
    try:
        if not isinstance(data, Mapping):
            raise ValueError("a figure without data")
        uri, alt = (
            (_image(title, data))
            if kind == "images"
            else (_uri(paint(kind, data), "image/svg+xml"), _describe(kind, title, data))
        )
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError):
        return Picture(
            name, title, kind, provenance, "", f"{title}: could not be drawn; its numbers are in audit.json."
        )
    return Picture(name, title, kind, provenance, uri, alt, _captions(data))


def strip(finding: Mapping[str, Any]) -> Picture:
    """Draw one finding on a line: its interval, value (dot), baseline (tick) and control (diamond)."""
    keys = ("value", "low", "high", "baseline", "control")
    known = {k: float(finding[k]) for k in keys if finite(finding.get(k))}
    words = ", ".join(f"{k} {number(finding[k])}" for k in keys if k in known)
    alt = f"{sentence(str(finding.get('name', '')))}: {words}" if words else "not measured"
    if "value" not in known or len(known) == 1:
        return Picture("strip", "", "strip", "", "", alt)
    low, high = min(known.values()), max(known.values())
    span = (high - low) or 1.0
    at = {k: 8 + 104 * (v - low) / span for k, v in known.items()}
    parts = ['<line x1="4" y1="8" x2="116" y2="8" stroke="#cfd5db" stroke-width="1"/>']
    if "low" in at and "high" in at:
        parts.append(
            f'<line x1="{at["low"]:.1f}" y1="8" x2="{at["high"]:.1f}" y2="8" stroke="{BLUE}" stroke-width="3.4" '
            'stroke-opacity="0.45"/>'
        )
    if "baseline" in at:
        x = at["baseline"]
        parts.append(f'<line x1="{x:.1f}" y1="2" x2="{x:.1f}" y2="14" stroke="{INK}" stroke-width="1.6"/>')
    if "control" in at:
        x = at["control"]
        parts.append(
            f'<path d="M{x:.1f} 3.4 L{x + 4.6:.1f} 8 L{x:.1f} 12.6 L{x - 4.6:.1f} 8 Z" fill="#fff" '
            f'stroke="{ORANGE}" stroke-width="1.4"/>'
        )
    parts.append(f'<circle cx="{at["value"]:.1f}" cy="8" r="3.4" fill="{BLUE}"/>')
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 120 16" width="120" height="16" role="img" '
        f"aria-label={quoteattr(alt)}>{''.join(parts)}</svg>"
    )
    return Picture("strip", "", "strip", "", _uri(svg.encode(), "image/svg+xml"), alt)


def _image(title: str, data: Mapping[str, Any]) -> tuple[str, str]:
    try:
        png = base64.b64decode(str(data["png_base64"]), validate=True)
    except binascii.Error:
        raise ValueError("not base64") from None
    if not png.startswith(PNG_MAGIC):
        raise ValueError("not a PNG")
    return _uri(png, "image/png"), str(data.get("alt") or data.get("alternative") or title)


def _captions(data: Mapping[str, Any]) -> str:
    captions = data.get("captions")
    if not isinstance(captions, Sequence) or not any(captions):
        return ""
    words = "; ".join(str(c) for c in captions)
    return f"Asked for, row by row: {words[:600]}{'…' if len(words) > 600 else ''}"


def _describe(kind: str, title: str, data: Mapping[str, Any]) -> str:
    """Say in words what a figure shows, for readers who do not see it."""
    if kind in ("ladder", "ledger"):
        return board_figures.describe(kind, title, data)
    if kind == "bars":
        rows = "; ".join(f"{label} {number(value)}" for label, value, *_ in bar_rows(data))
        return f"{title}. Bars: {rows}."
    lines = []
    for s in data["series"]:
        if kind == "curve":
            x, y = s["x"], s["y"]
            with_band = f" with {s['band']['label']}" if s.get("band") else ""
            ends = f"from {number(y[0])} at {number(x[0])} to {number(y[-1])} at {number(x[-1])}"
            lines.append(f"{s['label']}{with_band}, {ends}")
        else:
            peak = max(range(len(s["density"])), key=s["density"].__getitem__)
            lines.append(f"{s['label']}, highest between {number(s['edges'][peak])} and {number(s['edges'][peak + 1])}")
    axes = " against ".join(str(data[k]) for k in ("y_label", "x_label") if data.get(k))
    scale = " (both axes logarithmic)" if data.get("log") else ""
    return f"{title}. {axes}{scale}. " + "; ".join(lines) + "."


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
