"""The table beside the scans: which row belongs to which scan, and which patient it is.

Messages give counts and column roles, never a cell.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medvae.errors import CohortError
from medvae.vault.scan import Scan, Source, Split

SCAN_COLUMNS = ("file", "filename", "image", "scan", "volumeid", "scanid", "imageid", "volume", "filepath", "path")
PATIENT_COLUMNS = ("patientid", "personid", "subjectid", "participantid", "subject", "patient", "person", "participant")
MISSING = frozenset({"", "na", "n/a", "nan", "null"})
SPLITS: dict[str, Split] = {
    "train": "train", "training": "train", "holdout": "holdout", "val": "holdout", "validation": "holdout",
    "test": "holdout", "testing": "holdout",
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Table:
    """A CSV or TSV table: column names and rows of stripped cells, all of the same length."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def column(self, names: Sequence[str]) -> int | None:
        """Return the index of the first column that has one of the simplified names, in the order of `names`."""
        simple = [re.sub(r"[^a-z0-9]", "", c.lower()) for c in self.columns]
        return next((simple.index(n) for n in names if n in simple), None)


@dataclass(frozen=True, repr=False)
class Row:
    """A scan with its patient, its split where one is given, and all values that may serve as conditions."""

    scan: Scan
    patient: str
    split: Split | None
    values: Mapping[str, str]


def read_table(path: Path) -> Table:
    """Read a table separated by comma, tab or semicolon, whichever gives every row the same number of cells.

    Raises CohortError where it cannot be read, is ragged, repeats a column name, or holds no rows.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise CohortError("the table cannot be read: give a CSV file in UTF-8 with a header row") from None
    parsed = [p for p in (_parse(text, d) for d in ",\t;") if p]
    even = [p for p in parsed if len(p[0]) > 1 and all(len(r) == len(p[0]) for r in p)]
    if not parsed:
        raise CohortError("the table is empty or not a CSV table: give a header row and one row a scan")
    header, *rows = even[0] if even else parsed[0]
    ragged = sum(len(r) != len(header) for r in rows)
    if ragged:
        raise CohortError(
            f"{ragged} of {len(rows)} rows of the table have more or fewer cells than the header: fix them"
        )
    if not rows:
        raise CohortError("the table has a header and no rows: give one row a scan")
    if len({c.lower() for c in header}) < len(header):
        raise CohortError("the table has two columns of the same name: rename one")
    return Table(tuple(header), tuple(map(tuple, rows)))


def _parse(text: str, delimiter: str) -> list[list[str]]:
    try:
        reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
        return [[cell.strip() for cell in row] for row in reader if any(cell.strip() for cell in row)]
    except csv.Error:
        return []


def attach(table: Table | None, source: Source) -> list[Row]:
    """Give every scan its patient, split and values; see the module's first lines for what is refused.

    With a table, its patient column decides; without one, the source's own patients (DICOM, BIDS, npz) do.
    """
    if table is None:
        return [Row(s, _own_patient(s, source), s.split, s.attributes) for s in source.scans]
    owners = _match(table, source)
    absent = sum(not rows for rows in owners)
    if absent:
        raise CohortError(
            f"{absent} of {len(owners)} scans are not in the table: add their rows, or take the scans out of the source"
        )
    patient = table.column(PATIENT_COLUMNS)
    split = table.column(("split",))
    joined = [_join(table, scan, rows, patient, split, source) for scan, rows in zip(source.scans, owners, strict=True)]
    _check_identity(joined)
    return joined


def _own_patient(scan: Scan, source: Source) -> str:
    if scan.patient is None:
        raise CohortError(
            f"nothing tells which of the {len(source.scans)} scans belong to the same patient: give a table with a "
            "file column and a patient_id column (--labels)"
        )
    return scan.patient


def _match(table: Table, source: Source) -> list[list[int]]:
    """Return the table's row numbers for each scan, through its file names or else through its patient."""
    by_name: dict[str, set[int]] = defaultdict(set)
    for i, scan in enumerate(source.scans):
        for name in scan.names:
            by_name[name].add(i)
    known = by_name.keys() | source.unused
    column = _scan_column(table, known)
    owners: list[list[int]] = [[] for _ in source.scans]
    by_patient: dict[str, set[int]] = defaultdict(set)
    for i, scan in enumerate(source.scans):
        if scan.patient is not None:
            # An issuer or a "sub-" prefix belongs to the id but is seldom written in tables.
            for alias in {scan.patient, scan.patient.split("\0")[0], scan.patient.removeprefix("sub-")}:
                by_patient[alias].add(i)
    keys: list[str]
    if column is not None:
        keys = [_as_known(row[column], known) for row in table.rows]
        lookup, unused, what = by_name, source.unused, "scans"
    elif by_patient:
        column = table.column(PATIENT_COLUMNS)
        if column is None:
            raise CohortError("the table has neither a file column nor a patient_id column: add one of them")
        keys = [row[column] for row in table.rows]
        lookup, unused, what = by_patient, source.unused_patients, "patients"
    else:
        raise CohortError("no column of the table holds the names of the scans: add a file column")
    unknown = sum(k not in lookup and k not in unused for k in keys)
    if unknown:
        where = "are not in the source" if what == "scans" else "have no usable scan in the source"
        raise CohortError(
            f"{unknown} of {len(keys)} rows of the table name {what} that {where}: remove these rows, or add the {what}"
        )
    if len(set(keys)) < len(keys):
        raise CohortError(f"{len(keys) - len(set(keys))} rows of the table repeat another row's {what[:-1]}: keep one")
    unclear = sum(_several_owners(lookup.get(k, set()), source) for k in keys) if what == "scans" else 0
    if unclear:
        raise CohortError(f"{unclear} rows of the table name several files: give paths below the source folder")
    for row, key in enumerate(keys):
        for i in lookup.get(key, ()):
            owners[i].append(row)
    return owners


