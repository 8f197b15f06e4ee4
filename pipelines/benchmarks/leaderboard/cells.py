"""A cell: one method on one row at one epsilon with one seed, kept as one JSON file once it is finished."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from leaderboard.alike import fidelity, inception_fid
from leaderboard.judges import judge
from leaderboard.methods import AT_JUDGES_SIZE, CHANGED_BY_RECIPE, METHODS, WITHOUT_EPSILON, Task
from leaderboard.rows import Row, at_judges_size, open_row, real_scans, row_of

SCHEMA = "medvae.quality/1"


@dataclass(frozen=True)
class Cell:
    """What is measured; `name` is its file's name."""

    row: Row
    epsilon: float | None
    method: str
    seed: int
    recipe: str = ""

    @property
    def name(self) -> str:
        """The row, epsilon, method, recipe and seed."""
        epsilon = "" if self.epsilon is None else f"-eps{self.epsilon:g}"
        return f"{self.row.name}{epsilon}-{self.method}{self.recipe and '@' + self.recipe}-seed{self.seed}"


@dataclass(frozen=True)
class Settings:
    """What is the same for all cells of a command."""

    data: Path
    out: Path
    recipe: Path | None = None
    threads: int | None = None
    seeded: bool = False
    inception: Path | None = None


def plan_cells(rows: Sequence[str], methods: Sequence[str], seeds: Sequence[int], recipe: Path | None) -> list[Cell]:
    """Return the cells of ROW:EPSILON specs; ceilings and non-private models once for all epsilons.

    Raises SystemExit for an unknown row or method.
    """
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise SystemExit(f"there is no method {unknown[0]!r}: use {', '.join(METHODS)}")
    cells: dict[str, Cell] = {}
    for spec in rows:
        name, _, text = spec.rpartition(":")
        row, epsilon = row_of(name), _epsilon(spec, text)
        for seed in seeds:
            for method in methods:
                label = recipe.stem if recipe is not None and method in CHANGED_BY_RECIPE else ""
                cell = Cell(row, None if method in WITHOUT_EPSILON else epsilon, method, seed, label)
                cells.setdefault(cell.name, cell)
    return list(cells.values())


def _epsilon(spec: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise SystemExit(f"the row {spec!r} names no epsilon: write ROW:EPSILON, such as mnist:8")
    return value


def run_cell(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Make, judge and compare; return the cell's JSON and write it, whole or not at all."""
    row = cell.row
    folder, store = open_row(row, settings.data, settings.out, cell.seed)
    seen = store
    if cell.method in AT_JUDGES_SIZE:
        folder, seen = open_row(at_judges_size(row, store), settings.data, settings.out, cell.seed)
    task = Task(
        row, folder, seen, cell.epsilon or math.inf, cell.seed, settings.recipe, settings.threads, settings.seeded
    )
    begun = time.time()
    made = METHODS[cell.method](task)
    test = real_scans(store, "holdout", row.longest)
    start = time.process_time()
    scores = judge(row, made.scans, test, cell.seed)
    judged = time.process_time() - start
    result = {
        "schema": SCHEMA,
        "row": row.name,
        "title": row.title,
        "measure": row.measure,
        "relative": row.relative,
        "folds": row.folds,
        "targets": {f"{k:g}": v for k, v in row.targets.items()},
        "stretch": {f"{k:g}": v for k, v in row.stretch.items()},
        "asked_epsilon": cell.epsilon,
        "epsilon": made.epsilon,
        "delta": made.delta,
        "method": cell.method,
        "recipe": cell.recipe,
        "seed": cell.seed,
        "noise": "seeded" if settings.seeded else "os_entropy",
        "train_patients": len(store.patients("train")),
        "trained_on": len(made.scans),
        "tested_on": len(test),
        "scores": scores,
        "fidelity": {
            **fidelity(made.scans, test, cell.seed),
            "inception_fid": inception_fid(made.scans, test, settings.inception),
        },
        "train_cpu_s": made.train_cpu_s,
        "generate_cpu_s": made.generate_cpu_s,
        "judge_cpu_s": judged,
        "wall_s": time.time() - begun,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": settings.threads or torch.get_num_threads(),
        "versions": {
            "medvae": metadata.version("medvae-dp"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "notes": dict(made.notes),
    }
    write(settings.out / "cells" / f"{cell.name}.json", result)
    return result


def write(path: Path, value: dict[str, Any]) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def read_cells(out: Path) -> Iterator[dict[str, Any]]:
    """Yield the finished cells of a results folder."""
    for path in sorted((out / "cells").glob("*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("schema") == SCHEMA:
            yield value
