"""A thinned age range, filled up with made-up scans: error of a judge of age on held-out scans, against the usual
remedies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from measures.augmentation import turned
from measures.cells import Case, Measure, Work
from measures.data import Images, heads, write_folder
from measures.training import fit, network
from medvae.audit.embedding import embed
from medvae.config import IngestConfig, build
from medvae.synth.phantom import AGE_RANGE
from medvae.synth.sample import generate
from medvae.vault.ingest import ingest

Floats = npt.NDArray[np.float64]
# Ages from THIN on are rare; below it there are COMMON scans, and the range is filled to their number a year.
THIN, COMMON, TESTED, SIDE = 70.0, 1000, 400, 32
FULL = round(COMMON * (AGE_RANGE[1] - THIN) / (THIN - AGE_RANGE[0]))
EVERY, EACH = "closed form, all ages", 1400
PENALTIES = np.logspace(0, 4, 9)


def run(case: Case, seed: int, work: Work) -> dict[str, float]:
    """Thin the old phantoms, fill them up as the case says, train a judge, test it on phantoms of every age."""
    share = float(case["rare"].rstrip(" %")) / 100
    images, ages = _thinned(seed, round(COMMON * share / (1 - share)))
    held, truth = heads(seed + 1000, TESTED, SIDE)
    added, added_ages = _added(case, seed, images, ages, work)
    judge = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
    judge.fit(embed(np.concatenate([images, added])), np.concatenate([ages, added_ages]))
    error = np.abs(judge.predict(embed(held)) - truth)
    old = truth >= THIN
    return {"years off, thinned ages": float(error[old].mean()), "years off, others": float(error[~old].mean())}


def _thinned(seed: int, rare: int) -> tuple[Images, Floats]:
    """Return COMMON phantoms younger than THIN and `rare` older ones, as 8-bit images hold them, and their ages."""
    images, ages = heads(seed, 2 * COMMON, SIDE)
    kept = np.concatenate([np.flatnonzero(ages < THIN)[:COMMON], np.flatnonzero(ages >= THIN)[:rare]])
    return (np.round(images[kept] * 255) / 255).astype(np.float32), ages[kept].astype(np.float64)


def _added(case: Case, seed: int, images: Images, ages: Floats, work: Work) -> tuple[Images, Floats]:
    old, rng = np.flatnonzero(ages >= THIN), np.random.default_rng(seed + 1)
    again = old[rng.integers(0, len(old), FULL - len(old))]
    if case["remedy"] == "none":
        return images[:0], ages[:0]
    if case["remedy"] == EVERY:
        made, wanted = _made(case, seed, images, ages, work, rng.uniform(*AGE_RANGE, EACH))
        return np.concatenate([images[again], made]), np.concatenate([ages[again], wanted])
    if case["remedy"] == "oversampling":
        return images[again], ages[again]
    if case["remedy"] == "shifts and turns":
        return turned(images[again], rng), ages[again]
    return _made(case, seed, images, ages, work, rng.uniform(THIN, AGE_RANGE[1], len(again)))


def _made(case: Case, seed: int, images: Images, ages: Floats, work: Work, wanted: Floats) -> tuple[Images, Floats]:
    folder = _cohort(case, seed, images, ages, work)
    recipe: dict[str, Any] = network(case["epsilon"], {}, COMMON) if case["remedy"] == "conditional VAE" else {}
    release = fit(folder, recipe, case["epsilon"], seed).release
    return generate(release, [{"age": float(age)} for age in wanted], seed).images, wanted


def _cohort(case: Case, seed: int, images: Images, ages: Floats, work: Work) -> Path:
    """Ingest the thinned phantoms as PNG with a table of ages."""
    name = f"thinned-age-{case['rare'].split()[0]}-{seed}"
    folder = work.out / "cohorts" / name
    if not folder.exists():
        source = work.out / "sources" / name
        write_folder(source, np.round(images * 255).astype(np.uint8), "age", [f"{age:.3f}" for age in ages])
        options: dict[str, Any] = {"conditions": (f"age={AGE_RANGE[0]:g}:{AGE_RANGE[1]:g}",), "holdout": 0.0}
        window = {"intensity": "window", "intensity_low": 0.0, "intensity_high": 255.0}
        ingest(source, folder, build(IngestConfig, shape=(SIDE, SIDE), **options, **window))
    return folder


REGRESSION = Measure(
    "regression",
    "An age range thinned to 2 % and 5 %",
    f"Head phantoms of {SIDE}x{SIDE} pixels, {COMMON:,} patients younger than {THIN:g} and as few older ones as the "
    f"share says; ages from {THIN:g} to {AGE_RANGE[1]:g} are filled up to as many a year as the others. The judge of "
    "age is a ridge regression on the shipped embedding, its penalty chosen on what it trains on. Mean absolute error "
    f"in years on {TESTED} other phantoms of every age. Closed form and network see the thinned phantoms alone. "
    f"All ages: oversampling, and beside it {EACH:,} made-up phantoms spread over all ages.",
    tuple(
        {"rare": rare, "remedy": remedy, "epsilon": epsilon}
        for rare in ("2 %", "5 %")
        for remedy, epsilon in (
            ("none", "none"),
            ("oversampling", "none"),
            ("shifts and turns", "none"),
            ("closed form", "none"),
            ("closed form", "8"),
            (EVERY, "none"),
            (EVERY, "8"),
            ("conditional VAE", "none"),
            ("conditional VAE", "8"),
        )
    ),
    run,
    digits=2,
)  # fmt: skip
