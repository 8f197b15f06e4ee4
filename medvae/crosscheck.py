"""A second accountant: epsilon by Opacus's PRV, to be compared with the PLD that a claim rests on.

PRV (Gopi, Lee & Wutschitz 2021, "Numerical Composition of Differential Privacy") and PLD are independent numerical
methods, by independent authors, for the same quantity. Compared are the two upper bounds: the PLD's pessimistic
epsilon, and PRV's estimate plus its own error bound, which is held at 0.2 % of epsilon (at 0.0001 for the smallest).
Opacus's GDP accountant underestimates epsilon and is never used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medvae.dp.accounting import canonical, check_delta_range, pld_epsilon
from medvae.errors import MedvaeError
from medvae.types import Mechanism

RELATIVE_ERROR = 2e-3
SMALLEST_ERROR = 1e-4  # a finer mesh would take gigabytes
_COARSE_ERROR = 0.1


class Agreement(NamedTuple):
    """Two accountants' epsilons at one delta, and whether they differ by no more than was allowed."""

    pld: float
    prv: float
    ok: bool


def agree(mechanisms: Sequence[Mechanism], delta: float, tolerance: float = 0.01) -> Agreement:
    """Compare both accountants; ok where |PLD - PRV| <= max(tolerance * PLD, 0.0002), or where both say infinite."""
    pld, prv = pld_epsilon(mechanisms, delta), prv_epsilon(mechanisms, delta)
    if not math.isfinite(pld):
        return Agreement(pld, prv, pld == prv)
    return Agreement(pld, prv, abs(pld - prv) <= max(tolerance * pld, 2 * SMALLEST_ERROR))


def prv_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return PRV's upper bound of epsilon for the composition at `delta`; infinite where a noise multiplier is 0.

    Unsampled Gaussian mechanisms enter with sample rate 1, for which Opacus's formulas are exact. Raises MedvaeError
    where PRV's own numerics give up.
    """
    check_delta_range(delta)
    key = canonical(mechanisms)
    if not key:
        return 0.0
    if any(noise == 0 for noise, _, _ in key):
        return math.inf
    error = _COARSE_ERROR
    bound = _upper_bound(key, delta, error)
    while error > max(1.5 * RELATIVE_ERROR * bound, SMALLEST_ERROR):
        error = max(RELATIVE_ERROR * bound, SMALLEST_ERROR)
        bound = _upper_bound(key, delta, error)
    return bound


def _upper_bound(key: Sequence[tuple[float, float, int]], delta: float, error: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(key)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta, eps_error=error))
    except (RuntimeError, ValueError) as problem:
        raise MedvaeError(f"the PRV accountant gave up on this plan ({problem}): change steps or sample rate") from None
