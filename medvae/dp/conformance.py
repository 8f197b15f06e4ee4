"""Whether a mechanism did what its claim says, from coordinates that only made-up patients use.

A canary that is left out leaves its coordinates to the noise alone, so T steps of m of them are T x m draws of the
noise as it was really added. One that takes part shows how long a clipped contribution really is, and how often it
was drawn. Everything is kept as sufficient statistics: small, public, and enough to repeat every test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.dp.onerun import Bools, Floats, log_ratio
from medvae.types import Mechanism

# Bins of equal probability for the shape of the noise.
BINS = 16
# Tests of chance that `answers` makes of a mechanism, at most.
ANSWERS = 9
# The clip keeps this margin for rounding, so a signal may be so much short of 1, and no test sees it.
SIGNAL_SLACK = 2e-5

_ARRAYS = ("scores", "sums", "drawn", "bins", "totals")


@dataclass(frozen=True)
class Answer:
    """One test of a claim: what was found, in words."""

    name: str
    ok: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form used in canary.json."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


class Watch:
    """Sees every noised step of one mechanism on the canaries' coordinates, and keeps what the tests need.

    coins: (m,), True for canaries that are in the sampled population. coordinates: how many each canary has; its unit
    vector has the same part in each, so their sum over sqrt(coordinates) is the one number that tells most.
    """

    def __init__(self, coins: Bools, mechanism: Mechanism, coordinates: int = 1) -> None:
        self.coins, self.mechanism, self.coordinates = coins, mechanism, coordinates
        self.scores = np.zeros(len(coins))
        self.sums = np.zeros((coordinates, int(np.sum(~coins))))
        self.drawn = np.zeros(len(coins))
        self.bins = np.zeros(BINS)
        # steps; sum and sum of squares of the noise; sum and number of signals; squares, step by step, of the number
        # of draws and of the sum of the noise
        self.totals = np.zeros(7)

    def see(self, noised: Floats, drawn: Bools) -> None:
        """Note one step: noised sums (coordinates, m) in units of the clip, and which canaries were drawn (m,)."""
        from scipy.special import ndtr

        sigma = self.mechanism.noise_multiplier
        together = noised.sum(0) / math.sqrt(self.coordinates)
        self.scores += log_ratio(together, sigma, self.mechanism.sample_rate)
        noise, took = noised[:, ~self.coins], int(drawn.sum())
        self.sums += noise
        places = np.nan_to_num(ndtr(noise / sigma)).ravel() * BINS
        self.bins += np.bincount(np.minimum(places.astype(np.int64), BINS - 1), minlength=BINS)
        self.drawn += drawn
        self.totals += (1, noise.sum(), np.square(noise).sum(), together[drawn].sum(), took, took**2, noise.sum() ** 2)

    def state(self) -> dict[str, Floats]:
        """Return all that was noted, for a checkpoint."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def restore(self, state: Mapping[str, Floats]) -> None:
        """Go on from a checkpoint's state."""
        for name in _ARRAYS:
            kept = np.asarray(state[name], dtype=np.float64)
            setattr(self, name, kept.reshape(getattr(self, name).shape).copy())

    def record(self) -> dict[str, Any]:
        """Return the sufficient statistics as canary.json holds them (the scores stand elsewhere in it)."""
        steps, total, squares, signal, took, by_step, together = (float(x) for x in self.totals)
        return {
            "mechanism": self.mechanism.name,
            "steps": int(steps),
            "noise": {
                "coordinates": int(self.sums.size),
                "sum": total,
                "squares": squares,
                "squares_by_coordinate": float(np.square(self.sums).sum()),
                "squares_by_step": together,
                "bins": [int(n) for n in self.bins],
            },
            "signal": {"n": int(took), "sum": signal},
            "draws": {
                "total": int(took),
                "squares_by_canary": int(np.square(self.drawn[self.coins]).sum()),
                "squares_by_step": int(by_step),
            },
        }


def answers(record: Mapping[str, Any], mechanism: Mechanism, included: int, out: int, level: float) -> list[Answer]:
    """Test one mechanism's record against its claim; each test rejects a correct build with probability `level`.

    included, out: how many canaries took part and how many did not. The squares of draws are tested by a normal
    or chi-square approximation, and so is the shape; the others are exact.
    """
    steps = int(record["steps"])
    found = [
        Answer("steps", steps == mechanism.count, f"{steps} noised steps were seen, {mechanism.count} are claimed"),
    ]
    if out and steps:
        found += _noise(record["noise"], mechanism, steps, out, level)
    if included and steps:
        found += _signal(record["signal"], mechanism, level)
        found += _draws(record["draws"], mechanism, steps, included, level)
    return [Answer(f"{a.name} of {mechanism.name}", bool(a.ok), a.detail) for a in found]


