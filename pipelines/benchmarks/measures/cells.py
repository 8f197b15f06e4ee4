"""A cell is one case of a measurement at one seed: a JSON of figures, written as soon as it is there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from leaderboard.cells import write

SCHEMA = "medvae.family-cell/1"
Case = Mapping[str, str]


@dataclass(frozen=True)
class Work:
    """What a cell is run with: the folder of data, and where cohorts and cells go."""

    data: Path
    out: Path


@dataclass(frozen=True)
class Measure:
    """One measurement. cases: a row of the table each, by the names of its first columns; run: from case, seed and
    Work to figures by name; text: what was measured and at which sizes; digits: after the point."""

    name: str
    title: str
    text: str
    cases: tuple[Case, ...]
    run: Callable[[Case, int, Work], dict[str, float]]
    digits: int = 3


def cell_name(measure: Measure, case: Case, seed: int) -> str:
    """Return the file name of a cell, without its ending."""
    parts = "-".join(value.replace(" ", "_").replace("/", "_") for value in case.values())
    return f"{measure.name}-{parts}-seed{seed}"


def run_cells(measure: Measure, seeds: list[int], work: Work) -> None:
    """Run what is not there yet, seed after seed."""
    for seed in seeds:
        for case in measure.cases:
            path = work.out / "cells" / f"{cell_name(measure, case, seed)}.json"
            if path.exists():
                continue
            begun, wall = time.process_time(), time.time()
            figures = measure.run(case, seed, work)
            spent = time.process_time() - begun
            facts = {"cpu_s": spent, "wall_s": time.time() - wall, "medvae": metadata.version("medvae-dp")}
            value = {"schema": SCHEMA, "measure": measure.name, "case": dict(case), "seed": seed, "figures": figures}
            write(path, value | facts)
            shown = ", ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
            print(f"{path.stem}: {shown}; {spent:.0f} CPU s", flush=True)


def read_cells(out: Path) -> Iterator[dict[str, Any]]:
    """Yield the finished cells of a results folder."""
    for path in sorted((out / "cells").glob("*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("schema") == SCHEMA:
            yield value
