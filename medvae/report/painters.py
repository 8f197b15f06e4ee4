"""Paints the figures of a report with matplotlib: vector SVG, two inks that differ in grey, fonts drawn as paths."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medvae.report.board_figures import ladder, ledger
from medvae.report.ink import BLUE, GREY, INK, RC, STYLES, clean, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALLEST_RATE = 1e-4


def paint(kind: str, data: Mapping[str, Any]) -> bytes:
    """Return a figure of this kind as SVG; raises ValueError (or KeyError) for data that cannot be drawn."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    painters: dict[str, tuple[Callable[[Axes, Mapping[str, Any]], None], tuple[float, float]]] = {
        "curve": (_curve, (3.35, 2.15)),
        "histogram": (_histogram, (2.5, 1.25)),
        "bars": (_bars, (3.5, 0.55 + 0.24 * len(bar_rows(data)) if kind == "bars" else 2.0)),
        "ladder": (ladder, (3.35, 2.15)),
        "ledger": (ledger, (3.35, 1.4)),
    }
    if kind not in painters:
        raise ValueError(f"unknown kind {kind!r}")
    draw, size = painters[kind]
    with mpl.rc_context(RC):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes, data)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _curve(axes: Axes, data: Mapping[str, Any]) -> None:
    log = bool(data.get("log"))
    series = [(clean(s["label"]), *_points(s["x"], s["y"], log)) for s in data["series"]]
    bands = [s.get("band") for s in data["series"]]
    if not any(x for _, x, _ in series):
        raise ValueError("no point to draw")
    for i, (label, x, y) in enumerate(series):
        color, line = STYLES[i % len(STYLES)]
        axes.plot(x, y, color=color, linestyle=line, label=label)
        if any(word in label.lower() for word in ("proven", "proof", "bound", "limit")):
            axes.fill_between(x, y, 1.0, color=GREY, alpha=0.14, linewidth=0, label="ruled out by the proof")
        band = bands[i]
        if band is not None:
            axes.fill(*_outline(band, log), color=color, alpha=0.16, linewidth=0, label=clean(band["label"]))
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
    axes.set_xlabel(clean(data.get("x_label", "")))
    axes.set_ylabel(clean(data.get("y_label", "")))
    axes.legend(loc="lower right" if log else "best")


def _outline(band: Mapping[str, Any], log: bool) -> tuple[list[float], list[float]]:
    """Return the outline of a band between two edges; on logarithmic axes zero is drawn far below what is shown."""
    edges = [list(zip(band[edge]["x"], band[edge]["y"], strict=True)) for edge in ("low", "high")]
    floor = SMALLEST_RATE / 1000 if log else -math.inf
    points = [(max(float(x), floor), max(float(y), floor)) for x, y in [*edges[0], *reversed(edges[1])]]
    return [x for x, _ in points], [y for _, y in points]


def _points(x: Sequence[float], y: Sequence[float], log: bool) -> tuple[list[float], list[float]]:
    pairs = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if finite(a) and finite(b)]
    kept = [(a, b) for a, b in pairs if not log or (a > 0 and b > 0)]
    return [a for a, _ in kept], [b for _, b in kept]


def _histogram(axes: Axes, data: Mapping[str, Any]) -> None:
    for i, series in enumerate(data["series"]):
        color, line = STYLES[i % len(STYLES)]
        edges = [float(e) for e in series["edges"]]
        density = [float(d) for d in series["density"]]
        if len(edges) != len(density) + 1:
            raise ValueError("a histogram has one edge more than bars")
        label = clean(series["label"])
        if i == 0:
            axes.stairs(density, edges, fill=True, color="#b9c2cc", label=label)
            axes.stairs(density, edges, color=GREY, linewidth=0.7)
        else:
            axes.stairs(density, edges, color=color, linestyle=line, linewidth=1.5, label=label)
    axes.set_xlabel(clean(data.get("x_label", "")))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.3)
    axes.legend(loc="upper right", ncols=2, handlelength=1.4, borderpad=0.1, columnspacing=0.9)


def _bars(axes: Axes, data: Mapping[str, Any]) -> None:
    rows = bar_rows(data)
    for i, (_, value, low, high) in enumerate(rows):
        axes.barh(i, value, height=0.55, color=BLUE)
        if low is not None and high is not None:
            axes.plot([low, high], [i, i], color=INK, linewidth=1.2, marker="|", markersize=5)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel(clean(data.get("x_label", "")))


def bar_rows(data: Mapping[str, Any]) -> list[tuple[str, float, float | None, float | None]]:
    """Read bars written as a list of {"label", "value", "low", "high"} or as parallel lists."""
    if "bars" in data:
        return [(clean(b["label"]), float(b["value"]), b.get("low"), b.get("high")) for b in data["bars"]]
    if "labels" in data and "values" in data:
        none = [None] * len(data["labels"])
        columns = (data["labels"], data["values"], data.get("low") or none, data.get("high") or none)
        return [(clean(a), float(b), c, d) for a, b, c, d in zip(*columns, strict=True)]
    return []
