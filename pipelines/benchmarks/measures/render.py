"""The tables of docs/family.md from finished cells; nothing between the markers is typed by hand."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from measures.cells import Measure, read_cells

WIDTH = 120
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def render(page: Path, out: Path, measures: Sequence[Measure]) -> None:
    """Put the tables of all finished cells between the markers of a page. Raises SystemExit where it has none."""
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"the page has no markers for tables: put {BEGIN} and {END} into it")
    before, rest = text.split(BEGIN, 1)
    cells = list(read_cells(out))
    tables = [_table(m, [c for c in cells if c["measure"] == m.name]) for m in measures]
    body = "\n\n".join(t for t in tables if t)
    page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def _table(measure: Measure, cells: list[dict[str, Any]]) -> str:
    if not cells:
        return ""
    rows = [(case, [c for c in cells if c["case"] == dict(case)]) for case in measure.cases]
    rows = [(case, found) for case, found in rows if found]
    names = list(dict.fromkeys(name for _, found in rows for c in found for name in c["figures"]))
    labels = list(measure.cases[0])
    lines = ["| " + " | ".join([*labels, *names, "seeds"]) + " |", "|" + "---|" * (len(labels) + len(names) + 1)]
    for case, found in rows:
        figures = [interval([c["figures"][n] for c in found if n in c["figures"]], measure.digits) for n in names]
        lines.append("| " + " | ".join([*case.values(), *figures, str(len(found))]) + " |")
    seeds = ",".join(str(s) for s in sorted({c["seed"] for c in cells}))
    command = f"python pipelines/benchmarks/family.py --rows {measure.name} --seeds {seeds} --out results"
    text = textwrap.fill(f"{measure.text} CPU minutes: {sum(c['cpu_s'] for c in cells) / 60:.1f}.", WIDTH)
    return "\n".join([f"### {measure.title}", "", text, "", *lines, "", "```console", f"$ {command}", "```"])


def interval(values: Sequence[float], digits: int) -> str:
    """Return the mean and the half-width of Student's 95 % interval of a figure over seeds."""
    if not values:
        return ""
    if all(float(value).is_integer() and value > 999 for value in values):
        digits = 0  # a count
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.{digits}f}"
