"""Privacy accounting by privacy loss distributions (PLD), for add/remove neighbours of the unit "patient".

Every figure comes from dp_accounting's `PLDAccountant` with pessimistic discretisation (connect-the-dots: Doroshenko
et al. 2022, "Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions"), so it bounds the
truth from above, and epsilon is then rounded up. The width of the grid follows from the mechanisms: the variance
that discretisation adds is at most `(width / rms loss)^2 / 4` of the total, 0.01 % at the width used for a claim.
An epsilon above a hundred thousand is no promise at all and is stated as infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.errors import ConfigError
from medvae.types import Mechanism

_Key = tuple[tuple[float, float, int], ...]  # (noise_multiplier, sample_rate, count)

CLAIM_CELLS = 50  # grid cells in one rms privacy loss of a step, for figures that are stated
SEARCH_CELLS = 8  # the same inside a search, whose result is then checked at CLAIM_CELLS
_MAX_RMS = 0.2  # so that a grid for a claim is never coarser than 1/256
_MAX_CELLS = 1e6
_MAX_LOSS = 1e5
MAX_EXPONENT = 700.0  # exp() of 710 is infinite in double precision
_EPSILON_DIGITS = 6
_SMALLEST_DELTA = 1e-12  # below it the rounding errors of the Fourier transform would decide


def pld_epsilon(mechanisms: Sequence[Mechanism], delta: float, cells: int = CLAIM_CELLS) -> float:
    """Return epsilon of the composition of all mechanisms at `delta`, rounded up to six decimals.

    Guarantee: the joint release of all mechanisms is (epsilon, delta)-DP under add/remove of one patient. Infinite
    where a noise multiplier is 0; 0.0 for no mechanism. cells: as in `delta_curve`; fewer give a larger epsilon.
    Raises ConfigError for values out of range.
    """
    check_delta_range(delta)
    return _epsilon(canonical(mechanisms), delta, cells)


def pld_delta(mechanisms: Sequence[Mechanism], epsilon: float) -> float:
    """Return the smallest delta known to hold at `epsilon`; 1.0 where a noise multiplier is 0."""
    if math.isnan(epsilon):
        raise ConfigError("epsilon is not a number: give a number above zero")
    return float(delta_curve(mechanisms, np.asarray([epsilon]))[0])


def delta_curve(
    mechanisms: Sequence[Mechanism], epsilons: npt.NDArray[np.float64], cells: int = CLAIM_CELLS
) -> npt.NDArray[np.float64]:
    """Return delta(epsilon) for an increasing array of epsilons (K,), the worse of adding and removing; shape (K,).

    cells: of the grid, in one rms privacy loss of a step; fewer are faster and err upwards.
    """
    key = canonical(mechanisms)
    if not key:
        return np.maximum(0.0, -np.expm1(np.asarray(epsilons, dtype=np.float64)))
    if _unnoised(key):
        return np.ones(len(epsilons))
    # Past the range of exp() the accountant answers 0 or no number; delta never rises, so an earlier one holds there.
    deltas = _accountant(key, cells).get_delta(np.minimum(epsilons, MAX_EXPONENT))
    return np.clip(np.asarray(deltas, dtype=np.float64), 0.0, 1.0)


def calibrate_noise(mechanisms: Callable[[float], Sequence[Mechanism]], epsilon: float, delta: float) -> float:
    """Return the smallest noise multiplier z, to 1e-3, with `pld_epsilon(mechanisms(z), delta) <= epsilon`.

    `mechanisms` maps z to all that is released; its privacy loss must fall as z grows. z is rounded up to five
    digits, so that the claim holds for the very number that is written down. 0.0 for an infinite epsilon.
    Raises ConfigError where no noise is enough, because the other mechanisms already cost more.
    """
    check_delta_range(delta)
    if math.isnan(epsilon) or epsilon <= 0:
        raise ConfigError(f"epsilon is {epsilon}: give a number above zero, or 'inf' to train without privacy")
    if math.isinf(epsilon):
        return 0.0

    def cost(charged: Sequence[Mechanism], cells: int) -> float:
        return _epsilon(canonical(charged), delta, cells)

    return smallest_noise(mechanisms, cost, epsilon, f"epsilon {epsilon:g}")


def smallest_noise(
    mechanisms: Callable[[float], Sequence[Mechanism]],
    cost: Callable[[Sequence[Mechanism], int], float],
    limit: float,
    words: str,
) -> float:
    """Return the smallest noise multiplier z, to 1e-3, with `cost(mechanisms(z), CLAIM_CELLS) <= limit`.

    cost: of a composition on a grid of so many cells; it falls as z grows, and errs upwards on a coarse grid.
    words: what is asked for, for the message. Raises ConfigError where no noise is enough or none is needed.
    """

    def excess(log_noise: float) -> float:
        return math.log(min(max(cost(mechanisms(math.exp(log_noise)), SEARCH_CELLS), 1e-9), 1e9) / limit)

    low, high = _bracket(excess, words)
    from scipy.optimize import brentq

    noise = _round_up(math.exp(brentq(excess, low, high, xtol=1e-4)))
    # The search grid is pessimistic, so its answer is at most slightly too large; walk the last steps on the fine one.
    while cost(mechanisms(noise), CLAIM_CELLS) > limit:
        noise = _round_up(noise * 1.0005)
    while cost(mechanisms(smaller := _round_up(noise * 0.9993)), CLAIM_CELLS) <= limit:
        noise = smaller
    return noise


def gaussian_noise_for(epsilon: float, delta: float) -> float:
    """Return the noise multiplier of one Gaussian mechanism that is exactly (epsilon, delta)-DP.

    Solves `gaussian_delta(s, epsilon) = delta` for s (Balle & Wang 2018, "Improving the Gaussian Mechanism for
    Differential Privacy", theorem 8).
    """
    check_delta_range(delta)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"epsilon is {epsilon}: give a finite number above zero")
    from scipy.optimize import brentq

    low, high = -1.0, 1.0
    while gaussian_delta(math.exp(low), epsilon) < delta:
        low -= 1.0
    while gaussian_delta(math.exp(high), epsilon) > delta:
        high += 1.0
    return math.exp(brentq(lambda x: gaussian_delta(math.exp(x), epsilon) - delta, low, high, xtol=1e-14))


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Return epsilon of one Gaussian mechanism in closed form, at least 0: the inverse of `gaussian_noise_for`."""
    check_delta_range(delta)
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise ConfigError(f"the noise multiplier is {noise_multiplier}: give a finite number above zero")
    if gaussian_delta(noise_multiplier, 0.0) <= delta:
        return 0.0
    from scipy.optimize import brentq

    high = 1.0
    while gaussian_delta(noise_multiplier, high) > delta:
        high *= 2
    return float(brentq(lambda e: gaussian_delta(noise_multiplier, e) - delta, 0.0, high, xtol=1e-12))


def gaussian_delta(noise_multiplier: float, epsilon: float) -> float:
    """Return delta of one Gaussian mechanism with noise s in closed form (Balle & Wang 2018, theorem 8).

    delta = Phi(1/(2s) - epsilon s) - e^epsilon Phi(-1/(2s) - epsilon s).
    """
    return float(gaussian_deltas(np.asarray(1 / noise_multiplier), np.asarray(epsilon)))


def gaussian_deltas(mu: npt.NDArray[np.float64], epsilon: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the closed-form delta for arrays of mu = 1/noise and epsilon that broadcast together."""
    from scipy.special import log_ndtr

    upper = log_ndtr(mu / 2 - epsilon / mu)
    lower = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return np.asarray(np.exp(upper) * -np.expm1(np.minimum(0.0, lower - upper)))


def dp_event(mechanisms: Sequence[Mechanism]) -> Any:
    """Return the `dp_accounting.DpEvent` of the composition, one event a distinct mechanism."""
    import dp_accounting

    return dp_accounting.ComposedDpEvent([_event(*part) for part in canonical(mechanisms)])


def canonical(mechanisms: Sequence[Mechanism]) -> _Key:
    """Return the composition as sorted (noise_multiplier, sample_rate, count), equal mechanisms merged.

    Unsampled Gaussian mechanisms compose exactly into one, of which 1/noise^2 is the sum of theirs (Dong, Roth & Su
    2022, corollary 3.3). Raises ConfigError for values out of range.
    """
    counts: dict[tuple[float, float], int] = {}
    precision = 0.0
    for mechanism in mechanisms:
        _validate(mechanism)
        noise, rate = float(mechanism.noise_multiplier), float(mechanism.sample_rate)
        if rate == 1.0 and noise > 0:
            precision += mechanism.count / noise**2
        else:
            counts[noise, rate] = counts.get((noise, rate), 0) + mechanism.count
    if precision:
        counts[precision**-0.5, 1.0] = 1
    return tuple(sorted((noise, rate, count) for (noise, rate), count in counts.items()))


def check_delta_range(delta: float) -> None:
    """Raise ConfigError unless delta is a number the accountants can work with."""
    if not _SMALLEST_DELTA <= delta < 1:
        raise ConfigError(
            f"delta is {delta:g}: give a number from {_SMALLEST_DELTA:g} to below 1 (and below 1/patients)"
        )


def _validate(mechanism: Mechanism) -> None:
    if not (math.isfinite(mechanism.noise_multiplier) and mechanism.noise_multiplier >= 0):
        raise ConfigError(
            f"the noise multiplier of {mechanism.name!r} is {mechanism.noise_multiplier}: give a number from 0 up"
        )
    if not 0 < mechanism.sample_rate <= 1:
        raise ConfigError(
            f"the sample rate of {mechanism.name!r} is {mechanism.sample_rate}: give a number above 0 and up to 1"
        )
    if mechanism.count != int(mechanism.count) or mechanism.count < 1:
        raise ConfigError(f"the count of {mechanism.name!r} is {mechanism.count}: give a whole number from 1 up")


def _unnoised(key: _Key) -> bool:
    return any(noise == 0 for noise, _, _ in key) or _reach(key) > _MAX_LOSS


def _epsilon(key: _Key, delta: float, cells: int) -> float:
    if not key:
        return 0.0
    if _unnoised(key):
        return math.inf
    epsilon = float(_accountant(key, cells).get_epsilon(delta))
    scale = 10**_EPSILON_DIGITS
    return math.ceil(epsilon * scale) / scale if math.isfinite(epsilon) else math.inf


def _event(noise_multiplier: float, sample_rate: float, count: int) -> Any:
    import dp_accounting

    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sample_rate < 1:
        event = dp_accounting.PoissonSampledDpEvent(sample_rate, event)
    return dp_accounting.SelfComposedDpEvent(event, count)


@lru_cache(maxsize=8)
def _accountant(key: _Key, cells: int) -> Any:
    """Compose once: callers only ask the accountant for epsilon and delta."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=_grid_width(key, cells),
    )
    for part in key:
        accountant.compose(_event(*part))
    return accountant


def _grid_width(key: _Key, cells: int) -> float:
    """Return the grid's width: a power of two, at most the rms privacy loss of a step divided by `cells`."""
    steps = sum(count for _, _, count in key)
    width = min(math.sqrt(_variance(key) / steps), _MAX_RMS) / cells
    return float(2.0 ** math.floor(math.log2(max(width, _reach(key) / _MAX_CELLS))))


def _variance(key: _Key) -> float:
    return sum(count * _loss_scale(noise, rate) ** 2 for noise, rate, count in key)


def _reach(key: _Key) -> float:
    """Return about the largest privacy loss that matters."""
    variance = _variance(key)
    return variance / 2 + 8 * math.sqrt(variance)


def _loss_scale(noise: float, rate: float) -> float:
    """Return about the standard deviation of one step's privacy loss; it only decides the width of the grid."""
    exponent = noise**-2
    small = rate * math.sqrt(math.expm1(exponent)) if exponent < 500 else math.inf
    return min(small, 1 / noise, math.sqrt(rate) * (exponent / 2 + 1 / noise))


def _bracket(excess: Callable[[float], float], words: str) -> tuple[float, float]:
    """Return the logs of a noise multiplier that is too small and of one that is enough, a factor of 4 apart."""
    step, low = math.log(4), 0.0
    while excess(low) <= 0:
        low -= step
        if low < -8 * step:
            raise ConfigError(f"{words} is so large that it asks for no noise: give --dp-epsilon inf and say so")
    while excess(low + step) > 0:
        low += step
        if low > 12 * step:
            raise ConfigError(
                f"no noise is enough for {words}: the other stages already cost as much; lower their shares"
            )
    return low, low + step


def _round_up(value: float) -> float:
    """Round up to five significant digits."""
    digits = 4 - math.floor(math.log10(value))
    return round(math.ceil(round(value * 10.0**digits, 6)) / 10.0**digits, max(0, digits))
