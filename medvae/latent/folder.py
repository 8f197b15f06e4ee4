"""Folders of what was made from real scans: marked private, whole or not there, and never inside a release."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from medvae.errors import ConfigError, PrivacyError
from medvae.synth.staging import staged_folder

TableFormat = Literal["parquet", "csv", "npz"]
NOTICE = (
    "PRIVATE\n\nThese files were made from scans of real patients. No noise protects them and no epsilon covers them: "
    "treat them as you treat the scans themselves.\nWhat may be shared is made by `medvae release`.\n"
)


@contextmanager
def private_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill that becomes `target`, marked private and closed to other users.

    Raises PrivacyError for a place inside a release, RunError for one that already holds something.
    """
    target = target.resolve()
    if any((parent / "privacy" / "certificate.json").exists() for parent in (target, *target.parents)):
        raise PrivacyError("this folder is part of a release, and what comes from real scans must not enter one")
    with staged_folder(target) as folder:
        folder.chmod(0o700)
        (folder / "PRIVATE.txt").write_text(NOTICE, encoding="utf-8")
        yield folder


def write_summary(folder: Path, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write NAME.json with its provenance and return what it holds."""
    whole = {"schema": f"medvae.{name}/1", "provenance": "private", **facts}
    text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return whole


def write_table(path: Path, columns: Mapping[str, Sequence[Any]], kind: TableFormat) -> str:
    """Write columns of equal length as PATH with the format's ending; return the file's name."""
    path = path.with_suffix(f".{kind}")
    if kind == "npz":
        import numpy as np

        np.savez_compressed(path, allow_pickle=False, **{name: np.asarray(v) for name, v in columns.items()})
    elif kind == "csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    elif kind == "parquet":
        from pyarrow import parquet, table

        parquet.write_table(table(dict(columns)), path)
    else:
        raise ConfigError(f"there is no table format {kind!r}: use parquet, csv or npz")
    return path.name
