"""Scans to add to one's own: synthetic ones of rare classes, or of sparse stretches of a covariate, until all are even.

How many are made of each follows the true counts of the training split, so the result is private although each scan of
it is not: it is for training at home. For sharing, `medvae release --conditions TABLE` takes a public table.

A judge that sees made-up scans in one class only learns to tell made-up from real. `each` therefore makes as many of
every class, to be used beside real scans that are weighed evenly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medvae.audit.material import Ints
from medvae.config_latent import AugmentConfig
from medvae.errors import ConfigError
from medvae.latent.case import open_case
from medvae.latent.folder import private_folder, write_summary
from medvae.synth.sample import generate, spread_conditions
from medvae.synth.store import read_release
from medvae.synth.write_nifti import write_nifti
from medvae.synth.write_npz import write_npz
from medvae.synth.write_png import write_png
from medvae.types import Condition, ConditionValue, FloatArray, Progress

WRITERS = {"nifti": write_nifti, "png": write_png, "npz": write_npz}


def augment_cohort(
    run: Path, cohort: Path, out: Path, config: AugmentConfig, progress: Progress | None = None
) -> dict[str, Any]:
    """Write OUT/npz (or another format) with synthetic scans that even out one condition; return augment.json.

    Raises ConfigError for a condition that the model does not have, or where it is even already.
    """
    case = open_case(run, cohort)
    chosen = _condition(config.condition, case.store.space.conditions)
    encoded = case.store.condition[case.store.rows(case.store.patients("train"))]
    bins = _bins(chosen, encoded, case.store.space.conditions, config.bins)
    have = np.bincount(bins, minlength=_count(chosen, config.bins))
    lacking = deficits(have, config.most)
    if config.each is not None:
        lacking = np.full(len(have), config.each, dtype=np.int64)
        if lacking.sum() > config.most:
            raise ConfigError(f"{config.each} each of {len(have)} groups is more than {config.most}: raise --most")
    if not lacking.sum():
        raise ConfigError(f"the condition {chosen.name!r} is even already: there is nothing to add")
    rng = np.random.default_rng(config.seed)
    rows = spread_conditions(case.store.space, int(lacking.sum()), config.seed)
    values = [v for index, count in enumerate(lacking) for v in _values(chosen, index, int(count), config.bins, rng)]
    rows = [{**row, chosen.name: value} for row, value in zip(rows, values, strict=True)]
    made = generate(read_release(run / "model"), rows, config.seed, progress)
    with private_folder(out) as folder:
        for kind in dict.fromkeys(config.formats):
            (folder / kind).mkdir()
            WRITERS[kind](made, folder / kind)
        facts = {
            "condition": chosen.name,
            "bins": [_name(chosen, index, config.bins) for index in range(len(have))],
            "had": have.tolist(),
            "added": lacking.tolist(),
            "scans": len(made),
        }
        return write_summary(folder, "augment", facts)


def deficits(have: Ints, most: int) -> Ints:
    """Return how many to add to each group so that all are as large as the largest, or as even as `most` allows.

    With too few to go round the smallest groups are filled first, to one common level.
    """
    wanted = have.max() - have
    if wanted.sum() > most:
        levels = range(int(have.min()), int(have.max()) + 1)
        level = max(v for v in levels if np.maximum(v - have, 0).sum() <= most)
        wanted = np.maximum(level - have, 0)
    return np.asarray(wanted, dtype=np.int64)


def _condition(name: str | None, conditions: tuple[Condition, ...]) -> Condition:
    found = [c for c in conditions if name is None or c.name == name]
    if not found:
        known = ", ".join(c.name for c in conditions) or "none"
        raise ConfigError(f"the model has no condition {name!r} to even out: it knows {known}")
    return found[0]


def _count(condition: Condition, bins: int) -> int:
    return len(condition.classes) if condition.kind == "class" else bins


def _bins(condition: Condition, encoded: FloatArray, conditions: tuple[Condition, ...], bins: int) -> Ints:
    """Return the class or the bin (N,) of each encoded row (N, K)."""
    start = sum(c.width for c in conditions[: conditions.index(condition)])
    if condition.kind == "class":
        return np.asarray(encoded[:, start : start + condition.width].argmax(1), dtype=np.int64)
    return np.clip(((encoded[:, start] + 1) / 2 * bins).astype(np.int64), 0, bins - 1)


def _values(condition: Condition, index: int, count: int, bins: int, rng: np.random.Generator) -> list[ConditionValue]:
    if condition.kind == "class":
        return [condition.classes[index]] * count
    low, high = condition.range or (0.0, 1.0)
    width = (high - low) / bins
    return [round(float(low + width * (index + u)), 3) for u in rng.random(count)]


def _name(condition: Condition, index: int, bins: int) -> str:
    if condition.kind == "class":
        return condition.classes[index]
    low, high = condition.range or (0.0, 1.0)
    width = (high - low) / bins
    return f"{low + width * index:g} to {low + width * (index + 1):g}"
