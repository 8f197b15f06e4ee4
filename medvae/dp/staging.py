"""The one rule for splitting one privacy goal over the stages of a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medvae.dp.goal import Goal
from medvae.errors import ConfigError
from medvae.types import Mechanism

DPSGD = "dpsgd"


def plan_stages(
    goal: Goal,
    delta: float,
    one_shot: Sequence[tuple[str, float]],
    sgd: tuple[float, int] | None,
) -> tuple[Mechanism, ...]:
    """Return the mechanisms of all stages, whose composition keeps the goal by PLD, and hardly more than keeps it.

    one_shot: (name, share) of each single Gaussian release over all patients. A share is a part of the precision
    mu^2 = 1/noise^2 of the one Gaussian that would use up the goal, since precisions of Gaussian mechanisms
    add up (Dong, Roth & Su 2022, corollary 3.3): noise_i = 1/(mu sqrt(share_i)). A share of 0 is a stage left out.
    sgd: (sample_rate, steps) of DP-SGD, which gets the noise that PLD finds for all that is left, or None. Without
    DP-SGD the shares are scaled up to use everything. An infinite epsilon gives noise 0 everywhere.
    Raises ConfigError where the shares leave nothing for DP-SGD, or no stage is on.
    """
    stages = [(name, share) for name, share in one_shot if share != 0]
    total = sum(share for _, share in stages)
    _check(stages, total, sgd)

    if math.isinf(goal.limit):
        noise_of_all, noise = 0.0, 0.0
    else:
        noise_of_all = goal.gaussian_noise(delta)
        noise = goal.calibrate(lambda z: _mechanisms(stages, noise_of_all, total, sgd, z), delta)
    return _mechanisms(stages, noise_of_all, total, sgd, noise)


def _mechanisms(
    stages: Sequence[tuple[str, float]],
    noise_of_all: float,
    total: float,
    sgd: tuple[float, int] | None,
    noise: float,
) -> tuple[Mechanism, ...]:
    """Lay out the stages; `noise` is DP-SGD's, or that of all one-shot stages together where there is no DP-SGD."""
    if sgd is None:
        return tuple(Mechanism(name, noise * math.sqrt(total / share)) for name, share in stages)
    fixed = tuple(Mechanism(name, noise_of_all / math.sqrt(share)) for name, share in stages)
    return (*fixed, Mechanism(DPSGD, noise, sgd[0], sgd[1]))


def _check(stages: Sequence[tuple[str, float]], total: float, sgd: tuple[float, int] | None) -> None:
    wrong = next(((name, share) for name, share in stages if not 0 < share <= 1), None)
    if wrong is not None:
        raise ConfigError(f"the share of {wrong[0]!r} is {wrong[1]}: give a number from 0 to 1")
    if not stages and sgd is None:
        raise ConfigError("no stage is switched on: enable moments or dpsgd")
    if sgd is not None and total >= 1:
        raise ConfigError(f"the shares of the other stages sum to {total:g} and leave nothing for dpsgd: lower them")
    names = [name for name, _ in stages] + ([DPSGD] if sgd is not None else [])
    if len(set(names)) < len(names):
        raise ConfigError("two stages have one name: give each its own")
