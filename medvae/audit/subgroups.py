"""Whose membership shows most: the primary attack within each class of each condition.

The more groups are looked at, the worse the worst looks by chance, so intervals hold for all groups together
(Bonferroni) and p-values are Holm's (1979).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medvae.audit.intervals import Estimate, auc_interval
from medvae.audit.material import Scans
from medvae.audit.membership import MIN_PATIENTS, Scores


@dataclass(frozen=True)
class Subgroup:
    """The attack within one class of one condition; estimate None: too few patients."""

    condition: str
    value: str
    members: int
    others: int
    area: Estimate | None
    p: float | None
    p_corrected: float | None

    @property
    def verdict(self) -> str:
        """What the corrected interval allows to say."""
        if self.area is None:
            fewest = min(self.members, self.others)
            return f"not measurable: {fewest} patients on one side, needs at least {MIN_PATIENTS}"
        if self.area.low > 0.5:
            return "better than guessing, after correction for the number of groups"
        return "no better than guessing, as far as this many patients can tell"


def subgroups(scores: Scores, scans: Scans, member: npt.NDArray[np.bool_], confidence: float) -> list[Subgroup]:
    """Return every class of every condition; member: (P,) of the scans' sorted patients, as the scores are."""
    patients = scans.patients
    first = np.asarray([np.flatnonzero(scans.patient == p)[0] for p in patients])
    groups = []
    for condition in (c for c in scans.space.conditions if c.kind == "class"):
        labels = scans.labels(condition)[first]
        for k, name in enumerate(condition.classes):
            inside = Scores(scores.members[labels[member] == k], scores.others[labels[~member] == k])
            groups.append((condition.name, name, inside))
    large = [g for g in groups if min(len(g[2].members), len(g[2].others)) >= MIN_PATIENTS]
    strict = 1 - (1 - confidence) / max(1, len(large))
    p = {id(g): _p_value(g[2]) for g in large}
    corrected = dict(zip(p, _holm(list(p.values())), strict=True))
    return [
        Subgroup(
            condition,
            name,
            len(inside.members),
            len(inside.others),
            auc_interval(inside.members, inside.others, strict) if id(group) in p else None,
            p.get(id(group)),
            corrected.get(id(group)),
        )
        for group in groups
        for condition, name, inside in [group]
    ]


def _p_value(scores: Scores) -> float:
    """Return the one-sided p-value of Mann and Whitney (1947) that members do not score higher."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(scores.members, scores.others, alternative="greater").pvalue)


def _holm(values: list[float]) -> list[float]:
    order = np.argsort(values)
    out, running = np.ones(len(values)), 0.0
    for rank, i in enumerate(order):
        running = max(running, (len(values) - rank) * values[int(i)])
        out[i] = min(1.0, running)
    return [float(v) for v in out]
