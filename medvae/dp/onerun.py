"""What one training run tells of its own privacy: estimators for scores of canaries whose coins are known.

A canary is a made-up patient that takes part where its coin says so. From the scores of all of them, and the coins:

- the accusation test: are the rates of error at a threshold, set by a rule that was fixed beforehand and on other
  canaries, below the claimed curve f, beyond chance?
- a lower bound on epsilon that needs no second run: Mahloujifar, Melis & Chaudhuri (2024, "Auditing f-Differential
  Privacy in One Run"), for the family of Gaussian trade-off curves, and Steinke, Nasr & Jagielski (2023, "Privacy
  Auditing with One (1) Training Run"), for bare (epsilon, delta);
- mu by Clopper-Pearson bounds on both rates (Nasr et al. 2023, "Tight Auditing of Differentially Private Machine
  Learning"), as a description.

Shapes: m canaries; `scores` (m,), higher for "took part"; `coins` (m,), True for one that did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from medvae.dp.accounting import SEARCH_CELLS, gaussian_epsilon, pld_epsilon
from medvae.dp.tradeoff import miss_bound
from medvae.types import Mechanism

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Curve = Callable[[Floats], Floats]

# Share of the canaries, the first ones, whose scores only set the threshold that the others are tested at.
CALIBRATORS = 0.1
# Share of the others that the one-run estimators guess on: the surest, with scores farthest from the threshold.
GUESS_SHARE = 0.06
# Noise over the claim's, in the search for the claim that can just be refuted.
SMALLEST_FACTOR, LARGEST_FACTOR, FAMILY_STEPS = 0.1, 20.0, 9
_NODES, _REACH = 400, 9.0


@dataclass(frozen=True)
class Rates:
    """Errors of "took part where score > threshold", with upper Clopper-Pearson bounds, and the least misses of f."""

    threshold: float
    fpr: float
    fpr_high: float
    fnr: float
    fnr_high: float
    fnr_least: float

    @property
    def accuses(self) -> bool:
        """Whether fewer members are missed than the claim allows at that rate of false accusations."""
        return self.fnr_high < self.fnr_least


def log_ratio(noised: npt.ArrayLike, noise_multiplier: float, sample_rate: float) -> Floats:
    """Return log(1 + q (exp((g - 1/2)/sigma^2) - 1)): what a step's noised coordinate g says for "took part".

    g is in units of the clip. The log of the likelihood ratio of the Poisson-sampled Gaussian with signal 1, so by
    Neyman and Pearson no score of the same coordinate tells more. Any shape.
    """
    exponent = (np.asarray(noised, dtype=np.float64) - 0.5) / noise_multiplier**2
    if sample_rate >= 1:
        return np.asarray(exponent)
    return np.asarray(np.logaddexp(math.log1p(-sample_rate), math.log(sample_rate) + exponent))


def score_moments(
    mechanism: Mechanism, *, noise_factor: float = 1.0, signal: float = 1.0
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (mean, variance) of a score left out, and of one that took part, over all steps, by quadrature.

    noise_factor, signal: what the build really does, over what it claims.
    """
    z, sigma, q = mechanism.noise_multiplier, mechanism.noise_multiplier * noise_factor, mechanism.sample_rate
    x, weights = _quadrature()
    out, drawn = log_ratio(sigma * x, z, q), log_ratio(sigma * x + signal, z, q)

    def moments(first: Floats, share: float) -> tuple[float, float]:
        mean = float(weights @ ((1 - share) * out + share * first))
        square = float(weights @ ((1 - share) * (out - mean) ** 2 + share * (first - mean) ** 2))
        return mechanism.count * mean, mechanism.count * square

    return moments(out, 0.0), moments(drawn, q)


