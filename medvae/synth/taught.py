"""What a private teacher does to a synthetic cohort: it drops samples that it reads otherwise, or renames them.

The teacher is part of the released model and sees synthetic scans only, so this is post-processing of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from medvae.nets.build import load_teacher
from medvae.nets.teacher import classes_of
from medvae.types import ConditionValue, ModelRelease, Progress, SyntheticCohort, encode_conditions

if TYPE_CHECKING:
    from medvae.nets.teacher import Teacher

Rows = Sequence[Mapping[str, ConditionValue]]
Generate = Callable[[ModelRelease, Rows, int, Progress | None], SyntheticCohort]

# How often a sample is drawn anew before the likeliest of its draws is kept, and how far apart the seeds are.
DRAWS = 4
APART = 1_000_003
LOOK_AT_ONCE = 512


def wanted(release: ModelRelease) -> bool:
    """Return whether this release has a teacher."""
    return bool(release.card["recipe"].get("teacher", {}).get("enabled"))


def generate_taught(
    generate: Generate, release: ModelRelease, conditions: Rows, seed: int, progress: Progress | None = None
) -> SyntheticCohort:
    """Generate one scan a row of conditions, under the eyes of the release's teacher.

    filter: a scan that the teacher takes for another class is drawn anew, DRAWS times at most; of its draws the one
    stays that the teacher thinks likeliest to be what was asked for. label: scans stay, and the rows say what the
    teacher sees. generate: without a teacher.
    """
    teacher = load_teacher(release)
    if teacher is None:
        raise ValueError("this release has no teacher")
    recipe: dict[str, Any] = dict(release.card["recipe"])
    use = str(recipe["teacher"]["use"])
    bare = replace(
        release, card={**release.card, "recipe": {**recipe, "teacher": {**recipe["teacher"], "enabled": False}}}
    )
    made = generate(bare, conditions, seed, progress)
    if use == "label":
        return replace(made, conditions=_renamed(teacher, made))

    images, masks = made.images, made.masks
    likely, right = _judged(teacher, made)
    for draw in range(1, DRAWS):
        again = np.flatnonzero(~right)
        if not len(again):
            break
        fresh = generate(bare, [conditions[int(i)] for i in again], seed + APART * draw, None)
        chance, good = _judged(teacher, fresh)
        better = good | (chance > likely[again])
        place = again[better]
        images[place], likely[place], right[place] = fresh.images[better], chance[better], good[better]
        if masks is not None and fresh.masks is not None:
            masks[place] = fresh.masks[better]
    return replace(made, images=images, masks=masks)


def _judged(teacher: Teacher, made: SyntheticCohort) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return how likely each scan is what was asked for, (N,), and whether that is what the teacher would say."""
    encoded = np.stack([encode_conditions(made.space.conditions, row) for row in made.conditions])
    likely, right = np.ones(len(made)), np.ones(len(made), dtype=np.bool_)
    asked = teacher.split(torch.from_numpy(encoded))
    for probabilities, truth in zip(_read(teacher, made), asked, strict=True):
        index = truth.argmax(1).numpy()
        likely *= probabilities[np.arange(len(index)), index]
        right &= probabilities.argmax(1) == index
    return likely, right


def _renamed(teacher: Teacher, made: SyntheticCohort) -> tuple[Mapping[str, ConditionValue], ...]:
    rows: list[dict[str, ConditionValue]] = [dict(row) for row in made.conditions]
    for condition, probabilities in zip(classes_of(made.space.conditions), _read(teacher, made), strict=True):
        for row, index in zip(rows, probabilities.argmax(1), strict=True):
            row[condition.name] = condition.classes[int(index)]
    return tuple(rows)


def _read(teacher: Teacher, made: SyntheticCohort) -> list[npt.NDArray[np.float64]]:
    """Return the teacher's probabilities (N, classes) a class condition."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(made), LOOK_AT_ONCE):
            image = torch.from_numpy(made.images[start : start + LOOK_AT_ONCE])[:, None]
            parts.append([torch.softmax(logits.double(), dim=1).numpy() for logits in teacher.logits(image)])
    return [np.concatenate(found) for found in zip(*parts, strict=True)]
