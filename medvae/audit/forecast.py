"""What an audit without a bound in time will cost on this machine, told before it begins.

A first piece of each large kind of work is done and timed: a closed-form shadow, two steps of a stack of shadows by
DP-SGD, a batch of synthetic scans, a few steps of the learners. Times are of the clock, under the load of now.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medvae.audit.attacks import strata
from medvae.audit.case import Case, seconds_of
from medvae.audit.privacy import Ground, few_people, ground_of, shadow_folder
from medvae.audit.shadows import held, splits

LOOK = 32  # synthetic scans in the first look


@dataclass(frozen=True)
class Work:
    """A kind of work: how much of it, how much is there already, and the seconds that the rest will take."""

    name: str
    count: int
    done: int
    seconds: float

    @property
    def words(self) -> str:
        """As a line of the forecast says it."""
        there = f" ({self.done:,} are there)" if self.done else ""
        many = f"{self.count:,} " if self.count else ""
        return f"{many}{self.name}{there} {duration(self.seconds)}"


def forecast(case: Case) -> list[Work]:
    """Return the work of an audit, each kind of it timed by a first piece; nothing of it is kept."""
    from medvae.audit.quality import learners_seconds

    works = [Work("learners for utility", 0, 0, learners_seconds(case))]
    if few_people(case):
        return works
    ground = ground_of(case)
    works += [*_closed_form(case, ground), *_deep(case, ground)]
    return [*works, _synthetic(case, len(works) > 1)]


def in_words(tier: str, works: list[Work]) -> str:
    """Return one sentence: the whole, its parts, and what a stop costs."""
    whole, parts = duration(sum(w.seconds for w in works)), "; ".join(w.words for w in works)
    return (
        f"tier {tier}: about {whole} on this machine as busy as it is now ({parts}); shadow models are kept, so that a "
        "stopped audit, given again, goes on after the last of them"
    )


def duration(seconds: float) -> str:
    """Return seconds in the unit a person would use."""
    if seconds < 100:
        return f"{max(1.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} hours"


def _closed_form(case: Case, ground: Ground) -> list[Work]:
    trainer, pool = ground.closed, ground.pool
    if trainer is None:
        return []
    included = splits(strata(pool.scans), pool.seen, case.effort.closed_shadows, case.config.seed)
    done = held(shadow_folder(case, "closed form"), included)
    once = seconds_of(lambda: trainer.fit(0, np.flatnonzero(included[0])))
    return [Work("closed-form shadow models", len(included), done, once * (len(included) - done))]


def _deep(case: Case, ground: Ground) -> list[Work]:
    from medvae.audit.deep_attack import GROUP, group_seconds

    trainer, pool, asked = ground.deep, ground.pool, case.effort.deep_shadows
    if trainer is None or not asked or trainer.recipe.dpsgd.steps is None or trainer.recipe.dpsgd.sample_rate is None:
        return []
    included = splits(strata(pool.scans), pool.seen, asked, case.config.seed)
    done = held(shadow_folder(case, "whole"), included)
    seconds = group_seconds(trainer, included[:GROUP]) / GROUP * (asked - done) if done < asked else 0.0
    return [Work("shadow models by DP-SGD", asked, done, seconds)]


def _synthetic(case: Case, references: bool) -> Work:
    from medvae.audit.synthetic_attack import wanted_scans
    from medvae.audit.synthetic_only import generated_features

    wanted, made = wanted_scans(case.release.space, case.effort.made), len(case.made)
    count = max(0, wanted - made) + (case.effort.generators * wanted if references else 0)
    once = seconds_of(lambda: generated_features(case.release, LOOK, case.config.seed)) / LOOK
    return Work("synthetic scans for attacks", count, 0, once * count)