@cache
def _quadrature() -> tuple[Floats, Floats]:
    """Return nodes and weights for expectations under a standard normal, cut at 9 standard deviations."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    x = _REACH * nodes
    return x, weights * _REACH * np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)


def calibrated(scores: Floats, coins: Bools) -> tuple[float, Floats, Bools]:
    """Return the threshold that the first canaries give, and the scores and coins of all others, which are tested.

    The threshold lies midway between the calibrators' medians. It cannot be fixed in advance as a number: a build with
    too little noise moves the scores of both groups, and most of them past any fixed threshold. What is fixed is the
    rule, and the tested canaries have no part in it, so bounds on them stay exact. Not finite where the calibrators
    do not hold both kinds.
    """
    n = round(CALIBRATORS * len(scores))
    took_part, out = scores[:n][coins[:n]], scores[:n][~coins[:n]]
    both = len(took_part) > 0 and len(out) > 0
    return float(np.median(took_part) + np.median(out)) / 2 if both else math.nan, scores[n:], coins[n:]


def accusation(scores: Floats, coins: Bools, at: Sequence[float], level: float, miss_bound: Curve) -> list[Rates]:
    """Test the claim that no attacker misses fewer than `miss_bound(fpr)`; any `Rates.accuses` accuses.

    Guarantee: a build that keeps to the claim is accused with probability at most `level`, since each threshold's
    two one-sided bounds share level / len(at) (Bonferroni) and f falls.
    """
    share = level / len(at) / 2
    members, others = np.sort(scores[coins]), np.sort(scores[~coins])
    false = len(others) - np.searchsorted(others, at, side="right")
    missed = np.searchsorted(members, at, side="right")
    fpr_high, fnr_high = upper(false, len(others), share), upper(missed, len(members), share)
    least = miss_bound(fpr_high)
    rows = zip(at, false / max(1, len(others)), fpr_high, missed / max(1, len(members)), fnr_high, least, strict=True)
    return [Rates(*map(float, row)) for row in rows]


def upper(hits: npt.ArrayLike, n: int, level: float) -> Floats:
    """Return the one-sided upper bound of binomial proportions (Clopper & Pearson 1934); 1 for no trial. (...)."""
    from scipy.stats import beta

    k = np.asarray(hits, dtype=np.float64)
    return np.where(k < n, beta.ppf(1 - level, k + 1, np.maximum(n - k, 0.5)), 1.0)


def gdp_mu(scores: Floats, coins: Bools, at: Sequence[float], level: float) -> float:
    """Return the largest mu that some threshold's bounds show, as if the curve were Gaussian; at least 0.

    mu = Phi^-1(1 - fpr) - Phi^-1(fnr) at the upper bounds, together at confidence 1 - level over the thresholds.
    """
    from scipy.special import ndtri

    rows = accusation(scores, coins, at, level, lambda a: a)
    found = [-ndtri(r.fpr_high) - ndtri(r.fnr_high) for r in rows if r.fpr_high < 1 and r.fnr_high < 1]
    return max([0.0, *map(float, found)])


def guess(scores: Floats, coins: Bools, threshold: float, share: float = GUESS_SHARE) -> tuple[int, int]:
    """Return how many guesses are made, on the scores farthest from the threshold, and how many are right.

    A score is a log-likelihood ratio, so its distance says how sure a guess is. No coin is looked at to choose.
    """
    surest = np.argsort(-np.abs(scores - threshold), kind="stable")[: round(share * len(scores))]
    return len(surest), int(np.sum((scores[surest] > threshold) == coins[surest]))


def fdp_mu(canaries: int, guesses: int, right: int, level: float) -> float:
    """Return a lower confidence bound on mu of a Gaussian trade-off curve from guesses in one run; at least 0."""
    from scipy.special import ndtr, ndtri

    def refuted(mu: float) -> bool:
        return too_right(lambda r: float(ndtr(ndtri(r) - mu)), canaries, guesses, right, level)

    return _largest(refuted)


def too_right(least: Callable[[float], float], canaries: int, guesses: int, right: int, level: float) -> bool:
    """Whether a build that keeps to a trade-off curve guesses that well with probability below `level`.

    least: r -> f(1 - r), for a symmetric curve f. Mahloujifar, Melis & Chaudhuri (2024), theorem 3.2 and algorithm 3:
    the masses of outcomes at least as good are bounded from the best one downwards; h_i is the least mass of wrong
    guesses that goes with mass r_{i+1} of right ones, and r grows by i / (guesses - i) of each increase of h.
    """
    if guesses == 0:
        return False
    r, h = level * right / canaries, level * (guesses - right) / canaries
    for i in range(right - 1, -1, -1):
        bound = least(min(r, 1.0))
        if bound <= h:
            break
        r, h = r + i / (guesses - i) * (bound - h), bound
    return r + h > guesses / canaries


def _largest(refuted: Callable[[float], bool], limit: float = 64.0) -> float:
    """Return the largest value that is refuted, where all below it are too; 0 where none is, at most `limit`."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
        if high > limit:
            return low
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def steinke_epsilon(canaries: int, guesses: int, right: int, level: float, delta: float) -> float:
    """Return a lower confidence bound on epsilon at `delta` from guesses in one run (Steinke et al. 2023, thm 5.2)."""
    from scipy.stats import binom

    def rare(epsilon: float) -> bool:
        rate = 1 / (1 + math.exp(-epsilon))
        tail = float(binom.sf(right - 1, guesses, rate))
        i = np.arange(1, right + 1)
        extra = float(np.max((binom.sf(right - i - 1, guesses, rate) - tail) / i, initial=0.0))
        return tail + 2 * canaries * delta * extra < level

    return _largest(rare) if guesses else 0.0


