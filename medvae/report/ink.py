"""Colours, styles and the two rules for labels and numbers that all figures share."""

from __future__ import annotations

import math
from typing import Any

INK, BLUE, ORANGE, GREEN, GREY = "#1c2733", "#1f4e79", "#b4500f", "#3b7a57", "#6b7280"
STYLES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (GREY, ":"), (INK, (0, (5, 1))))
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


def clean(value: Any) -> str:
    """Make a label safe for matplotlib: a dollar sign would start its mathematics, an underscore hides a legend."""
    return str(value).replace("$", "").lstrip("_")[:60]


def finite(value: Any) -> bool:
    """Whether a JSON value is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
