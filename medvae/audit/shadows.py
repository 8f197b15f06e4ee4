"""Shadow models: who each of them sees, and how they are trained, stored and resumed.

Shadows train on members and held-out patients by the recipe of the audited run. They charge no ledger: they are made
to attack, live in RUN/private alone, and what is computed from them is a private finding. (Were one released, it would
be a release of its own.)

Splits are repeated partitions into quarters, each class spread evenly: of four shadows in a row, every patient is left
out of equally many, so no scan is without models that never saw it. Each shadow is a file; a run that was killed goes
on after the last one. A shadow depends on its own number alone, so a higher tier takes over those of a lower one.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from medvae.errors import ConfigError
from medvae.types import Progress

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[Any]]

QUARTERS = 4


class Trainer(Protocol):
    """Trains one group of shadows. It must be picklable, for a cluster."""

    def __call__(self, numbers: Sequence[int], included: Bools) -> list[dict[str, npt.NDArray[Any]]]:
        """Train shadows of these numbers on the patients of their rows (K, P); return the arrays of each."""


@dataclass(frozen=True)
class Shadows:
    """What came of it. included: (S, P) of those that were trained; arrays: of each of them; words: for the report."""

    included: Bools
    arrays: Sequence[Arrays]
    asked: int
    failed: int
    resumed: int
    seconds: float
    words: str = ""

    def __len__(self) -> int:
        return len(self.arrays)


def splits(strata: Ints, share: float, count: int, seed: int) -> Bools:
    """Return who each of `count` shadows trains on, (count, P).

    strata: (P,) class of each patient; share: part of the patients a shadow sees, rounded to quarters, at least one
    and at most three. Row i depends on (seed, i) alone.
    """
    kept = min(QUARTERS - 1, max(1, round(QUARTERS * share)))
    rows = np.empty((count, len(strata)), dtype=bool)
    for start in range(0, count, QUARTERS):
        rng = np.random.default_rng([seed, 41, start])
        order = rng.permutation(len(strata))
        order = order[np.argsort(strata[order], kind="stable")]
        quarter = np.empty(len(strata), dtype=np.int64)
        quarter[order] = np.arange(len(strata)) % QUARTERS
        for i in range(start, min(start + QUARTERS, count)):
            rows[i] = (quarter + i) % QUARTERS < kept
    return rows


def run_shadows(
    trainer: Trainer,
    included: Bools,
    folder: Path | None,
    *,
    group: int = 1,
    cluster: str | None = None,
    progress: Progress | None = None,
) -> Shadows:
    """Train the shadows that `folder` does not hold yet, in groups, and return all.

    folder: named after everything that shadows depend on (see `folder_of`); None keeps nothing. cluster: address of a
    Ray cluster ("local": Ray on this machine). A shadow whose numbers are not finite counts as failed.
    """
    began = time.monotonic()
    done = {i: a for i in range(len(included)) if (a := _read(folder, i, included[i])) is not None}
    resumed, failed = len(done), 0
    missing = [i for i in range(len(included)) if i not in done]
    groups = [missing[i : i + group] for i in range(0, len(missing), group)]
    if progress is not None:
        progress(resumed, len(included))
    for numbers, results in _trained(trainer, groups, included, cluster):
        for i, arrays in zip(numbers, results, strict=True):
            if not arrays or not all(np.isfinite(a).all() for a in arrays.values()):
                failed += 1
                continue
            done[i] = arrays
            _write(folder, i, included[i], arrays)
        if progress is not None:
            progress(len(done) + failed, len(included))
    order = sorted(done)
    words = f"{failed} of {len(included)} shadow models failed and are left out" if failed else ""
    seconds = time.monotonic() - began
    return Shadows(included[order], [done[i] for i in order], len(included), failed, resumed, seconds, words)


def _trained(
    trainer: Trainer, groups: Sequence[Sequence[int]], included: Bools, cluster: str | None
) -> Iterator[tuple[Sequence[int], list[dict[str, npt.NDArray[Any]]]]]:
    if cluster is None or not groups:
        for numbers in groups:
            yield numbers, _attempt(trainer, numbers, included)
        return
    ray = _ray(cluster)
    shared = ray.put(trainer)
    work = ray.remote(_attempt)
    waiting = {work.remote(shared, numbers, included): numbers for numbers in groups}
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        try:
            found = ray.get(done)
        except ray.exceptions.RayError:
            raise ConfigError(
                "a machine of the cluster failed: install this medvae on each, then audit again"
            ) from None
        yield waiting.pop(done), found


def _attempt(trainer: Trainer, numbers: Sequence[int], included: Bools) -> list[dict[str, npt.NDArray[Any]]]:
    """Train one group; numbers that run away make failed shadows, and no failed audit."""
    try:
        return trainer(numbers, included[list(numbers)])
    except (ArithmeticError, np.linalg.LinAlgError):
        return [{} for _ in numbers]


def _ray(address: str) -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError("shadow models over a cluster need Ray: pip install 'medvae-dp[cluster]'") from None
    if not ray.is_initialized():
        options = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, logging_level="ERROR", log_to_driver=False, **options)
        except (ConnectionError, ValueError, RuntimeError):
            raise ConfigError(
                "no Ray cluster answers at the address given: start one, or leave --cluster out"
            ) from None
    return ray


def held(folder: Path | None, included: Bools) -> int:
    """Return how many of these shadows the folder holds already."""
    return sum(_read(folder, i, row) is not None for i, row in enumerate(included))


def folder_of(root: Path, facts: Mapping[str, Any]) -> Path | None:
    """Return the folder of the shadows that depend on these facts, made if need be; None where none can be written."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = root / digest
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return folder


def _path(folder: Path, number: int) -> Path:
    return folder / f"shadow-{number:04d}.npz"


def _write(folder: Path | None, number: int, included: Bools, arrays: Arrays) -> None:
    """Write a shadow under another name first: a file of the right name is whole."""
    if folder is None:
        return
    partial = folder / f".{os.getpid()}-{number}.npz"
    with partial.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **{"included": included, **arrays})
    os.replace(partial, _path(folder, number))


def _read(folder: Path | None, number: int, included: Bools) -> dict[str, npt.NDArray[Any]] | None:
    """Return a stored shadow, or None where there is none, it is torn, or it saw other patients."""
    if folder is None:
        return None
    try:
        with np.load(_path(folder, number), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    seen = arrays.pop("included", None)
    return arrays if seen is not None and np.array_equal(seen, included) else None
