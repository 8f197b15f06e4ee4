"""The privacy part of an audit: every attack with baseline and controls, put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from medvae.audit import membership, risks, verdicts
from medvae.audit.attacks import PRIMARIES, Family, Pool, control_pool, make_pool, strata
from medvae.audit.case import Case, Part, finding
from medvae.audit.diagnostics import diagnostics
from medvae.audit.embedding import embed
from medvae.audit.intervals import Estimate
from medvae.audit.shadows import Shadows, folder_of, run_shadows, splits
from medvae.config import Recipe, build
from medvae.types import Progress

if TYPE_CHECKING:
    from medvae.audit.shadow_recipe import ClosedForm, Deep
    from medvae.types import FloatArray

T = TypeVar("T")
STEPS = 100


class Clock:
    """Seconds by section, and progress in a hundred steps."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    def time(self, section: str, work: Callable[[], T]) -> T:
        """Do the work; its time adds to the section's."""
        began = time.monotonic()
        try:
            return work()
        finally:
            self.seconds[section] = self.seconds.get(section, 0.0) + time.monotonic() - began

    def between(self, start: int, end: int) -> Progress:
        """Return a progress of (done, total) that walks from one step to another."""

        def tell(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress(start + (end - start) * done // max(1, total), STEPS)

        return tell


@dataclass(frozen=True)
class Ground:
    """What membership attacks stand on: the people, and how shadows of the audited run are trained on them.

    full: cosine coefficients of the pool's scans; full and closed are None where the run has no closed form, deep
    where it has no DP-SGD.
    """

    pool: Pool
    recipe: Recipe
    full: FloatArray | None
    closed: ClosedForm | None
    deep: Deep | None


def few_people(case: Case) -> str:
    """Say why membership attacks can't be measured on so few patients, or return an empty string."""
    fewest = min(len(case.members.patients), len(case.others.patients))
    if fewest >= membership.MIN_PATIENTS:
        return ""
    return f"not measurable: {fewest} patients on one side, needs at least {membership.MIN_PATIENTS}"


def ground_of(case: Case) -> Ground:
    """Prepare the people and the trainers of shadows."""
    pool = make_pool(case.members, case.others, case.effort.judged, case.rng(3))
    recipe: Recipe = build(Recipe, **case.release.card["recipe"])
    full: FloatArray | None = None
    closed: ClosedForm | None = None
    if "linear.mean_map" in case.release.weights:
        from medvae.audit import closed_form_attack
        from medvae.audit.linear_scores import cosines

        full = cosines(pool.scans.x)
        closed = closed_form_attack.prepare(pool, full, recipe, _noise(case, pool, recipe), case.config.seed)
    deep = _deep_trainer(case, pool, recipe, closed) if recipe.dpsgd.enabled is not False else None
    return Ground(pool, recipe, full, closed, deep)


def privacy_part(case: Case, progress: Progress | None = None) -> Part:
    """Membership attacks with baseline and controls, copies, attribute risks, then the diagnostics."""
    clock = Clock(progress)
    rest = [
        _copies(case, clock),
        _risks(case, clock),
        Part(tuple(clock.time("diagnostics", lambda: diagnostics(case)))),
    ]
    clock.between(0, 20)(1, 1)
    if reason := few_people(case):
        return _together(verdicts.nothing(reason), *rest, seconds=clock.seconds)
    blind = clock.time("blind baseline", lambda: _blind(case))
    ground = clock.time("shadows", lambda: ground_of(case))
    families, shadows = _families(case, ground, clock)
    measured = verdicts.membership_part(case, families, blind, primary_of(families), shadows)
    measured = _together(measured, verdicts.subgroup_part(case, families, primary_of(families), ground.pool))
    return _together(measured, *rest, seconds=clock.seconds)


def primary_of(families: Mapping[str, Family]) -> str | None:
    """Return the name of the primary attack: the first on the list that could be made."""
    made = {name for family in families.values() for name in family.attacks}
    return next((name for name in PRIMARIES if name in made), None)


def _families(case: Case, ground: Ground, clock: Clock) -> tuple[dict[str, Family], list[Shadows]]:
    """Run every family of attacks that the audited model allows."""
    pool, full, closed, deep = ground.pool, ground.full, ground.closed, ground.deep
    control = control_pool(pool, case.effort.control_patients, case.rng(4))
    seed, effort = case.config.seed, case.effort
    families: dict[str, Family] = {}
    trained: list[Shadows] = []
    if full is not None and closed is not None:
        shadows = clock.time("shadows", lambda: _closed_shadows(case, pool, closed, clock.between(20, 60)))
        trained.append(shadows)
        families["closed form"] = clock.time(
            "white-box", lambda: _closed(case, pool, full, ground.recipe, shadows, control)
        )
    if deep is not None:
        whole = clock.time("shadows", lambda: _whole_shadows(case, pool, deep, clock.between(60, 85)))
        trained.append(whole)
        families["vae"] = clock.time("white-box", lambda: _deep(case, pool, whole, control))
    from medvae.audit import synthetic_attack

    generators = trained[-1]
    families["synthetic only"] = clock.time(
        "synthetic-only",
        lambda: synthetic_attack.family(
            case.release,
            embed(case.made.images),
            pool,
            generators,
            control,
            (effort.made, effort.generators),
            seed,
            clock.between(85, 100),
        ),
    )
    return families, trained


def _noise(case: Case, pool: Pool, recipe: Recipe) -> dict[str, float]:
    """Return the noise of closed-form shadows, scaled so that a mean over their fewer patients is as noisy."""
    from medvae.train.planning import moment_shapes

    known = {m["name"]: float(m["event"]["noise_multiplier"]) for m in case.claim["mechanisms"]}
    kept = splits(strata(pool.scans), pool.seen, 1, case.config.seed)[0].sum() / max(1, int(case.claim["patients"]))
    return {name: known.get(name, 0.0) * float(kept) for name in moment_shapes(recipe).releases}


def _facts(case: Case, kind: str) -> dict[str, Any]:
    """Return everything that a stored shadow depends on."""
    config, effort = case.config, case.effort
    patients = [case.members.patients.tolist(), case.others.patients.tolist()]
    model = {k: case.claim.get(k) for k in ("weights_sha256", "mechanisms")}
    judged = [effort.judged, effort.draws] if kind == "whole" else []
    return {"kind": kind, "seed": config.seed, "patients": patients, "judged": judged, **model}


def shadow_folder(case: Case, kind: Literal["closed form", "whole"]) -> Path | None:
    """Return the folder of the shadows of this kind, where shadows are kept."""
    return None if case.folder is None else folder_of(case.folder, _facts(case, kind))


def _closed_shadows(case: Case, pool: Pool, trainer: ClosedForm, progress: Progress) -> Shadows:
    included = splits(strata(pool.scans), pool.seen, case.effort.closed_shadows, case.config.seed)
    folder = shadow_folder(case, "closed form")
    return run_shadows(trainer, included, folder, cluster=case.config.cluster, progress=progress)


def _closed(case: Case, pool: Pool, full: FloatArray, recipe: Recipe, shadows: Shadows, control: Pool | None) -> Family:
    from medvae.audit.closed_form_attack import family

    return family(pool, full, recipe, case.release.weights, shadows, control, case.config.seed)


def _deep_trainer(case: Case, pool: Pool, recipe: Recipe, closed: ClosedForm | None) -> Deep:
    from medvae.audit.deep_attack import trainer_of
    from medvae.dp.staging import DPSGD

    noise = [float(m["event"]["noise_multiplier"]) for m in case.claim["mechanisms"] if m["name"] == DPSGD]
    private = case.claim["epsilon"] is not None
    draws, seed = case.effort.draws, case.config.seed
    return trainer_of(pool, recipe, noise[0] if noise else 0.0, private, closed, draws, seed)


def _whole_shadows(case: Case, pool: Pool, deep: Deep, progress: Progress) -> Shadows:
    from medvae.audit.deep_attack import shadow_models

    effort = case.effort
    if effort.deep_shadows and (deep.recipe.dpsgd.steps is None or deep.recipe.dpsgd.sample_rate is None):
        return Shadows(np.zeros((0, len(pool.member)), dtype=bool), [], 0, 0, 0, 0.0, "the recipe is not resolved")
    folder = shadow_folder(case, "whole")
    return shadow_models(deep, pool, effort.deep_shadows, effort.deep_minutes, folder, case.config.cluster, progress)


def _deep(case: Case, pool: Pool, shadows: Shadows, control: Pool | None) -> Family:
    from medvae.audit.deep_attack import family

    effort = case.effort
    return family(case.release, pool, shadows, control, effort.draws, effort.control_steps, case.config.seed)


def _blind(case: Case) -> Estimate:
    """Tell members from non-members without the model, from one average embedding a patient; as many of each."""
    rng, size = case.rng(8), case.effort.judged
    sides = []
    for side in (case.members, case.others):
        scans = side.of(np.sort(rng.permutation(side.patients)[:size]))
        sides.append(membership.patient_means(embed(scans.images), scans.patient))
    return membership.blind_baseline(sides[0], sides[1], case.config.confidence, case.config.seed)


def _copies(case: Case, clock: Clock) -> Part:
    found = clock.time("copies", lambda: risks.find_copies(case))
    if found is None:
        few = len(case.others.patients)
        words = f"not measurable: {few} held-out patients, needs at least {membership.MIN_PATIENTS}"
        return Part((finding("copies, flagged share", "privacy", None, verdict=words),))
    return verdicts.copies_part(found)


def _risks(case: Case, clock: Clock) -> Part:
    return verdicts.risks_part(clock.time("risks", lambda: risks.inference_risks(case)))


def _together(*parts: Part, seconds: Mapping[str, float] | None = None) -> Part:
    """Put parts together, in order."""
    attacks: dict[str, Any] = {k: v for part in parts for k, v in part.attacks.items()}
    if seconds is not None:
        attacks["seconds"] = dict(seconds)
    return Part(
        tuple(f for part in parts for f in part.findings),
        {k: v for part in parts for k, v in part.figures.items()},
        {k: v for part in parts for k, v in part.notes.items()},
        attacks,
    )
