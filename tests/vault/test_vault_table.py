"""Tables: any table that csv can write is read back; joins, keys and conditions by their rules."""

from __future__ import annotations

import contextlib
import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medvae.errors import CohortError, InputError
from medvae.vault.conditions import number, plan_conditions
from medvae.vault.scan import Scan, Source, Volume
from medvae.vault.table import MISSING, Row, attach, read_table

CELL = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=12)
EVERY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def text_of(rows: list[list[str]], delimiter: str) -> str:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return stream.getvalue()


@EVERY
@given(st.data(), st.integers(2, 5), st.sampled_from(",\t;"), st.booleans())
def test_reading_is_the_inverse_of_writing(
    tmp_path: Path, data: st.DataObject, width: int, delimiter: str, mark: bool
) -> None:
    header = [f"column {i}" for i in range(width)]
    rows = data.draw(st.lists(st.lists(CELL, min_size=width, max_size=width), min_size=1, max_size=6))
    path = tmp_path / "t.csv"
    path.write_text(text_of([header, *rows], delimiter), encoding="utf-8-sig" if mark else "utf-8")
    filled = [tuple(c.strip() for c in row) for row in rows if any(c.strip() for c in row)]
    if not filled:
        with pytest.raises(CohortError, match="no rows"):
            read_table(path)
        return
    table = read_table(path)
    assert table.columns == tuple(header)
    assert list(table.rows) == filled


@EVERY
@given(st.binary(max_size=300))
def test_any_bytes_give_a_table_or_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    with contextlib.suppress(InputError):
        table = read_table(tmp_path / "t.csv")
        assert all(len(r) == len(table.columns) for r in table.rows)


@EVERY
@given(st.lists(st.sampled_from(["a", "b", "c", "1", "2.5", "", "NaN", "040Y", "x" * 9]), min_size=2, max_size=30))
def test_conditions_cover_every_value_or_are_refused(values: list[str]) -> None:
    scan = Scan(frozenset(), lambda: Volume(None))  # type: ignore[arg-type]
    rows = [Row(scan, f"p{i % 7}", None, {"c": v} if v.lower() not in MISSING else {}) for i, v in enumerate(values)]
    try:
        (condition,) = plan_conditions(["c"], rows)
    except InputError:
        return
    for row in rows:
        assert condition.encode(row.values["c"]).sum() == 1


def source(names: list[str], patients: list[str | None] | None = None) -> Source:
    owners = patients or [None] * len(names)
    scans = [
        Scan(frozenset({n, n.split("/")[-1]}), lambda: Volume(None), p)  # type: ignore[arg-type]
        for n, p in zip(names, owners, strict=True)
    ]
    return Source("nifti", 3, scans)


def joined(tmp_path: Path, text: str, src: Source) -> list[tuple[str, dict[str, str]]]:
    (tmp_path / "t.csv").write_text(text)
    return [(r.patient, dict(r.values)) for r in attach(read_table(tmp_path / "t.csv"), src)]


@pytest.mark.parametrize("key", ["file", "Filename", "volume_id", "whatever"])
@pytest.mark.parametrize("person", ["patient_id", "Person ID", "subject", "PatientID", "participant_id"])
def test_columns_are_found_by_name_or_by_value(tmp_path: Path, key: str, person: str) -> None:
    rows = joined(tmp_path, f"{person},{key},g\np1,b,1\np2,x/a,2\n", source(["a", "b"]))
    assert [p for p, _ in rows] == ["p2", "p1"]


def test_a_number_column_does_not_steal_the_key(tmp_path: Path) -> None:
    """Ages that happen to be names of files are not the key where a file column is."""
    rows = joined(tmp_path, "age,patient,file\n2,p1,1\n1,p2,2\n", source(["1", "2"]))
    assert [p for p, _ in rows] == ["p1", "p2"]


def test_same_name_in_two_folders_needs_paths(tmp_path: Path) -> None:
    src = source(["x/1", "y/1"])
    assert [p for p, _ in joined(tmp_path, "file,patient\nx/1,p\ny/1,q\n", src)] == ["p", "q"]
    with pytest.raises(CohortError, match="paths below"):
        joined(tmp_path, "file,patient\n1,p\nx/1,q\n", src)


def test_ragged_and_twin_columns(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="1 of 2 rows"):
        joined(tmp_path, "file,patient\na,p\nb\n", source(["a"]))
    with pytest.raises(CohortError, match="same name"):
        joined(tmp_path, "file,File\na,p\n", source(["a"]))


def test_dicom_ages_are_years() -> None:
    assert number("072Y") == 72
    assert number("018M") == 1.5
    assert number("365D") == pytest.approx(1, abs=0.01)
    assert number("12 years") is None
    assert number("inf") is None
