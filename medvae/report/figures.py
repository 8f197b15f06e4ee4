"""The figures of a report, drawn from the series in the JSON: small SVGs that read in grey, with words beside them."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from medvae.report.words import number, sentence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, BLUE, ORANGE, GREEN, GREY = "#1c2733", "#1f4e79", "#b4500f", "#3b7a57", "#6b7280"
STYLES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (GREY, ":"), (INK, (0, (5, 1))))
SMALLEST_RATE = 1e-4
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
RC = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "medvae",
    "path.simplify_threshold": 0.5,
}


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
        uri, alt = (_image(title, data)) if kind == "images" else (_plot(kind, data), _describe(kind, title, data))
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError):
        return Picture(
            name, title, kind, provenance, "", f"{title}: could not be drawn; its numbers are in audit.json."
        )
    return Picture(name, title, kind, provenance, uri, alt, _captions(data))


def strip(finding: Mapping[str, Any]) -> Picture:
    """Draw one finding on a line: its interval, value (dot), baseline (tick) and control (diamond)."""
    keys = ("value", "low", "high", "baseline", "control")
    known = {k: float(finding[k]) for k in keys if _finite(finding.get(k))}
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


def _plot(kind: str, data: Mapping[str, Any]) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    painters: dict[str, tuple[Callable[[Axes, Mapping[str, Any]], None], tuple[float, float]]] = {
        "curve": (_curve, (3.2, 2.25)),
        "histogram": (_histogram, (2.5, 1.25)),
        "bars": (_bars, (3.5, 0.55 + 0.24 * len(_bar_rows(data)) if kind == "bars" else 2.0)),
    }
    if kind not in painters:
        raise ValueError(f"unknown kind {kind!r}")
    paint, size = painters[kind]
    with mpl.rc_context(RC):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        paint(axes, data)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _uri(stream.getvalue(), "image/svg+xml")


def _curve(axes: Axes, data: Mapping[str, Any]) -> None:
    log = bool(data.get("log"))
    series = [(_label(s["label"]), *_points(s["x"], s["y"], log)) for s in data["series"]]
    if not any(x for _, x, _ in series):
        raise ValueError("no point to draw")
    for i, (label, x, y) in enumerate(series):
        color, line = STYLES[i % len(STYLES)]
        axes.plot(x, y, color=color, linestyle=line, label=label)
        if any(word in label.lower() for word in ("proven", "proof", "bound", "limit")):
            axes.fill_between(x, y, 1.0, color=GREY, alpha=0.14, linewidth=0, label="ruled out by the proof")
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        lowest, highest = min(v for _, x, _ in series for v in x), max(v for _, x, _ in series for v in x)
        lowest = max(lowest, SMALLEST_RATE) if highest <= 1.0 else lowest
        if highest <= 1.0:
            axes.plot([lowest, highest], [lowest, highest], color=GREY, linestyle=":", linewidth=0.9)
        axes.set_xlim(lowest, highest)
        axes.set_ylim(
            min(lowest, *(v for _, _, y in series for v in y)), max(1.0, *(v for _, _, y in series for v in y))
        )
    axes.set_xlabel(_label(data.get("x_label", "")))
    axes.set_ylabel(_label(data.get("y_label", "")))
    axes.legend(loc="lower right" if log else "best")


def _points(x: Sequence[float], y: Sequence[float], log: bool) -> tuple[list[float], list[float]]:
    pairs = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if _finite(a) and _finite(b)]
    kept = [(a, b) for a, b in pairs if not log or (a > 0 and b > 0)]
    return [a for a, _ in kept], [b for _, b in kept]


def _histogram(axes: Axes, data: Mapping[str, Any]) -> None:
    for i, series in enumerate(data["series"]):
        color, line = STYLES[i % len(STYLES)]
        edges = [float(e) for e in series["edges"]]
        density = [float(d) for d in series["density"]]
        if len(edges) != len(density) + 1:
            raise ValueError("a histogram has one edge more than bars")
        label = _label(series["label"])
        if i == 0:
            axes.stairs(density, edges, fill=True, color="#b9c2cc", label=label)
            axes.stairs(density, edges, color=GREY, linewidth=0.7)
        else:
            axes.stairs(density, edges, color=color, linestyle=line, linewidth=1.5, label=label)
    axes.set_xlabel(_label(data.get("x_label", "")))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.3)
    axes.legend(loc="upper right", ncols=2, handlelength=1.4, borderpad=0.1, columnspacing=0.9)


def _bars(axes: Axes, data: Mapping[str, Any]) -> None:
    rows = _bar_rows(data)
    for i, (_, value, low, high) in enumerate(rows):
        axes.barh(i, value, height=0.55, color=BLUE)
        if low is not None and high is not None:
            axes.plot([low, high], [i, i], color=INK, linewidth=1.2, marker="|", markersize=5)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel(_label(data.get("x_label", "")))


def _bar_rows(data: Mapping[str, Any]) -> list[tuple[str, float, float | None, float | None]]:
    """Read bars written as a list of {"label", "value", "low", "high"} or as parallel lists."""
    if "bars" in data:
        return [(_label(b["label"]), float(b["value"]), b.get("low"), b.get("high")) for b in data["bars"]]
    if "labels" in data and "values" in data:
        none = [None] * len(data["labels"])
        columns = (data["labels"], data["values"], data.get("low") or none, data.get("high") or none)
        return [(_label(a), float(b), c, d) for a, b, c, d in zip(*columns, strict=True)]
    return []


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
    if kind == "bars":
        rows = "; ".join(f"{label} {number(value)}" for label, value, *_ in _bar_rows(data))
        return f"{title}. Bars: {rows}."
    lines = []
    for s in data["series"]:
        if kind == "curve":
            x, y = s["x"], s["y"]
            lines.append(f"{s['label']}, from {number(y[0])} at {number(x[0])} to {number(y[-1])} at {number(x[-1])}")
        else:
            peak = max(range(len(s["density"])), key=s["density"].__getitem__)
            lines.append(f"{s['label']}, highest between {number(s['edges'][peak])} and {number(s['edges'][peak + 1])}")
    axes = " against ".join(str(data[k]) for k in ("y_label", "x_label") if data.get(k))
    scale = " (both axes logarithmic)" if data.get("log") else ""
    return f"{title}. {axes}{scale}. " + "; ".join(lines) + "."


def _label(value: Any) -> str:
    """Make a label safe for matplotlib: a dollar sign would start its mathematics, an underscore hides a legend."""
    return str(value).replace("$", "").lstrip("_")[:60]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