def _several_owners(scans: set[int], source: Source) -> bool:
    """Whether a name is that of several files: the volumes of one file or one patient's series may share one."""
    found = [source.scans[i] for i in scans]
    return len({s.files for s in found}) > 1 and (len({s.patient for s in found}) > 1 or found[0].patient is None)


def _as_known(cell: str, known: set[str]) -> str:
    path = PurePosixPath(cell.replace("\\", "/"))
    return next((k for k in (cell, str(path), path.name) if k in known), cell)


def _scan_column(table: Table, known: set[str]) -> int | None:
    """Return the column whose cells name the most scans; one with a telling name goes first."""
    named = [c for c in (table.column((n,)) for n in SCAN_COLUMNS) if c is not None]
    best: tuple[bool, int, int] = (False, 0, -1)
    for i in range(len(table.columns)):
        hits = len({r[i] for r in table.rows if _as_known(r[i], known) in known})
        if hits:
            best = max(best, (i in named, hits, -i))
    return -best[2] if best[1] else None


def _join(table: Table, scan: Scan, rows: list[int], patient: int | None, split: int | None, source: Source) -> Row:
    cells = [table.rows[r] for r in rows]
    # Where several rows (slices) describe one scan, only what they agree on is the scan's.
    agreed = {c: cells[0][i] for i, c in enumerate(table.columns) if len({cell[i] for cell in cells}) == 1}
    values = {**scan.attributes, **{k: v for k, v in agreed.items() if v.lower() not in MISSING}}
    ids = {table.rows[r][patient] for r in rows} if patient is not None else {_own_patient(scan, source)}
    if any(i.lower() in MISSING for i in ids):
        raise CohortError("the table has rows without a patient id: fill them in, a scan is never taken for a patient")
    splits = {_split(table.rows[r][split]) for r in rows} if split is not None else {scan.split}
    if len(ids) > 1 or len(splits) > 1:
        raise CohortError("the table gives one scan several patients or splits: make its rows agree")
    return Row(scan, ids.pop(), splits.pop(), values)


def _split(cell: str) -> Split:
    if cell.lower() not in SPLITS:
        raise CohortError("the table's split column holds other words than train, holdout, val or test: rename them")
    return SPLITS[cell.lower()]


def _check_identity(rows: Sequence[Row]) -> None:
    """Refuse a table that tears one patient of the source into several: that would understate epsilon."""
    ids: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.scan.patient is not None:
            ids[row.scan.patient].add(row.patient)
    torn = sum(len(v) > 1 for v in ids.values())
    if torn:
        raise CohortError(
            f"the table gives {torn} of {len(ids)} patients of the source several patient ids: give each person one"
        )
