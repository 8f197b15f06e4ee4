"""Conditions: declared by the user or, for classes only, read off the table; ranges are never taken from data."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from medvae.errors import CohortError, ConfigError
from medvae.types import MISSING_CLASS, Condition, ConditionValue
from medvae.vault.table import Row

MAX_CLASSES = 20
CLASSES_AT_MOST = 10  # a bare numeric column with more distinct values is a continuous covariate
PUBLIC_RANGES = {"age": (0.0, 100.0)}  # years
AGE = re.compile(r"(\d{1,3})([DWMY])")  # DICOM's AS, PS3.5 section 6.2
YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


def number(text: str) -> float | None:
    """Return a finite number or DICOM age in years, or None."""
    age = AGE.fullmatch(text)
    if age:
        return int(age[1]) * YEARS[age[2]]
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def settle_missing(specs: Sequence[str], rows: Sequence[Row], rule: str) -> tuple[list[Row], int]:
    """Return the rows with missing values dealt with by the rule, and how many were dropped.

    refuse: as they are, to be refused; drop: without the rows that miss a value; class: with the class "missing", for
    classes only. Raises ConfigError where a continuous or ordered condition would need that class.
    """
    names = [spec.partition("=")[0].strip() for spec in specs]
    absent = [[n for n in names if _lookup(row.values, n) is None] for row in rows]
    if rule == "refuse" or not any(absent):
        return list(rows), 0
    if rule == "drop":
        kept = [row for row, names in zip(rows, absent, strict=True) if not names]
        return kept, len(rows) - len(kept)
    lacking = {n for names in absent for n in names}
    for spec in specs:
        name, _, declared = (part.strip() for part in spec.partition("="))
        if name in lacking and (":" in declared or "<" in declared or name.lower() in PUBLIC_RANGES):
            raise ConfigError(
                f"condition {name!r} is no plain class and has no class for missing values: drop the scans"
            )
    return [
        replace(row, values={**row.values, **dict.fromkeys(names, MISSING_CLASS)})
        for row, names in zip(rows, absent, strict=True)
    ], 0


def plan_conditions(specs: Sequence[str], rows: Sequence[Row]) -> tuple[Condition, ...]:
    """Return the conditions asked for by NAME, NAME=LOW:HIGH, NAME=a|b|c or NAME=a<b<c, checked against every row.

    Raises ConfigError for a spec that cannot be read or needs a public range, CohortError for missing or undeclared
    values, for more than 20 classes, and for a class that one patient holds alone.
    """
    conditions = tuple(_condition(spec, rows) for spec in specs)
    if len({c.name for c in conditions}) < len(conditions):
        raise ConfigError("a condition is asked for twice: name each once")
    check_holders(conditions, rows)
    return conditions


def values_of(row: Row, conditions: Sequence[Condition]) -> dict[str, ConditionValue]:
    """Return the row's values, ready to be encoded."""
    found: dict[str, ConditionValue] = {}
    for condition in conditions:
        text = _lookup(row.values, condition.name) or ""
        plain = condition.kind == "class" or bool(condition.levels)
        value = text if plain else number(text)
        if value is None or value == "":
            raise CohortError(f"condition {condition.name!r} has a value that is not a number: correct the table")
        found[condition.name] = value
    return found


def check_holders(conditions: Sequence[Condition], rows: Sequence[Row]) -> None:
    """Refuse a class held by one patient only: its mere existence would single that patient out."""
    for condition in conditions:
        if condition.kind != "class" and not condition.levels:
            continue
        holders: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            holders[_lookup(row.values, condition.name) or ""].add(row.patient)
        alone = sum(len(patients) == 1 for patients in holders.values())
        if alone:
            raise CohortError(
                f"{alone} of {len(holders)} classes of condition {condition.name!r} are held by one patient only, "
                "which would single the patient out: merge classes, or leave these scans out"
            )


def _lookup(values: Mapping[str, str], name: str) -> str | None:
    if name in values:
        return values[name]
    return next((v for k, v in values.items() if k.lower() == name.lower()), None)


def _condition(spec: str, rows: Sequence[Row]) -> Condition:
    name, _, declared = (part.strip() for part in spec.partition("="))
    if not name or ("=" in spec and not declared):
        raise ConfigError("a condition cannot be read: give NAME, NAME=LOW:HIGH, NAME=a|b|c or NAME=a<b<c")
    texts = _texts(name, rows)
    if "<" in declared:
        levels = tuple(c.strip() for c in declared.split("<"))
        _declared_classes(name, levels, texts, "<")
        return Condition(name, "continuous", range=(0.0, len(levels) - 1.0), levels=levels)
    if "|" in declared:
        classes = tuple(c.strip() for c in declared.split("|"))
        if MISSING_CLASS in texts and MISSING_CLASS not in classes:
            classes = (*classes, MISSING_CLASS)
        return _declared_classes(name, classes, texts)
    if declared:
        return Condition(name, "continuous", range=_range(name, declared, texts))
    numbers = {number(t) for t in texts}
    distinct = set(texts)
    numeric = None not in numbers
    if numeric and (name.lower() in PUBLIC_RANGES or len(distinct) > CLASSES_AT_MOST):
        if name.lower() not in PUBLIC_RANGES:
            raise ConfigError(
                f"condition {name!r} is continuous and its range would be taken from the data, which gives away the "
                f"extreme patient: give {name}=LOW:HIGH"
            )
        return Condition(name, "continuous", range=PUBLIC_RANGES[name.lower()])
    if len(distinct) > MAX_CLASSES:
        raise CohortError(
            f"condition {name!r} has {len(distinct)} classes, more than {MAX_CLASSES}: merge classes, or leave it out"
        )
    return Condition(name, "class", tuple(sorted(distinct, key=lambda t: (number(t) or 0.0, t) if numeric else (0, t))))


def _texts(name: str, rows: Sequence[Row]) -> list[str]:
    texts = [_lookup(row.values, name) for row in rows]
    present = [t for t in texts if t is not None]
    if not present:
        raise CohortError(f"no scan has a value for condition {name!r}: give a table with a column of that name")
    if len(present) < len(texts):
        raise CohortError(
            f"{len(texts) - len(present)} of {len(texts)} scans have no value for condition {name!r}: fill them in, "
            "or choose --missing drop or class"
        )
    return present


def _declared_classes(name: str, classes: tuple[str, ...], texts: Sequence[str], sign: str = "|") -> Condition:
    if len(set(classes)) < len(classes) or "" in classes or len(classes) > MAX_CLASSES:
        raise ConfigError(
            f"condition {name!r}: give 2 to {MAX_CLASSES} different class names as {name}=a{sign}b{sign}c"
        )
    foreign = sum(t not in classes for t in texts)
    if foreign:
        raise CohortError(
            f"{foreign} of {len(texts)} scans have a value of condition {name!r} that is none of the "
            f"{len(classes)} declared classes: correct the table, or declare the class"
        )
    return Condition(name, "class", classes)


def _range(name: str, declared: str, texts: Sequence[str]) -> tuple[float, float]:
    ends = [number(e.strip()) for e in declared.split(":")]
    low, high = ends if len(ends) == 2 else (None, None)
    if low is None or high is None or not low < high:
        raise ConfigError(f"condition {name!r}: give a range as {name}=LOW:HIGH with LOW below HIGH, or classes as a|b")
    foreign = sum(number(t) is None for t in texts)
    if foreign:
        raise CohortError(
            f"{foreign} of {len(texts)} scans have a value of condition {name!r} that is not a number: correct them"
        )
    return low, high