def estimates(
    scores: Floats, coins: Bools, mechanisms: Sequence[Mechanism], level: float, delta: float
) -> dict[str, float]:
    """Return lower bounds on epsilon at `delta`, each at confidence 1 - level by itself.

    fdp_epsilon, rates_epsilon: epsilon of the claimed mechanisms with as much noise as can be refuted, by guesses in
    one run and by error rates at the threshold. fdp_gaussian_epsilon, gdp_epsilon: the same for the family of
    Gaussian curves, which those mechanisms are of only without sampling. steinke_epsilon: for bare (epsilon, delta).
    """
    threshold, scores, coins = calibrated(scores, coins)
    at, (guesses, right), canaries = [threshold], guess(scores, coins, threshold), len(scores)
    gdp = gdp_mu(scores, coins, at, level)
    gaussian, by_mu = mu_epsilon(fdp_mu(canaries, guesses, right, level), delta), mu_epsilon(gdp, delta)
    found = {
        "fdp_epsilon": gaussian,
        "rates_epsilon": by_mu,
        "fdp_gaussian_epsilon": gaussian,
        "gdp_mu": gdp,
        "gdp_epsilon": by_mu,
        "steinke_epsilon": steinke_epsilon(canaries, guesses, right, level, delta),
    }
    if all(m.sample_rate >= 1 for m in mechanisms):
        return found  # the family is the Gaussian one

    def by_guesses(curve: Curve) -> bool:
        return too_right(lambda r: float(curve(np.asarray([1 - r]))[0]), canaries, guesses, right, level)

    def by_rates(curve: Curve) -> bool:
        return any(row.accuses for row in accusation(scores, coins, at, level, curve))

    return {
        **found,
        "fdp_epsilon": _family_epsilon(mechanisms, delta, by_guesses),
        "rates_epsilon": _family_epsilon(mechanisms, delta, by_rates),
    }


def mu_epsilon(mu: float, delta: float) -> float:
    """Return epsilon at `delta` of the Gaussian mechanism with noise 1/mu."""
    return gaussian_epsilon(1 / mu, delta) if mu > 0 else 0.0


def scaled(mechanisms: Sequence[Mechanism], factor: float) -> tuple[Mechanism, ...]:
    """Return the mechanisms with every noise multiplier times `factor`."""
    return tuple(replace(m, noise_multiplier=m.noise_multiplier * factor) for m in mechanisms)


def _family_epsilon(mechanisms: Sequence[Mechanism], delta: float, refuted: Callable[[Curve], bool]) -> float:
    """Return epsilon of the claim with its noise scaled to where it can just be refuted; 0 where nothing can be."""

    def at(log_factor: float) -> bool:
        claim = scaled(mechanisms, math.exp(log_factor))
        return refuted(lambda fpr: miss_bound(claim, fpr, SEARCH_CELLS))

    low, high = math.log(SMALLEST_FACTOR), math.log(LARGEST_FACTOR)  # a claim of more noise is refuted more easily
    if not at(high):
        return 0.0
    for _ in range(FAMILY_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle) else (middle, high)
    return pld_epsilon(scaled(mechanisms, math.exp(high)), delta)
