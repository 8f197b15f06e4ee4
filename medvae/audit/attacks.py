"""The table of membership attacks, and how scores of scans become scores of patients on both sides.

Which attacks run and which is primary is fixed here, before any score is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from medvae.audit import calibrate
from medvae.audit.calibrate import Calibrated
from medvae.audit.material import Scans, join
from medvae.audit.membership import MIN_PATIENTS, Scores

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

WHITE_BOX = "holds the released weights, knows the recipe, and can train shadow models on people of the same kind"
SYNTHETIC_ONLY = "holds the synthetic scans alone, and can train shadow models on people of the same kind"


@dataclass(frozen=True)
class Attack:
    """One attack: a score of scans, how it is calibrated, and how scans of a patient are put together."""

    score: str
    calibration: str
    reduce: str

    @property
    def name(self) -> str:
        """The name in reports."""
        return f"{self.score}, {self.calibration}, {self.reduce}"


MEAN_MAP, EXACT, MIXTURE = "mean map", "exact likelihood", "mixture likelihood"
CLOSED_FORM = (
    Attack(MEAN_MAP, "raw", "sum"),
    Attack(MEAN_MAP, "raw", "max"),
    Attack(MEAN_MAP, "lira", "sum"),
    Attack(MEAN_MAP, "lira online", "sum"),
    Attack(EXACT, "raw", "mean"),
    Attack(EXACT, "lira", "sum"),
    Attack(EXACT, "lira", "max"),
    Attack(EXACT, "lira online", "sum"),
    Attack(EXACT, "rmia", "sum"),
    Attack(MIXTURE, "raw", "mean"),
    Attack(MIXTURE, "lira", "sum"),
    Attack(MIXTURE, "lira online", "sum"),
    Attack(MIXTURE, "rmia", "sum"),
)
DEEP = (
    Attack("likelihood", "lira", "sum"),
    Attack("likelihood", "lira", "max"),
    Attack("likelihood", "lira online", "sum"),
    Attack("likelihood", "rmia", "sum"),
    Attack("likelihood", "raw", "mean"),
    Attack("likelihood", "raw", "max"),
    *(
        Attack(score, how, to)
        for score in ("elbo", "reconstruction", "latent")
        for how, to in (("raw", "mean"), ("lira", "sum"))
    ),
)
# The first of these that could be computed is the primary attack.
PRIMARIES = (DEEP[0].name, CLOSED_FORM[0].name, Attack("likelihood", "raw", "mean").name)


@dataclass(frozen=True)
class Pool:
    """The people attacks are about: members and non-members, by patient; `judged`: whom the costly attacks score."""

    scans: Scans
    member: Bools
    judged: Bools

    @cached_property
    def index(self) -> Ints:
        """Place (N,) of each scan's patient among the sorted patients."""
        return np.searchsorted(self.scans.patients, self.scans.patient).astype(np.int64)

    @property
    def seen(self) -> float:
        """Share of the patients whom the audited model saw."""
        return float(self.member.mean())

    def only_judged(self) -> Pool:
        """Return the pool of the judged patients alone."""
        rows = self.judged[self.index]
        return Pool(self.scans.take(rows), self.member[self.judged], self.judged[self.judged])


def make_pool(members: Scans, others: Scans, judged: int, rng: np.random.Generator) -> Pool:
    """Join both sides; at most `judged` random patients of each are judged."""
    scans = join(members, others)
    member = np.isin(scans.patients, members.patients)
    chosen = np.zeros(len(member), dtype=bool)
    for side in (member, ~member):
        chosen[rng.permutation(np.flatnonzero(side))[:judged]] = True
    return Pool(scans, member, chosen)


def strata(scans: Scans) -> Ints:
    """Return a number (P,) for the classes of each patient (of the first scan), so that splits can spread them."""
    patients = scans.patients
    first = np.asarray([np.flatnonzero(scans.patient == p)[0] for p in patients])
    code = np.zeros(len(patients), dtype=np.int64)
    for condition in scans.space.conditions:
        if condition.kind == "class":
            code = code * condition.width + scans.labels(condition)[first]
    return code


def patient_scores(table: Sequence[Attack], scores: Mapping[str, Calibrated], pool: Pool) -> dict[str, Scores]:
    """Return every attack of the table that its material allows, members against non-members, by patient."""
    reference = ~pool.member[pool.index]
    found: dict[str, Scores] = {}
    for attack in table:
        given = scores.get(attack.score)
        if given is None:
            continue
        values = _values(attack.calibration, given, reference)
        if values is not None:
            by = calibrate.by_patient(values, given.patient, attack.reduce)
            found[attack.name] = Scores(by[pool.member], by[~pool.member])
    return found


def _values(calibration: str, scores: Calibrated, reference: Bools) -> Floats | None:
    how: Mapping[str, tuple[bool, Callable[[], Floats]]] = {
        "raw": (True, lambda: scores.target),
        "lira": (scores.enough_out, lambda: calibrate.lira(scores)),
        "lira online": (scores.enough_in, lambda: calibrate.lira_online(scores)),
        "rmia": (scores.enough_out and bool(reference.any()), lambda: calibrate.rmia(scores, reference)),
    }
    possible, compute = how[calibration]
    return compute() if possible else None


@dataclass(frozen=True)
class Family:
    """Attacks of one kind on the audited model, and the same attacks on a model made to leak."""

    name: str
    threat_model: str
    attacks: Mapping[str, Scores] = field(default_factory=dict)
    control: Mapping[str, Scores] = field(default_factory=dict)
    control_is: str = ""
    words: str = ""


def control_pool(pool: Pool, size: int, rng: np.random.Generator) -> Pool | None:
    """Return who a leaking model is made of: at most `size` members, all others non-members, drawn from the pool.

    Both sides come from the whole pool, members and non-members of the audited run alike, so they are of one kind. As
    many as 100 are left as non-members where there are enough, so that a false positive rate of 1 % can be measured.
    None where the pool is too small.
    """
    patients = pool.scans.patients
    count = min(size, len(patients) // 4)
    if len(patients) - count < 100 <= len(patients) - MIN_PATIENTS:
        count = len(patients) - 100
    if count < MIN_PATIENTS:
        return None
    chosen = rng.permutation(len(patients))[: max(4 * count, count + 100)]
    inside = np.zeros(len(patients), dtype=bool)
    inside[chosen[:count]] = True
    kept = np.zeros(len(patients), dtype=bool)
    kept[chosen] = True
    return Pool(pool.scans.of(patients[kept]), inside[kept], np.ones(int(kept.sum()), dtype=bool))
