"""Attack with the synthetic scans alone: the audited model, shadow models as reference generators, and a control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medvae.audit import synthetic_only
from medvae.audit.attacks import SYNTHETIC_ONLY, Family, Pool, strata
from medvae.audit.calibrate import by_patient
from medvae.audit.embedding import embed
from medvae.audit.membership import Scores
from medvae.audit.shadow_recipe import SCORE
from medvae.audit.shadows import Shadows, splits
from medvae.types import ImageSpace, ModelRelease, Progress

CONTROL_GENERATORS = 4
CONTROL_NOISE = 0.05
CONTROL_COPIES = 2
CONTROL_IS = "a generator that repeats few people's scans with noise"
IN_2D = 5
REDUCE = {
    synthetic_only.NEAREST: "max",
    synthetic_only.CALIBRATED: "sum",
    synthetic_only.MONTE_CARLO: "mean",
    synthetic_only.DENSITY: "sum",
}


def family(
    release: ModelRelease,
    made: np.ndarray,
    pool: Pool,
    shadows: Shadows,
    control: Pool | None,
    sizes: tuple[int, int],
    seed: int,
    progress: Progress,
) -> Family:
    """Return the attacks on the synthetic scans of the audited model, with the control's.

    made: features of synthetic scans that are there already; sizes: (how many scans the attacker gets at least, how
    many reference generators), in 3D.
    """
    judged = pool.only_judged()
    wanted = wanted_scans(release.space, sizes[0])
    references = min(sizes[1], len(shadows))
    total, done = max(0, wanted - len(made)) + references * wanted, 0

    def features(model: ModelRelease, count: int, number: int) -> np.ndarray:
        nonlocal done
        if count == 0:
            return np.zeros((0, made.shape[1]))
        found = synthetic_only.generated_features(
            model, count, seed + 7919 * number, lambda at, _: progress(done + at, total)
        )
        done += count
        return found

    own = np.concatenate([made, features(release, max(0, wanted - len(made)), 1)])
    others = [
        features(_release_of(release, arrays), wanted, 2 + i) for i, arrays in enumerate(shadows.arrays[:references])
    ]
    rows = pool.index[pool.judged[pool.index]]
    scores = synthetic_only.scores(embed(judged.scans.images), own, others, shadows.included[:references][:, rows])
    leaky = {} if control is None else _control(control, seed)
    return Family("synthetic-only", SYNTHETIC_ONLY, _by_patient(scores, judged), leaky, CONTROL_IS)


def wanted_scans(space: ImageSpace, volumes: int) -> int:
    """Return how many synthetic scans of a generator the attacks get: as many volumes, or five times as many images."""
    return volumes * (IN_2D if space.spatial_dims == 2 else 1)


def _release_of(release: ModelRelease, arrays: Mapping[str, np.ndarray]) -> ModelRelease:
    """Return a shadow as a release: what it does not hold itself is untrained, and as in the audited one."""
    own = {name: value for name, value in arrays.items() if not name.startswith(SCORE)}
    return ModelRelease({**release.weights, **own}, release.card)


def _by_patient(scores: Mapping[str, np.ndarray], pool: Pool) -> dict[str, Scores]:
    found = {}
    for name, values in scores.items():
        by = by_patient(values, pool.scans.patient, REDUCE[name])
        found[f"synthetic only, {name}"] = Scores(by[pool.member], by[~pool.member])
    return found


def _control(pool: Pool, seed: int) -> dict[str, Scores]:
    included = splits(strata(pool.scans), pool.seen, CONTROL_GENERATORS, seed)

    def leaking(patients: np.ndarray, number: int) -> np.ndarray:
        images = pool.scans.images[patients[pool.index]]
        return synthetic_only.repeating(images, CONTROL_COPIES, CONTROL_NOISE, seed + number)

    own = leaking(pool.member, 0)
    others: Sequence[np.ndarray] = [leaking(row, 1 + i) for i, row in enumerate(included)]
    scores = synthetic_only.scores(embed(pool.scans.images), own, others, included[:, pool.index])
    return _by_patient(scores, pool)
