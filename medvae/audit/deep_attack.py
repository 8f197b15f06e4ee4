"""White-box attack on a VAE trained by DP-SGD, calibrated by stacked shadows; the control is an overfitted VAE."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from medvae.audit.attacks import DEEP, WHITE_BOX, Family, Pool, patient_scores, strata
from medvae.audit.calibrate import Calibrated
from medvae.audit.control import overfit_many
from medvae.audit.material import shrink
from medvae.audit.membership import Scores
from medvae.audit.shadow_recipe import SCORE, ClosedForm, Deep, InMemory
from medvae.audit.shadows import Shadows, run_shadows, splits
from medvae.audit.whitebox import SCORES, scan_scores
from medvae.config import Recipe
from medvae.nets.build import load_release
from medvae.types import ModelRelease, Progress

GROUP = 4
CONTROL_SHADOWS = 4
CONTROL_PLANE, CONTROL_VOLUME = 32, 12
CONTROL_IS = "a VAE overfitted to few people without noise"
PROBE_STEPS = 2


def shadow_models(
    trainer: Deep,
    pool: Pool,
    asked: int,
    minutes: float | None,
    folder: Path | None,
    cluster: str | None,
    progress: Progress,
) -> Shadows:
    """Train whole shadows, as many of `asked` as a first look at their cost allows in `minutes` (None: all)."""
    included = splits(strata(pool.scans), pool.seen, asked, trainer.seed)
    none = Shadows(included[:0], [], asked, 0, 0, 0.0)
    if asked == 0:
        return replace(none, words="no shadow models in this tier: use --tier standard or full")
    if minutes is not None:
        began = time.monotonic()
        cost = group_seconds(trainer, included[:GROUP])
        fits = int(60 * minutes // cost) * GROUP
        if fits == 0:
            spent, hours = time.monotonic() - began, cost * asked / GROUP / 3600
            words = f"shadow models by DP-SGD would take about {hours:.1f} hours here: use --tier full, or a cluster"
            return replace(none, seconds=spent, words=words)
        included = included[: min(asked, fits)]
    found = run_shadows(trainer, included, folder, group=GROUP, cluster=cluster, progress=progress)
    return replace(found, asked=asked)


def group_seconds(trainer: Deep, included: np.ndarray) -> float:
    """Estimate what one group costs, from two steps of it and a few scored scans."""
    few = trainer.judged.take(np.arange(min(4, len(trainer.judged))))
    steps = trainer.recipe.dpsgd.steps or 1
    began = time.monotonic()
    replace(trainer, steps=PROBE_STEPS, judged=few.take(np.arange(1)))(list(range(len(included))), included)
    stepping = (time.monotonic() - began) / PROBE_STEPS * steps
    began = time.monotonic()
    scan_scores(trainer._start(0, np.flatnonzero(included[0])).eval(), few, trainer.draws, trainer.seed)
    return stepping + (time.monotonic() - began) / len(few) * len(trainer.judged) * len(included)


def trainer_of(
    pool: Pool, recipe: Recipe, noise_multiplier: float, private: bool, closed: ClosedForm | None, draws: int, seed: int
) -> Deep:
    """Return the trainer of whole shadows on a pool."""
    scans = InMemory(pool.scans.x, pool.scans.condition, pool.index, pool.scans.space)
    return Deep(scans, closed, recipe, noise_multiplier, private, pool.only_judged().scans, draws, seed)


def family(
    release: ModelRelease, pool: Pool, shadows: Shadows, control: Pool | None, draws: int, steps: int, seed: int
) -> Family:
    """Return the attacks on the audited VAE, with the control's."""
    judged = pool.only_judged()
    target = scan_scores(load_release(release), judged.scans, draws, seed)
    included = shadows.included[:, pool.index[pool.judged[pool.index]]]
    attacks = _attacks(judged, target, {n: [a[SCORE + n] for a in shadows.arrays] for n in SCORES}, included)
    leaky = {} if control is None else _control(control, draws, steps, seed)
    return Family("white-box", WHITE_BOX, attacks, leaky, CONTROL_IS, shadows.words)


def _control(pool: Pool, draws: int, steps: int, seed: int) -> dict[str, Scores]:
    small = shrink(pool.scans, CONTROL_PLANE if pool.scans.space.spatial_dims == 2 else CONTROL_VOLUME)
    shadows = splits(strata(small), pool.seen, CONTROL_SHADOWS, seed)
    models = overfit_many(small, np.concatenate([pool.member[None], shadows]), steps, seed)
    scores = [scan_scores(model, small, draws, seed) for model in models]
    others = {n: [s[n] for s in scores[1:]] for n in SCORES}
    return _attacks(Pool(small, pool.member, pool.judged), scores[0], others, shadows[:, pool.index])


def _attacks(
    pool: Pool, target: Mapping[str, np.ndarray], shadows: Mapping[str, list[np.ndarray]], included: np.ndarray
) -> dict[str, Scores]:
    calibrated = {
        name: Calibrated(
            target[name],
            np.stack(shadows[name]) if shadows[name] else np.zeros((0, len(target[name]))),
            included,
            pool.scans.patient,
        )
        for name in SCORES
    }
    return patient_scores(DEEP, calibrated, pool)
