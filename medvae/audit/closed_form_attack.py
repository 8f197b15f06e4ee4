"""White-box attack on the closed form: the audited release and its shadows, and a fit without noise as control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from medvae.audit import linear_scores
from medvae.audit.attacks import CLOSED_FORM, EXACT, MEAN_MAP, MIXTURE, WHITE_BOX, Family, Pool, patient_scores, strata
from medvae.audit.calibrate import Calibrated
from medvae.audit.linear_scores import Coefficients, Part
from medvae.audit.membership import Scores
from medvae.audit.shadow_recipe import LINEAR, ClosedForm, closed_form
from medvae.audit.shadows import Arrays, Shadows, run_shadows, splits
from medvae.config import Recipe
from medvae.nets.shape import with_ramps
from medvae.train.planning import moment_shapes
from medvae.types import FloatArray, ImageSpace

CONTROL_SHADOWS = 16
CONTROL_IS = "the same closed form without noise, on few people"
FEWEST_SHADOWS = 4


def prepare(
    pool: Pool, full: FloatArray, recipe: Recipe, noise_multipliers: Mapping[str, float], seed: int
) -> ClosedForm:
    """Return the trainer of closed-form shadows; full: the cosine coefficients of the pool's scans."""
    return closed_form(pool.scans, recipe, noise_multipliers, seed, full)


def family(
    pool: Pool, full: FloatArray, recipe: Recipe, target: Arrays, shadows: Shadows, control: Pool | None, seed: int
) -> Family:
    """Return the attacks on the linear part of the audited weights `target`, with the control's."""
    basis = recipe.moments.basis_shape
    if basis is None:
        raise ValueError("the recipe is not resolved")
    if len(shadows) < FEWEST_SHADOWS:
        return Family("white-box", WHITE_BOX, words=f"needs {FEWEST_SHADOWS} shadow models, there are {len(shadows)}")
    looks = full
    if target[LINEAR + "two_valued"]:  # the model is one of ramps
        looks = linear_scores.cosines(with_ramps(torch.from_numpy(pool.scans.x)).numpy())
    seen = linear_scores.coefficients(looks, pool.scans.condition, pool.scans.space, basis)
    attacks = _attacks(pool, seen, recipe, [target, *shadows.arrays], shadows)
    leaky: dict[str, Scores] = {}
    if control is not None:
        rows = np.isin(pool.scans.patient, control.scans.patients)
        leaky = _control(control, full[rows], seen.take(rows), recipe, seed)
    return Family("white-box", WHITE_BOX, attacks, leaky, CONTROL_IS)


def _control(pool: Pool, full: FloatArray, seen: Coefficients, recipe: Recipe, seed: int) -> dict[str, Scores]:
    silent = dict.fromkeys(moment_shapes(recipe).releases, 0.0)
    trainer = closed_form(pool.scans, recipe, silent, seed, full)
    included = splits(strata(pool.scans), pool.seen, CONTROL_SHADOWS, seed)
    shadows = run_shadows(trainer, included, None)
    target = trainer.fit(10**6, np.flatnonzero(pool.member))
    return _attacks(pool, seen, recipe, [target, *shadows.arrays], shadows)


def _attacks(
    pool: Pool, seen: Coefficients, recipe: Recipe, models: Sequence[Arrays], shadows: Shadows
) -> dict[str, Scores]:
    shapes = moment_shapes(recipe)
    basis, box = shapes.basis, None if shapes.mixture is None else shapes.mixture.box
    space: ImageSpace = pool.scans.space
    parts: list[Part] = [
        {k.removeprefix(LINEAR): v for k, v in model.items() if k.startswith(LINEAR)} for model in models
    ]
    means = linear_scores.flat_means(parts)
    scores = {MEAN_MAP: linear_scores.mean_map(means, means[1:], seen, pool.seen)}
    if box is None:
        scores[EXACT] = np.stack([linear_scores.likelihood(part, seen, space) for part in parts])
    else:
        scores[MIXTURE] = np.stack([linear_scores.mixture_likelihood(part, seen, basis, box) for part in parts])
    included = shadows.included[:, pool.index]
    calibrated = {name: Calibrated(s[0], s[1:], included, pool.scans.patient) for name, s in scores.items()}
    return patient_scores(CLOSED_FORM, calibrated, pool)
