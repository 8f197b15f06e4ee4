"""The plan of a run: recipe, mechanisms, epsilon and warnings, all from public numbers and before any scan is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medvae.config import Recipe, TrainConfig
from medvae.dp.accounting import canonical, pld_epsilon
from medvae.dp.delta import check_delta, default_delta
from medvae.dp.goal import goal_of
from medvae.dp.staging import DPSGD, TRAINED, plan_stages
from medvae.errors import ConfigError
from medvae.nets.build import build_model, mixture_shapes
from medvae.train.moment_shapes import MomentShapes
from medvae.train.rule import moment_shares, resolve
from medvae.train.stages import check_stages, prior_shares, trained_stages
from medvae.types import ImageSpace, Mechanism, PrivacyPlan

FEW_PATIENTS = 200
MEAN_ALONE = (
    "the budget is spent on one overall mean, since nothing finer shows at it: synthetic scans carry the classes and "
    "covariates asked for in name only (moments: {mean_alone: false} in a pipeline file asks for their means too)"
)


@dataclass(frozen=True)
class TrainPlan:
    """A resolved recipe, what it charges, and what to expect of it. Public.

    parameters: how many DP-SGD trains; warnings: plain sentences for whoever starts the run; asked: the goal, by the
    names of the flags.
    """

    recipe: Recipe
    privacy: PrivacyPlan
    parameters: int
    warnings: tuple[str, ...]
    asked: Mapping[str, Any]


def make_plan(patients: int, space: ImageSpace, config: TrainConfig) -> TrainPlan:
    """Plan a run on a cohort of `patients` training patients.

    All stages together keep the one goal of the settings (epsilon at delta, advantage, or risk at a baseline), by
    PLD, unit patient, add/remove. Raises ConfigError for a delta at or above 1/patients and for stages that leave each
    other nothing.
    """
    delta = default_delta(patients) if config.dp_delta is None else config.dp_delta
    warnings = check_delta(delta, patients)
    goal = goal_of(config)
    noise = 0.0 if math.isinf(goal.limit) else goal.gaussian_noise(delta)
    recipe = resolve(config.recipe, patients, space, noise)
    check_stages(recipe, space)
    one_shot = [*moment_shares(recipe, patients), *prior_shares(recipe)]
    mechanisms = plan_stages(goal, delta, one_shot, _sgd(recipe), trained_stages(recipe, patients))
    privacy = _privacy_plan(patients, delta, recipe, mechanisms)
    model = build_model(space, recipe)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad) if recipe.dpsgd.enabled else 0
    warnings += cohort_warnings(privacy, parameters)
    if recipe.moments.mean_alone and space.conditions:
        warnings.append(MEAN_ALONE)
    return TrainPlan(recipe, privacy, parameters, tuple(warnings), goal.to_json())


def moment_shapes(recipe: Recipe) -> MomentShapes:
    """Return how fine the closed form's releases are; raises ConfigError for a recipe that is not resolved."""
    m, latent = recipe.moments, recipe.model.latent_dim
    if (
        m.basis_shape is None
        or m.coarse_shape is None
        or m.spectrum_weight is None
        or latent is None
        or not m.functions
    ):
        raise ConfigError("the moments stage is on but its shapes are not chosen yet: resolve the recipe first")
    return MomentShapes(
        m.basis_shape,
        m.coarse_shape,
        latent,
        m.spectrum_weight,
        mixture_shapes(recipe),
        recipe.mixture.lloyd_steps,
        public_clips=m.public_clips is True,
        mean_alone=m.mean_alone is True,
        warped_pairs=m.warped_pairs,
        two_valued=m.two_valued,
        functions=m.functions,
    )


def cohort_warnings(plan: PrivacyPlan, parameters: int) -> list[str]:
    """Say in plain words how little can be learned, where that is so: noise against the largest possible signal.

    The sum of clipped gradients over all steps has length at most q n C T; the noise in it has length
    sigma C sqrt(P T). A noisy mean over n patients has noise z/n a coordinate, in units of the clip.
    """
    if not plan.private:
        return ["trained without privacy, for comparison only: this run can never be released"]
    warnings = []
    if not parameters:
        warnings.append(
            "DP-SGD is off, by the rule for few patients or by the recipe: the closed form has the whole budget "
            "(dpsgd: {enabled: true} in a pipeline file switches it on)"
        )
    if plan.patients < FEW_PATIENTS:
        warnings.append(
            f"the cohort has {plan.patients} training patients, which is few: at epsilon {plan.epsilon:.3g} a model "
            "can learn what they have on average and hardly how they differ; expect blurred, much alike images, and "
            "check the utility in the audit before any use"
        )
    if parameters:
        drawn = plan.sample_rate * plan.patients
        ratio = plan.noise_multiplier * math.sqrt(parameters) / (drawn * math.sqrt(plan.steps))
        if ratio > 1:
            warnings.append(
                f"DP-SGD: over all {plan.steps} steps the noise on {parameters:,} parameters is {ratio:.1f} times as "
                "long as the longest signal the patients could give: more patients, a smaller model or a larger "
                "epsilon would help, more steps would not"
            )
    means = [m.noise_multiplier for m in plan.mechanisms if m.name == "means"]
    if means and means[0] / plan.patients > 0.05:
        warnings.append(
            f"private means: each of their numbers carries noise of {100 * means[0] / plan.patients:.0f} % of the "
            "largest scan's length, so only their coarsest features will show"
        )
    return warnings


def _sgd(recipe: Recipe) -> tuple[float, int] | None:
    config = recipe.dpsgd
    if not config.enabled or config.sample_rate is None or config.steps is None:
        return None
    return config.sample_rate, config.steps


def _privacy_plan(patients: int, delta: float, recipe: Recipe, mechanisms: tuple[Mechanism, ...]) -> PrivacyPlan:
    sgd = [m for m in mechanisms if m.name == DPSGD]
    # Without DP-SGD the headline is the one Gaussian that the other stages compose to, as one step on all patients.
    single = [m for m in mechanisms if m.name not in TRAINED]
    together = canonical(single)[0][0] if single and not sgd else 0.0
    return PrivacyPlan(
        epsilon=pld_epsilon(mechanisms, delta),
        delta=delta,
        patients=patients,
        sample_rate=sgd[0].sample_rate if sgd else 1.0,
        noise_multiplier=sgd[0].noise_multiplier if sgd else together,
        max_grad_norm=recipe.dpsgd.max_grad_norm if sgd else 1.0,
        steps=sgd[0].count if sgd else 1,
        mechanisms=mechanisms,
    )
