"""From mechanisms to what an attacker can do: the trade-off curve f, its bounds, and plain words.

f(a) is the least rate of misses that any test for "was this patient in the cohort?" can have at a rate of false
accusations a (Dong, Roth & Su 2022, "Gaussian Differential Privacy"). Every (epsilon, delta) that holds gives two
lines under f, and together they are f (Wasserman & Zhou 2010; Dong et al., proposition 2.5):
f(a) = max over epsilon of max(0, 1 - delta - e^epsilon a, e^-epsilon (1 - delta - a)).
delta(epsilon) is the PLD's, the worse of adding and removing, so f is a bound for an attacker in either direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from medvae.dp.accounting import (
    CLAIM_CELLS,
    MAX_EXPONENT,
    canonical,
    delta_curve,
    gaussian_deltas,
    gaussian_epsilon,
    pld_epsilon,
)
from medvae.errors import ConfigError
from medvae.types import Mechanism

_Array = npt.NDArray[np.float64]

GRID_POINTS = 2001
TAIL_DELTAS = (1e-12, 1e-10, 1e-8, 1e-6)
GDP_FLOOR = 1e-9
WEAK_EPSILON = 5.0
BARE_EPSILON = 20.0
STRONG_EPSILON = 1.0


def miss_bound(mechanisms: Sequence[Mechanism], fpr: npt.ArrayLike, cells: int = CLAIM_CELLS) -> _Array:
    """Return f at each rate of false accusations: no attacker misses fewer members. Shapes (...) to (...).

    cells: of the accountant's grid; fewer are faster and give a weaker bound.
    """
    a = np.asarray(fpr, dtype=np.float64)
    if not np.all((a >= 0) & (a <= 1)):
        raise ConfigError("a rate of false accusations is out of range: give numbers from 0 to 1")
    epsilons, deltas = _curve(tuple(mechanisms), cells)
    flat = a.reshape(-1, 1)
    rise = np.exp(np.minimum(epsilons, MAX_EXPONENT))
    lines = np.maximum(1 - deltas - rise * flat, np.exp(-epsilons) * (1 - deltas - flat))
    return np.asarray(np.maximum(0.0, lines.max(axis=1)).reshape(a.shape))


def tpr_bound(mechanisms: Sequence[Mechanism], fpr: npt.ArrayLike) -> _Array:
    """Return 1 - f: no attacker with that rate of false accusations names more than this part of the members."""
    return np.asarray(1.0 - miss_bound(mechanisms, fpr))


def claim_tpr_bound(epsilon: float, delta: float, fpr: npt.ArrayLike) -> _Array:
    """Return the weaker bound from the bare (epsilon, delta), by the two lines that one such pair gives."""
    a = np.asarray(fpr, dtype=np.float64)
    upper = 1 - math.exp(-epsilon) * (1 - delta - a)
    return np.asarray(np.minimum(np.minimum(1.0, upper), delta + math.exp(min(epsilon, MAX_EXPONENT)) * a))


def advantage(mechanisms: Sequence[Mechanism], cells: int = CLAIM_CELLS) -> float:
    """Return the largest TPR - FPR of any membership attack: delta at epsilon 0, the total variation distance."""
    return float(delta_curve(mechanisms, np.asarray([0.0]), cells)[0])


def reid_bound(mechanisms: Sequence[Mechanism], kappa: float, cells: int = CLAIM_CELLS) -> float:
    """Return 1 - f(kappa): the bound on success of reconstruction or attribute inference.

    kappa: the attacker's success without the release, by the best guess from what is known anyway (Hayes et al.
    2023, "Bounding Training Data Reconstruction in DP-SGD", for the reduction to a test).
    """
    return 1.0 - float(miss_bound(mechanisms, kappa, cells))


def gdp_mu(mechanisms: Sequence[Mechanism]) -> float:
    """Return the smallest mu of which the Gaussian trade-off lies below f, down to deltas of 1e-9.

    A description of the curve in one number, exact for Gaussian mechanisms. Beyond that tail a subsampled Gaussian
    is no mu-GDP, so bounds are computed from f itself and never from mu. Infinite where a mechanism adds no noise.
    """
    epsilons, deltas = _curve(tuple(mechanisms), CLAIM_CELLS)
    if deltas[0] >= 1:
        return math.inf
    kept = deltas >= GDP_FLOOR
    if not kept.any():
        return 0.0
    low, high = np.full(int(kept.sum()), -14.0), np.full(int(kept.sum()), 14.0)
    for _ in range(50):
        middle = (low + high) / 2
        enough = gaussian_deltas(np.exp(middle), epsilons[kept]) >= deltas[kept]
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return float(np.exp(high.max()))


def noise_for_advantage(max_advantage: float) -> float:
    """Return the noise multiplier of the Gaussian mechanism whose advantage 2 Phi(mu/2) - 1 is max_advantage."""
    from scipy.special import ndtri

    if not 0 < max_advantage < 1:
        raise ConfigError(f"the largest advantage is {max_advantage}: give a number between 0 and 1")
    return 1 / (2 * float(ndtri((1 + max_advantage) / 2)))


def noise_for_reid(max_risk: float, baseline: float) -> float:
    """Return the noise multiplier of the Gaussian mechanism with 1 - f(baseline) = max_risk."""
    from scipy.special import ndtri

    if not 0 < baseline < max_risk < 1:
        raise ConfigError(f"the largest risk is {max_risk} at a baseline of {baseline}: give 0 < baseline < risk < 1")
    return 1 / float(ndtri(max_risk) - ndtri(baseline))


def epsilon_for_advantage(max_advantage: float, delta: float) -> float:
    """Return epsilon at `delta` of the Gaussian mechanism whose advantage is max_advantage.

    For a plan with DP-SGD, whose curve has another shape, `dp.goal` calibrates through the mechanisms themselves.
    """
    return gaussian_epsilon(noise_for_advantage(max_advantage), delta)


def epsilon_for_reid(max_risk: float, baseline: float, delta: float) -> float:
    """Return epsilon at `delta` of the Gaussian mechanism with 1 - f(baseline) = max_risk; else as above."""
    return gaussian_epsilon(noise_for_reid(max_risk, baseline), delta)


def in_short(epsilon: float | None, mechanisms: Sequence[Mechanism]) -> str:
    """Return the one line that stands beside an epsilon wherever it is printed; both bounds rounded up."""
    if epsilon is None or not math.isfinite(epsilon):
        return "nothing is proven: no noise protects the patients"
    named = _up(1000 * float(tpr_bound(mechanisms, 1e-3)))
    right = _up(100 * (1 + advantage(mechanisms)) / 2)
    return (
        f"at one wrong accusation in 1,000, at most {named} of 1,000 patients are named rightly; "
        f"'in or not' is guessed right at most {right} % of the time (a coin: 50 %); {_grade(epsilon)} promise"
    )


def plain_words(epsilon: float, delta: float, mechanisms: Sequence[Mechanism]) -> list[str]:
    """Return what (epsilon, delta) and the whole curve mean, as sentences for a lay reader; every bound rounded up."""
    if not math.isfinite(epsilon):
        return [
            "No noise protects this model: nothing is proven about what it tells of a patient; it may not be released."
        ]
    named = _up(1000 * float(tpr_bound(mechanisms, 1e-3)))
    right = _up(100 * (1 + advantage(mechanisms)) / 2)
    guessed = _up(100 * reid_bound(mechanisms, 0.01))
    return [
        f"The promise is epsilon {epsilon:.4g} at delta {delta:.2g}, for all scans of a patient together "
        "(unit patient, add-remove neighbours, by PLD).",
        f"If an attacker accepts one wrong accusation in 1,000, at most {named} of 1,000 patients can be named rightly "
        "as members of the cohort.",
        f"An attacker who must say of one person 'in the cohort' or 'not' is right at most {right} % of the time; "
        "a coin is right 50 % of the time.",
        f"A guess about a patient that would be right 1 time in 100 without this release is right at most {guessed} "
        "times in 100 with it.",
        _strength(epsilon),
    ]


def _strength(epsilon: float) -> str:
    told = {
        "hardly a": "promise at all: the proof limits little, and only the attacks tell more.",
        "a weak": "promise: the proof alone does not exclude that some patients are recognised.",
        "a moderate": "promise: a patient's presence stays doubtful, but not hidden.",
        "a strong": "promise: with or without a patient, the release looks nearly the same.",
    }
    grade = _grade(epsilon)
    return f"Epsilon {epsilon:.3g} is {grade} {told[grade]}"


def _grade(epsilon: float) -> str:
    if epsilon > BARE_EPSILON:
        return "hardly a"
    if epsilon > WEAK_EPSILON:
        return "a weak"
    return "a moderate" if epsilon > STRONG_EPSILON else "a strong"


def _up(value: float) -> str:
    """Round up to two significant digits below 10 and to whole numbers above, so that a bound stays a bound."""
    digits = 1 if value < 10 else 0
    scaled = math.ceil(round(value * 10**digits, 6)) / 10**digits
    return f"{scaled:.{digits}f}"


@lru_cache(maxsize=32)
def _curve(mechanisms: tuple[Mechanism, ...], cells: int) -> tuple[_Array, _Array]:
    """Return epsilons (K,) from 0 to where delta vanishes, and delta at each."""
    key = canonical(mechanisms)
    tails = (pld_epsilon(mechanisms, delta, cells) for delta in TAIL_DELTAS) if key else iter([1.0])
    end = next((e for e in tails if math.isfinite(e)), None)
    if end is None:
        return np.zeros(1), np.ones(1)
    epsilons = np.linspace(0.0, max(end, 1e-3), GRID_POINTS)
    return epsilons, delta_curve(mechanisms, epsilons, cells)
