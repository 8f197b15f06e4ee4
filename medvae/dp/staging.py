"""The one rule for splitting one privacy goal over the stages of a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medvae.dp.accounting import calibrate_noise, gaussian_epsilon
from medvae.dp.goal import Goal
from medvae.errors import ConfigError
from medvae.types import Mechanism

# Trainings by DP-SGD: of the model, of the model under attack, of a flow over its codes, of a classifier.
DPSGD, ROBUST, FLOW, TEACHER = "dpsgd", "robust", "prior_flow", "teacher"
TRAINED = (DPSGD, ROBUST, FLOW, TEACHER)
# What the names of mechanisms begin with that see codes of scans and no scans.
OVER_CODES = "prior_"


@dataclass(frozen=True)
class SampledStage:
    """A second training by DP-SGD, beside the model's: its share of the budget, sample rate and steps."""

    name: str
    share: float
    sample_rate: float
    steps: int


def plan_stages(
    goal: Goal,
    delta: float,
    one_shot: Sequence[tuple[str, float]],
    sgd: tuple[float, int] | None,
    sampled: Sequence[SampledStage] = (),
) -> tuple[Mechanism, ...]:
    """Return the mechanisms of all stages, whose composition keeps the goal by PLD, and hardly more than keeps it.

    one_shot: (name, share) of each single Gaussian release over all patients. A share is a part of the precision
    mu^2 = 1/noise^2 of the one Gaussian that would use up the goal, since precisions of Gaussian mechanisms
    add up (Dong, Roth & Su 2022, corollary 3.3): noise_i = 1/(mu sqrt(share_i)). A share of 0 is a stage left out.
    sgd: (sample_rate, steps) of DP-SGD, which gets the noise that PLD finds for all that is left, or None. Without
    DP-SGD the shares are scaled up to use everything. An infinite epsilon gives noise 0 everywhere.
    sampled: further stages of DP-SGD. Each gets the noise with which it alone costs the epsilon of the Gaussian that
    its share stands for; what that leaves is found by PLD over everything, as before.
    Raises ConfigError where the shares leave nothing for DP-SGD, or no stage is on.
    """
    stages = [(name, share) for name, share in one_shot if share != 0]
    total = sum(share for _, share in stages)
    _check(stages, total, sgd, sampled)

    if math.isinf(goal.limit):
        free = tuple(Mechanism(s.name, 0.0, s.sample_rate, s.steps) for s in sampled)
        return (*_mechanisms(stages, 0.0, total, sgd, 0.0), *free)
    noise_of_all = goal.gaussian_noise(delta)
    others = tuple(_sampled(stage, noise_of_all, delta) for stage in sampled)
    noise = goal.calibrate(lambda z: (*_mechanisms(stages, noise_of_all, total, sgd, z), *others), delta)
    return (*_mechanisms(stages, noise_of_all, total, sgd, noise), *others)


def _sampled(stage: SampledStage, noise_of_all: float, delta: float) -> Mechanism:
    """Return the stage with the noise that makes it cost what its share of the budget is."""
    epsilon = gaussian_epsilon(noise_of_all / math.sqrt(stage.share), delta)
    if epsilon <= 0:
        raise ConfigError(f"the share {stage.share:g} of {stage.name!r} is too small to train with: raise it")

    def alone(noise: float) -> list[Mechanism]:
        return [Mechanism(stage.name, noise, stage.sample_rate, stage.steps)]

    return alone(calibrate_noise(alone, epsilon, delta))[0]


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


def _check(
    stages: Sequence[tuple[str, float]],
    total: float,
    sgd: tuple[float, int] | None,
    sampled: Sequence[SampledStage],
) -> None:
    shares = [*stages, *((s.name, s.share) for s in sampled)]
    wrong = next(((name, share) for name, share in shares if not 0 < share <= 1), None)
    if wrong is not None:
        raise ConfigError(f"the share of {wrong[0]!r} is {wrong[1]}: give a number from 0 to 1")
    if not stages and sgd is None:
        raise ConfigError("no stage is switched on: enable moments or dpsgd")
    extra = sum(s.share for s in sampled)
    if sgd is not None and total + extra >= 1:
        raise ConfigError(
            f"the shares of the other stages sum to {total + extra:g} and leave nothing for dpsgd: lower them"
        )
    if extra >= 1:
        raise ConfigError(
            f"the shares of the trained stages sum to {extra:g} and leave nothing for the rest: lower them"
        )
    names = [name for name, _ in shares] + ([DPSGD] if sgd is not None else [])
    if len(set(names)) < len(names):
        raise ConfigError("two stages have one name: give each its own")
