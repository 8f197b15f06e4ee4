"""The two figures a board asks for by name: the epsilon ladder, and the budget over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medvae.report.ink import BLUE, GREY, INK, ORANGE, clean, finite
from medvae.report.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAST_RUNS = 12


def ladder(axes: Axes, data: Mapping[str, Any]) -> None:
    """Paint claimed epsilon, lower bounds found, and the smallest fault that would have shown, on one scale.

    data: {"rows": [{"label", "epsilon", "kind": "claim" | "found" | "estimate" | "fault"}]}. Between claim and fault
    lies what no test here could see, and it is hatched.
    """
    rows = [(clean(r["label"]), float(r["epsilon"]), str(r["kind"])) for r in data["rows"] if finite(r["epsilon"])]
    if not rows:
        raise ValueError("no rung to draw")
    end = 1.28 * max(max(value for _, value, _ in rows), 0.1)
    claims = [value for _, value, kind in rows if kind == "claim"]
    faults = [value for _, value, kind in rows if kind == "fault"]
    if claims and faults and min(faults) > claims[0]:
        axes.axvspan(claims[0], min(faults), facecolor="#eceff2", edgecolor="#c3cad2", hatch="////", linewidth=0)
    if claims:
        axes.axvline(claims[0], color=BLUE, linewidth=1.2)
    for i, (_, value, kind) in enumerate(rows):
        if kind in ("found", "estimate"):
            fill = "#b9c2cc" if kind == "found" else "none"
            axes.barh(i, value, height=0.42, facecolor=fill, edgecolor=GREY, linewidth=0.6)
        marker, color = {"claim": ("s", BLUE), "fault": ("D", ORANGE), "estimate": ("|", INK)}.get(kind, (">", INK))
        axes.plot([value], [i], marker=marker, color=color, markersize=5.5, linestyle="none", clip_on=False)
        text = {"found": "at least ", "estimate": "about "}.get(kind, "") + number(value)
        box = {"facecolor": "#fff", "edgecolor": "none", "pad": 0.8}
        axes.annotate(text, (value, i), (7, 0), textcoords="offset points", va="center", fontsize=7, bbox=box)
    axes.set_yticks(range(len(rows)), [_wrap(label) for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, end)
    axes.set_xlabel("epsilon (smaller is stronger)")
    axes.grid(False, axis="y")


def ledger(axes: Axes, data: Mapping[str, Any]) -> None:
    """Paint what each run cost and the running total, with the budget where one is set; one place a run, in order."""
    rows = list(data["rows"])[-LAST_RUNS:]
    if not rows:
        raise ValueError("no run to draw")
    places = list(range(len(rows)))
    own, total = [float(r["epsilon"]) for r in rows], [float(r["cumulative"]) for r in rows]
    axes.bar(places, own, width=0.5, color="#b9c2cc", edgecolor=GREY, linewidth=0.6, label="this run alone")
    axes.plot(places, total, color=BLUE, marker="o", markersize=4, label="all runs so far")
    for i, row in enumerate(rows):
        if row.get("this"):
            axes.annotate("this run", (i, total[i]), (0, 5), textcoords="offset points", ha="center", fontsize=6.5)
    limits = list(total)
    budget = data.get("budget")
    if isinstance(budget, Mapping):
        axes.axhline(float(budget["epsilon"]), color=ORANGE, linestyle="--", linewidth=1.2, label="budget")
        limits.append(float(budget["epsilon"]))
    axes.set_xticks(places, [str(row["utc"])[:10] for row in rows], rotation=30 if len(rows) > 4 else 0)
    axes.set_xlim(-0.7, max(len(rows) - 0.3, 1.7))
    axes.set_ylim(0, 1.3 * max(limits))
    axes.set_ylabel("epsilon")
    axes.grid(False, axis="x")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1, columnspacing=1.2)


def describe(kind: str, title: str, data: Mapping[str, Any]) -> str:
    """Say in words what a ladder or a ledger shows."""
    if kind == "ladder":
        rungs = "; ".join(f"{r['label']}: {number(r['epsilon'])} ({r['words']})" for r in data["rows"])
        return f"{title}. Epsilon, {rungs}. {data.get('words') or ''}".strip()
    runs = "; ".join(
        f"{str(r['utc'])[:10]}: {number(r['epsilon'])} alone, {number(r['cumulative'])} in all" for r in data["rows"]
    )
    budget = data.get("budget")
    limit = f"Budget {number(budget['epsilon'])}." if isinstance(budget, Mapping) else "No budget is set."
    return f"{title}. Epsilon by run, {runs}. {limit}"


def _wrap(label: str) -> str:
    words = label.split()
    half = (len(words) + 1) // 2
    return label if len(label) < 18 else " ".join(words[:half]) + "\n" + " ".join(words[half:])
