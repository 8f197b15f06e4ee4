"""Guess the layout of a source folder from the files in it. Nothing is decoded here."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medvae.errors import CohortError

Layout = Literal["nifti", "bids", "nnunet", "dicom", "npz", "png"]

NIFTI = (".nii", ".nii.gz")
PICTURES = (".png", ".jpg", ".jpeg")
TABLES = (".csv", ".tsv")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".7z", ".rar")
BESIDE = (*TABLES, *ARCHIVES, ".json", ".txt", ".md", ".xml", ".html", ".pdf", ".bval", ".bvec")
KINDS = {"nifti": "NIfTI", "dicom": "DICOM", "npz": ".npz", "png": "PNG or JPEG"}


@dataclass(frozen=True, repr=False)
class Found:
    """The layout of a source: the image files (sorted), the CSV tables beside them, and a count of strangers."""

    layout: Layout
    root: Path
    files: tuple[Path, ...]
    tables: tuple[Path, ...]
    strangers: int


def discover(source: Path) -> Found:
    """Say which layout `source` has. Raises CohortError where it holds no images, or several kinds of them."""
    if not source.exists():
        raise CohortError("the source does not exist: give a folder of scans or an .npz file")
    if source.is_file():
        return _single(source)
    groups: dict[str, list[Path]] = {}
    try:
        for path in _walk(source):
            groups.setdefault(_kind(path), []).append(path)
    except PermissionError:
        raise CohortError("a part of the source may not be read: grant access to the whole folder") from None
    # Pictures beside scans are snapshots; a folder of pictures alone is a cohort.
    kinds = [k for k in KINDS if k in groups and k != "png"] or [k for k in groups if k == "png"]
    if not kinds:
        raise CohortError(_nothing(groups))
    if len(kinds) > 1:
        counts = " and ".join(f"{len(groups[k])} {KINDS[k]} files" for k in kinds)
        raise CohortError(f"the source holds {counts}: give a folder with one kind of image")
    kind = kinds[0]
    files = tuple(sorted(groups[kind]))
    if kind == "npz" and len(files) > 1:
        raise CohortError(f"the source holds {len(files)} .npz files: give one of them")
    tables = tuple(sorted(groups.get("table", ())))
    return Found(_layout(kind, source, files), source, files, tables, len(groups.get("stranger", ())))


def _single(source: Path) -> Found:
    kind = _kind(source)
    if kind == "npz":
        return Found("npz", source.parent, (source,), (), 0)
    if kind == "archive":
        raise CohortError("the source is a packed archive: unpack it and give the folder")
    if kind in KINDS:
        raise CohortError("the source is a single image: give the folder that holds all scans")
    raise CohortError("the source is not an image: give a folder of NIfTI, DICOM or PNG images, or an .npz file")


def _nothing(groups: dict[str, list[Path]]) -> str:
    if not groups:
        return "the source folder is empty: give a folder of scans"
    if "archive" in groups:
        return f"the source holds {len(groups['archive'])} packed archives and no images: unpack them first"
    count = sum(len(paths) for paths in groups.values())
    return f"none of the {count} files of the source is an image: give NIfTI, DICOM, PNG or .npz"


def _walk(root: Path) -> list[Path]:
    """Return all regular files below root, hidden ones and folders left out; linked files count, linked folders not."""

    def refuse(error: OSError) -> None:
        raise PermissionError

    paths: list[Path] = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        paths += [Path(folder, f) for f in sorted(files) if not f.startswith(".")]
    return [p for p in paths if p.is_file()]


def _kind(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(NIFTI):
        return "nifti"
    if name.endswith(".npz"):
        return "npz"
    if name.endswith(PICTURES):
        return "png"
    if name == "dicomdir":
        return "beside"
    if name.endswith((".dcm", ".ima")) or _preamble(path):
        return "dicom"
    if name.endswith(ARCHIVES):
        return "archive"
    if name.endswith(TABLES):
        return "table"
    return "beside" if name.endswith(BESIDE) or name in {"readme", "license", "changes"} else "stranger"


def _preamble(path: Path) -> bool:
    """Whether the file carries DICOM's magic word after its 128-byte preamble (PS3.10, 7.1)."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _layout(kind: str, root: Path, files: tuple[Path, ...]) -> Layout:
    if kind != "nifti":
        return kind  # type: ignore[return-value]
    parts = [p.relative_to(root).parts for p in files]
    if any(re.fullmatch(r"sub-[A-Za-z0-9]+", p[0]) for p in parts if len(p) > 1):
        return "bids"
    if any(p[0] == "imagesTr" for p in parts):
        return "nnunet"
    return "nifti"


def strangers(found: Found) -> Counter[str]:
    """Return the count of files that are neither images nor tables, as a first entry of the skipped."""
    return Counter({"not an image": found.strangers} if found.strangers else {})
