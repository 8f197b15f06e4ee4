"""Walks of patterned patients: made-up scans on the model's own path, whose true sums are known beforehand.

A walk takes made-up patients through the code that takes patients, by themselves and with noise of its own. What comes
out is compared with a sum that other code computed, one patient at a time, from the patterns as they were made.
Two things are kept of it: how far the clipped sum is from the true one, and the noise that was then added to each of
the model's own parameters. No patient is in a walk; the weights it is made at are a private model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medvae.dp.conformance import Answer, two_sided
from medvae.dp.onerun import Floats
from medvae.types import Mechanism

# Tests of chance that `walk_answers` makes of a mechanism, at most; whether a sum is the true one is none of chance.
WALK_ANSWERS = 2
# How far a sum may be from the true one, in units of the lengths of all contributions: for float32, and for bfloat16.
TOLERANCE, COARSE_TOLERANCE = 1e-3, 5e-2
# Numbers that the noise of a walk is folded into, to see over walks whether it is fresh.
FOLDS = 1024

_ARRAYS = ("totals", "squares", "sizes", "folds")


class WalkWatch:
    """Keeps what walks of one mechanism show, as sufficient statistics.

    sizes: numbers of noise in each part that is watched by itself (a parameter of the model, or a whole release).
    """

    def __init__(self, mechanism: Mechanism, tolerance: float = TOLERANCE) -> None:
        self.mechanism, self.tolerance = mechanism, tolerance
        self.totals = np.zeros(4)  # walks, patients, how many of them were clipped, the largest gap
        self.squares, self.sizes, self.folds = np.zeros(0), np.zeros(0), np.zeros(FOLDS)

    def see(self, gap: float, clipped: int, patients: int, noise: Sequence[Floats]) -> None:
        """Note one walk.

        gap: |sum - true sum| over the sum of the contributions' lengths; clipped: how many of the `patients` were
        longer than the clip; noise: one array a part, in units of the clip.
        """
        walks, seen, cut, worst = self.totals
        gap = gap if math.isfinite(gap) else 1e9
        self.totals = np.asarray([walks + 1, seen + patients, cut + clipped, max(worst, gap)])
        squares = np.asarray([float(np.square(part).sum()) for part in noise])
        self.squares = squares if not len(self.squares) else self.squares + squares
        self.sizes = np.asarray([float(part.size) for part in noise])
        flat = np.concatenate([part.ravel() for part in noise])
        self.folds = self.folds + np.bincount(np.arange(len(flat)) % FOLDS, weights=flat, minlength=FOLDS)

    def state(self) -> dict[str, Floats]:
        """Return all that was noted, for a checkpoint."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def restore(self, state: Mapping[str, Floats]) -> None:
        """Go on from a checkpoint's state; raises KeyError or ValueError where it is none of a walk."""
        arrays = {name: np.asarray(state[name], dtype=np.float64).copy() for name in _ARRAYS}
        if arrays["totals"].shape != (4,) or arrays["folds"].shape != (FOLDS,):
            raise ValueError("the state of another kind of walk")
        for name, kept in arrays.items():
            setattr(self, name, kept)

    def record(self) -> dict[str, Any]:
        """Return what canary.json holds."""
        walks, patients, clipped, gap = (float(x) for x in self.totals)
        return {
            "mechanism": self.mechanism.name,
            "walks": int(walks),
            "patients": int(patients),
            "clipped": int(clipped),
            "tolerance": self.tolerance,
            "gap": float(f"{gap:.2g}"),
            "sizes": [int(n) for n in self.sizes],
            "squares": [float(f"{s:.9g}") for s in np.clip(self.squares, 0, 1e30)],
            "folded_squares": float(f"{float(np.square(np.clip(self.folds, -1e15, 1e15)).sum()):.9g}"),
        }


def walk_answers(record: Mapping[str, Any], mechanism: Mechanism, walks: int, level: float) -> list[Answer]:
    """Test one mechanism's walks; a test of chance rejects a correct build with probability at most `level`.

    walks: how many were registered. The noise of every part is tested by itself (chi-square, Bonferroni).
    """
    from scipy.stats import chi2

    seen, sigma = int(record["walks"]), mechanism.noise_multiplier
    found = [Answer("walks of patterned patients", seen == walks, f"{seen} were made, {walks} were registered")]
    if not seen:
        return _named(found, mechanism)
    gap, tolerance = float(record["gap"]), float(record["tolerance"])
    patients, clipped = int(record["patients"]), int(record["clipped"])
    detail = (
        f"largest error {gap:.2g} of the contributions' lengths ({tolerance:g} is rounding), {patients} contributions "
        f"of made-up patients, {clipped} of them longer than the clip"
    )
    honest = tolerance in (TOLERANCE, COARSE_TOLERANCE)
    found.append(Answer("clipped sums of patterned patients", honest and gap <= tolerance, detail))
    sizes, squares = np.asarray(record["sizes"], dtype=np.float64), np.asarray(record["squares"], dtype=np.float64)
    whole = len(sizes) == len(squares) > 0 and bool(np.all(sizes > 0))
    if not whole:
        return _named([*found, Answer("noise of walks", False, "it was never seen")], mechanism)
    ratios = squares / sigma**2 / (sizes * seen)
    fits = [two_sided(chi2, s / sigma**2, n * seen, level / len(sizes)) for s, n in zip(squares, sizes, strict=True)]
    worst = int(np.argmax(np.abs(np.log(np.maximum(ratios, 1e-12))) * np.sqrt(sizes)))
    size = math.sqrt(float(squares.sum()) / float(sizes.sum()) / seen) / sigma
    detail = (
        f"standard deviation {size:.5g} of the claim's over {len(sizes)} parts, {int(sizes.sum())} numbers in all; "
        f"{math.sqrt(ratios[worst]):.4g} in the part farthest off"
    )
    found.append(Answer("noise of walks", all(fits), detail))
    if seen > 1:
        spread = float(record["folded_squares"]) / (sigma**2 * seen)
        counts = np.bincount(np.arange(int(sizes.sum())) % FOLDS, minlength=FOLDS)
        low, high = _folded_bounds(counts, level)
        detail = f"sums over walks vary {spread / max(1, int(sizes.sum())):.4g} times as much as fresh noise would"
        found.append(Answer("freshness of the noise of walks", low <= spread <= high, detail))
    return _named(found, mechanism)


def _folded_bounds(counts: Any, level: float) -> tuple[float, float]:
    """Return bounds of sum_j c_j X_j^2 for independent standard normals X_j, by Satterthwaite's chi-square.

    The counts c_j differ by one at most, so it is a chi-square but for parts shorter than FOLDS, where it is exact too.
    """
    from scipy.stats import chi2

    c = np.asarray(counts, dtype=np.float64)
    scale = float(np.square(c).sum() / c.sum())
    freedom = float(c.sum() ** 2 / np.square(c).sum())
    return scale * float(chi2.ppf(level / 2, freedom)), scale * float(chi2.isf(level / 2, freedom))


def _named(found: Sequence[Answer], mechanism: Mechanism) -> list[Answer]:
    return [Answer(f"{a.name} of {mechanism.name}", bool(a.ok), a.detail) for a in found]
