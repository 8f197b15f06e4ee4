"""Singling out, linkability and attribute inference, in the form of Anonymeter (Giomi et al. 2023).

Each attack runs twice with the same synthetic records: against training patients and against held-out ones, who show
what the records say of anybody. risk = (attack - control) / (1 - control): the part of the success that is about
taking part. A naive guess that never sees the synthetic records stands beside both; an attack no better than that is
too weak to say anything.

A record is one scan of a patient: the conditions, simple quantities of image and masks, and coordinates in the
embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medvae.audit.fidelity import distances
from medvae.audit.intervals import Estimate, clopper_pearson
from medvae.audit.material import Scans
from medvae.types import Condition

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# A guess of a number is right within this part of the range between the 5th and the 95th percentile.
TOLERANCE = 0.05
NEIGHBOURS = 1
PREDICATE_COLUMNS = 4
# A predicate about a number leaves this part of the records' spread as slack: a leak need not be exact to single out.
SLACK = 0.02
PERMUTATIONS = 2000
AT_ONCE = 1000  # predicates


@dataclass(frozen=True)
class Table:
    """Records (N, A) as numbers, with names; nominal columns hold class indices."""

    values: Floats
    names: tuple[str, ...]
    nominal: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.values)

    def without(self, column: int) -> Table:
        """Return the records without one column."""
        kept = [i for i in range(len(self.names)) if i != column]
        return Table(self.values[:, kept], tuple(self.names[i] for i in kept), tuple(self.nominal[i] for i in kept))


@dataclass(frozen=True)
class Risk:
    """A risk with its interval, beside the success rates of attack, control and naive guess."""

    name: str
    kind: str
    risk: Estimate
    attack: Estimate
    control: Estimate
    baseline: Estimate

    @property
    def strong(self) -> bool:
        """Whether the attack beats the naive guess, without which its failure shows nothing."""
        return self.attack.low > self.baseline.value or self.control.low > self.baseline.value

    @property
    def exposed(self) -> bool:
        """Whether the interval says that training patients are more exposed than others."""
        return self.risk.low > 0

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if self.exposed:
            return f"training patients are more exposed than others: {self.kind} shows who took part"
        if not self.strong:
            return "the attack is no better than a naive guess, so it shows nothing either way"
        return "no more exposed than people who took no part, as far as this many patients can tell"


def table(scans: Scans, features: Floats) -> Table:
    """Return records of scans (N): conditions, image and mask quantities, and the given features (N, d)."""
    columns: list[Floats] = []
    names: list[str] = []
    nominal: list[bool] = []
    for condition in scans.space.conditions:
        values = _values(scans, condition)
        columns.append(values)
        names.append(condition.name)
        nominal.append(condition.kind == "class")
    flat = scans.images.reshape(len(scans), -1).astype(np.float64)
    columns += [flat.mean(1), flat.std(1)]
    names += ["mean intensity", "contrast"]
    for label, mask in zip(scans.space.mask_labels, np.moveaxis(scans.x[:, 1:], 1, 0), strict=True):
        columns.append(mask.reshape(len(scans), -1).mean(1).astype(np.float64))
        names.append(f"volume of label {label}")
    columns += list(features.T)
    names += [f"feature {i + 1}" for i in range(features.shape[1])]
    nominal += [False] * (len(names) - len(nominal))
    return Table(np.stack(columns, axis=1), tuple(names), tuple(nominal))


def _values(scans: Scans, condition: Condition) -> Floats:
    if condition.kind == "class":
        return scans.labels(condition).astype(np.float64)
    return scans.column(condition)[:, 0].astype(np.float64)


def risk_of(
    name: str, kind: str, counts: tuple[int, int], trials: tuple[int, int], baseline: Estimate, confidence: float
) -> Risk:
    """Return the risk from hits against training patients and against the control."""
    (a, c), (n, m) = counts, trials
    attack = Estimate(a / n, *clopper_pearson(a, n, confidence), n)
    control = Estimate(c / m, *clopper_pearson(c, m, confidence), m)
    return Risk(name, kind, risk_interval(attack, control), attack, control, baseline)


def risk_interval(attack: Estimate, control: Estimate) -> Estimate:
    """Return (attack - control) / (1 - control) with its interval.

    It is one minus the ratio of the two failure rates, whose interval follows from those of the two rates by the
    method of variance estimates recovery (Donner & Zou 2012, "Closed-form confidence intervals for functions of the
    normal mean and standard deviation", ratio form). It is undefined where the control always succeeds.
    """
    missed, spared = 1 - attack.value, 1 - control.value
    if spared == 0:
        return Estimate(math.nan, math.nan, math.nan, attack.n)
    low_missed, high_missed, low_spared, high_spared = (
        1 - attack.high,
        1 - attack.low,
        1 - control.high,
        1 - control.low,
    )
    product = missed * spared
    u, v = high_missed * (2 * missed - high_missed), low_missed * (2 * missed - low_missed)
    s, t = high_spared * (2 * spared - high_spared), low_spared * (2 * spared - low_spared)
    least = (product - np.sqrt(max(0.0, product**2 - v * s))) / s if s > 0 else 0.0
    most = (product + np.sqrt(max(0.0, product**2 - u * t))) / t if t > 0 else np.inf
    return Estimate(1 - missed / spared, float(1 - most), float(min(1.0, 1 - least)), attack.n)


def infer(secret: int, made: Table, train: Table, control: Table, confidence: float) -> Risk:
    """Guess one column of a record from all others, by the synthetic record closest in them."""
    hits = int(_inferred(secret, made, train).sum()), int(_inferred(secret, made, control).sum())
    naive = _naive(secret, made, train)
    baseline = Estimate(float(naive.mean()), *clopper_pearson(int(naive.sum()), len(naive), confidence), len(naive))
    return risk_of(
        f"inference risk, {made.names[secret]}",
        "inference",
        hits,
        (len(train), len(control)),
        baseline,
        confidence,
    )


def _inferred(secret: int, made: Table, people: Table) -> Bools:
    known, asked = (
        _scaled(made.without(secret), made.without(secret)),
        _scaled(people.without(secret), made.without(secret)),
    )
    closest = distances(asked, known).argmin(1)
    return _right(secret, made.values[closest, secret], people, made)


def _naive(secret: int, made: Table, people: Table) -> Bools:
    """The best constant guess from public knowledge: here, from the synthetic records' own distribution."""
    column = made.values[:, secret]
    if made.nominal[secret]:
        values, counts = np.unique(column, return_counts=True)
        guess = values[counts.argmax()]
    else:
        guess = np.median(column)
    return _right(secret, np.full(len(people), guess), people, made)


def _right(secret: int, guess: Floats, people: Table, made: Table) -> Bools:
    truth = people.values[:, secret]
    if made.nominal[secret]:
        return np.asarray(guess == truth)
    low, high = np.quantile(made.values[:, secret], [0.05, 0.95])
    return np.asarray(np.abs(guess - truth) <= TOLERANCE * max(high - low, 1e-12))


def _scaled(people: Table, made: Table) -> Floats:
    """Return columns in units of the synthetic records' spread; classes as one column each, at distance one."""
    columns = []
    for i, nominal in enumerate(people.nominal):
        if nominal:
            classes = np.unique(made.values[:, i])
            columns += [(people.values[:, i] == c) / np.sqrt(2) for c in classes]
        else:
            spread = max(float(made.values[:, i].std()), 1e-9)
            columns.append((people.values[:, i] - made.values[:, i].mean()) / spread)
    return np.stack(columns, axis=1) if columns else np.zeros((len(people), 1))


def link(made: Floats, train: Floats, control: Floats, confidence: float) -> Risk:
    """Link the two halves of a record's embedding (., d) through the synthetic records.

    A patient is linked when one synthetic record is the closest to both halves. Odd and even columns are the halves.
    """
    hits = int(_linked(made, train).sum()), int(_linked(made, control).sum())
    chance = NEIGHBOURS / len(made)
    baseline = Estimate(chance, chance, chance, len(made))
    return risk_of("linkability risk", "linkability", hits, (len(train), len(control)), baseline, confidence)


def _linked(made: Floats, people: Floats) -> Bools:
    one, two = (distances(people[:, half::2], made[:, half::2]).argmin(1) for half in (0, 1))
    return np.asarray(one == two)


def single_out(made: Table, train: Table, control: Table, guesses: int, confidence: float, seed: int) -> Risk:
    """Write predicates after synthetic records and count those that hold for exactly one patient.

    A predicate asks for some columns of a random synthetic record: equal in classes, and in numbers at least or at
    most its value, whichever is the rarer side. Train and control must hold equally many records. The naive guess
    draws its values at random.

    Guesses are many and people few, so an interval over guesses would take any difference between two groups of people
    for exposure. The interval inverts a permutation test of who is in which group, exact where taking part makes no
    difference (Phipson & Smyth 2010).
    """
    rng = np.random.default_rng(seed)
    width = min(PREDICATE_COLUMNS, len(made.names))
    middle = np.median(made.values, axis=0)
    low, high, slack = made.values.min(0), made.values.max(0), SLACK * made.values.std(0)
    everyone = Table(np.concatenate([train.values, control.values]), train.names, train.nominal)
    held = np.zeros((guesses, len(everyone)), dtype=bool)
    naive_hits = 0
    for guess in range(guesses):
        columns = rng.permutation(len(made.names))[:width]
        record = made.values[rng.integers(len(made))]
        naive = np.where(made.nominal, np.rint(rng.uniform(low, high)), rng.uniform(low, high))
        held[guess] = _matches(record, columns, middle, slack, everyone)
        naive_hits += int(_matches(naive, columns, middle, slack, train).sum()) == 1
    baseline = Estimate(naive_hits / guesses, *clopper_pearson(naive_hits, guesses, confidence), guesses)
    member = np.arange(len(everyone)) < len(train)
    risk, attack, spared = singled(held, member, confidence, rng)
    return Risk("singling out risk", "singling out", risk, attack, spared, baseline)


def singled(
    held: Bools, member: Bools, confidence: float, rng: np.random.Generator
) -> tuple[Estimate, Estimate, Estimate]:
    """Return risk, attack and control of predicates (G, P), each true for some of P people, half of them members.

    A predicate is a hit where it holds for exactly one of a group. The rates' intervals are over predicates, for these
    very people; the risk's is over who is a member.
    """
    guesses, total = len(held), held.sum(1)[:, None]
    sides = np.stack([member, *(rng.permutation(member) for _ in range(PERMUTATIONS))], axis=1).astype(np.float32)
    inside = np.concatenate([part.astype(np.float32) @ sides for part in np.array_split(held, -(-guesses // AT_ONCE))])
    hits, spared_hits = (inside == 1).sum(0), (total - inside == 1).sum(0)
    attack, spared = (
        Estimate(int(h[0]) / guesses, *clopper_pearson(int(h[0]), guesses, confidence), guesses)
        for h in (hits, spared_hits)
    )
    apart, tail, left = (hits - spared_hits) / guesses, (1 - confidence) / 2, 1 - spared.value
    low = np.quantile(apart[1:], tail, method="lower")
    high = np.quantile(apart[1:], 1 - tail, method="higher")
    ends = (apart[0], apart[0] - high, apart[0] - low)
    value, least, most = (float(d / left) if left > 0 else math.nan for d in ends)
    return Estimate(value, least, min(1.0, most), len(member)), attack, spared


def _matches(record: Floats, columns: Ints, middle: Floats, slack: Floats, people: Table) -> Bools:
    """Return for whom (N,) the predicate holds."""
    held = np.ones(len(people), dtype=bool)
    for c in columns:
        values = people.values[:, c]
        if people.nominal[c]:
            held &= values == record[c]
        else:
            upper = record[c] >= middle[c]
            held &= values >= record[c] - slack[c] if upper else values <= record[c] + slack[c]
    return held