def noise_interval(record: Mapping[str, Any], mechanism: Mechanism, confidence: float) -> tuple[float, float, float]:
    """Return the noise found over the noise claimed: estimate and exact interval (chi-square)."""
    from scipy.stats import chi2

    noise = record["noise"]
    n = int(noise["coordinates"]) * int(record["steps"])
    ratio = float(noise["squares"]) / mechanism.noise_multiplier**2
    tail = (1 - confidence) / 2
    low, high = ratio / chi2.ppf(1 - tail, n), ratio / chi2.ppf(tail, n)
    return math.sqrt(ratio / n), math.sqrt(low), math.sqrt(high)


def _noise(noise: Mapping[str, Any], mechanism: Mechanism, steps: int, out: int, level: float) -> list[Answer]:
    from scipy.stats import chi2, norm

    sigma, width = mechanism.noise_multiplier, int(noise["coordinates"])
    n, ratio = width * steps, float(noise["squares"]) / sigma**2
    whole = width > 0 and width % out == 0
    bins, expected = np.asarray(noise["bins"], dtype=np.float64), width * steps / BINS
    mean = float(noise["sum"]) / (sigma * math.sqrt(n)) if n else math.inf
    spread = float(noise["squares_by_coordinate"]) / (sigma**2 * steps)
    together = float(noise["squares_by_step"]) / (sigma**2 * width) if width else math.inf
    shape = float(np.sum((bins - expected) ** 2) / expected) if n else math.inf
    even = len(bins) == BINS and bins.sum() == n
    found = [
        Answer(
            "noise",
            whole and two_sided(chi2, ratio, n, level),
            f"standard deviation {math.sqrt(ratio / n):.5g} of the claim's, from {n} draws" if n else "never seen",
        ),
        Answer("mean of the noise", abs(mean) <= norm.isf(level / 2), f"{mean:+.2f} standard errors from 0"),
    ]
    if expected >= 20:
        ok = even and bool(shape <= chi2.isf(level, BINS - 1))
        found.append(Answer("shape of the noise", ok, f"chi-square {shape:.1f} on {BINS - 1} degrees of freedom"))
    detail = f"sums of a step vary {together / steps:.4g} times as much as independent noise would, over {steps} steps"
    found.append(Answer("independence of the noise", two_sided(chi2, together, steps, level), detail))
    if steps > 1:
        detail = f"sums over steps vary {spread / width:.4g} times as much as fresh noise would, on {width} coordinates"
        found.append(Answer("freshness of the noise", two_sided(chi2, spread, width, level), detail))
    return found


def _signal(signal: Mapping[str, Any], mechanism: Mechanism, level: float) -> list[Answer]:
    from scipy.stats import norm

    n = int(signal["n"])
    if n == 0:
        return []
    length = float(signal["sum"]) / n
    slack = SIGNAL_SLACK + norm.isf(level / 2) * mechanism.noise_multiplier / math.sqrt(n)
    detail = f"{length:.4g} times the clip, from {n} draws of canaries (1 within {slack:.2g} is claimed)"
    return [Answer("length of a contribution", abs(length - 1) <= slack, detail)]


def _draws(draws: Mapping[str, Any], mechanism: Mechanism, steps: int, included: int, level: float) -> list[Answer]:
    from scipy.stats import binom, chi2, norm

    q, total, trials = mechanism.sample_rate, int(draws["total"]), steps * included
    tail = 2 * min(float(binom.cdf(total, trials, q)), float(binom.sf(total - 1, trials, q)))
    found = [Answer("sample rate", tail >= level, f"{total / trials:.5g} found, {q:.5g} claimed")]
    if q >= 1 or steps == 1:
        return found
    for name, key, groups, size in (
        ("spread of draws over canaries", "squares_by_canary", included, steps),
        ("spread of draws over steps", "squares_by_step", steps, included),
    ):
        if size * q * (1 - q) < 0.5 or groups * size * q < 50:
            continue  # too few draws for the normal approximation
        # Around the claimed mean, so that the sum over groups has a known mean and variance for binomial draws.
        centred = float(draws[key]) - 2 * size * q * total + groups * (size * q) ** 2
        unit = size * q * (1 - q)
        if unit >= 10:  # each group's number of draws is near a normal one, so its squares are a chi-square
            detail = f"{centred / unit / groups:.4g} of what independent draws have"
            found.append(Answer(name, two_sided(chi2, centred / unit, groups, level), detail))
            continue
        sd = math.sqrt(groups * (2 + (1 - 6 * q * (1 - q)) / unit))
        z = (centred / unit - groups) / sd
        detail = f"{centred / unit / groups:.4g} of what independent draws have"
        found.append(Answer(name, abs(z) <= norm.isf(level / 2) * 1.25, detail))
    return found


def two_sided(law: Any, value: float, freedom: float, level: float) -> bool:
    """Whether a value lies between the two tails of a law of so many degrees of freedom, `level` together."""
    return bool(freedom > 0 and 2 * min(law.cdf(value, freedom), law.sf(value, freedom)) >= level)


def is_number(value: npt.ArrayLike) -> bool:
    """Whether all of it is finite."""
    return bool(np.all(np.isfinite(np.asarray(value, dtype=np.float64))))
