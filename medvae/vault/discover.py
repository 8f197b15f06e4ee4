"""Guess the layout of a source from the files in it. Nothing is decoded here."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from medvae.errors import CohortError
from medvae.vault.archives import FOREIGN, is_packed, unpack_all
from medvae.vault.scan import Skipped, below

Layout = Literal["nifti", "bids", "nnunet", "decathlon", "itk", "dicom", "npz", "png"]

NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
TABLES = (".csv", ".tsv")
BESIDE = (*TABLES, ".json", ".txt", ".md", ".xml", ".html", ".pdf", ".bval", ".bvec", ".raw", ".zraw")
KINDS = {"nifti": "NIfTI", "dicom": "DICOM", "npz": ".npz", "itk": "NRRD or MetaImage", "png": "PNG, JPEG or TIFF"}
IN_WORDS: dict[Layout, str] = {
    "nifti": "a folder of NIfTI files",
    "bids": "a BIDS data set (patients: its sub- folders)",
    "nnunet": "nnU-Net's raw layout (imagesTr, labelsTr, channels by number)",
    "decathlon": "a Medical Decathlon task (dataset.json names images and masks)",
    "itk": "a folder of NRRD or MetaImage files",
    "dicom": "a tree of DICOM files",
    "npz": "an .npz archive of arrays, as MedMNIST's",
    "png": "a folder of pictures",
}


@dataclass(frozen=True, repr=False)
class Found:
    """The layout of a source: image files (sorted), CSV tables beside them, what was left, and where names begin:
    at the source, or at the folder where its archives were unpacked."""

    layout: Layout
    roots: tuple[Path, ...]
    files: tuple[Path, ...]
    tables: tuple[Path, ...]
    skipped: Skipped
    card: dict[str, Any] | None = None

    @cached_property
    def root(self) -> Path:
        """The folder whose files are meant by the layout."""
        return next((r for r in reversed(self.roots) if self.files and self.files[0].is_relative_to(r)), self.roots[0])

    def parts(self, path: Path) -> tuple[str, ...]:
        """Return the path below its root, in parts."""
        return path.relative_to(self.root if path.is_relative_to(self.root) else self.roots[0]).parts

    def name(self, path: Path | str) -> str:
        """Return the path below its root, as tables write it."""
        text, root = str(path), f"{self.root}/"
        return text.removeprefix(root) if text.startswith(root) else "/".join(self.parts(Path(path)))

    def sentence(self) -> str:
        """Say what was guessed."""
        return f"read as {IN_WORDS[self.layout]}: {len(self.files)} image files"


def discover(source: Path, unpacked: Path | None = None, max_unpacked: int = 2**36) -> Found:
    """Say which layout `source` has, after unpacking its archives into the folder `unpacked`.

    Raises CohortError where it holds no images, or several kinds of them.
    """
    if not source.exists():
        raise CohortError("the source does not exist: give a folder of scans, an archive or an .npz file")
    skipped = Skipped()
    try:
        paths = [source] if source.is_file() else _walk(source)
        archives = [p for p in paths if is_packed(p)]
        if archives and unpacked is None:
            raise CohortError("the source holds packed archives: unpack them first")
        roots: tuple[Path, ...] = (source.parent if source.is_file() else source,)
        if archives and unpacked is not None:
            unpack_all(source, archives, unpacked, max_unpacked, skipped)
            paths = [p for p in paths if p not in set(archives)] + _walk(unpacked)
            roots = (*roots, _innermost(unpacked / source.name) if source.is_file() else unpacked)
        if source.is_file() and not archives:
            paths = _single(source, skipped)
        return _sorted_out(paths, roots, skipped)
    except PermissionError:
        raise CohortError("a part of the source may not be read: grant access to the whole folder") from None


def _sorted_out(paths: list[Path], roots: tuple[Path, ...], skipped: Skipped) -> Found:
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(_kind(path), []).append(path)
    # Pictures beside scans are snapshots; a folder of pictures alone is a cohort.
    kinds = [k for k in KINDS if k in groups and k != "png"] or [k for k in groups if k == "png"]
    if not kinds:
        raise CohortError(_nothing(groups, skipped))
    if len(kinds) > 1:
        counts = " and ".join(f"{len(groups[k])} {KINDS[k]} files" for k in kinds)
        raise CohortError(f"the source holds {counts}: give a folder with one kind of image")
    kind = kinds[0]
    files = tuple(sorted(groups[kind]))
    if kind == "npz" and len(files) > 1:
        raise CohortError(f"the source holds {len(files)} .npz files: give one of them")
    for path in (*groups.get("stranger", ()), *(groups.get("png", ()) if kind != "png" else ())):
        root = next(r for r in reversed(roots) if path.is_relative_to(r))
        skipped.leave("not an image", below(path, root))
    tables = tuple(sorted(groups.get("table", ())))
    found = Found(kind, roots, files, tables, skipped)  # type: ignore[arg-type]
    return found if kind not in ("nifti", "itk") else _by_folders(found)


def _single(source: Path, skipped: Skipped) -> list[Path]:
    """Return the files that a single file stands for: an .npz itself, or what a DICOMDIR lists."""
    kind = _kind(source)
    if kind == "npz":
        return [source]
    if source.name.upper() == "DICOMDIR":
        return listed_files(source, skipped)
    if kind == "foreign":
        raise CohortError("the source is a packed archive of a kind that is not read: unpack it and give the folder")
    if kind in KINDS:
        raise CohortError("the source is a single image: give the folder that holds all scans")
    raise CohortError("the source is not an image: give a folder of NIfTI, DICOM or PNG images, or an .npz file")


def listed_files(directory: Path, skipped: Skipped) -> list[Path]:
    """Return the files that a DICOMDIR lists (PS3.3, F.3), those inside its own folder and no others."""
    import pydicom

    folder = directory.parent.resolve()
    try:
        records = pydicom.dcmread(directory, specific_tags=["DirectoryRecordSequence"]).DirectoryRecordSequence
        names = [r.ReferencedFileID for r in records if r.get("ReferencedFileID")]
    except Exception:  # pydicom raises many kinds on foreign bytes
        raise CohortError("the DICOMDIR cannot be read: give its folder instead") from None
    found = []
    for name in names:
        parts = [name] if isinstance(name, str) else list(name)
        path = folder.joinpath(*parts)
        real = path.resolve()
        if any(p in ("..", "") or "/" in p or "\\" in p for p in parts) or not real.is_relative_to(folder):
            skipped.leave("data outside its own folder")
        elif not real.is_file():
            skipped.leave("unreadable file", "/".join(parts))
        else:
            found.append(directory.parent.joinpath(*parts))
    if not found:
        raise CohortError("the DICOMDIR lists no file that is there: give its folder instead")
    return found


def _nothing(groups: dict[str, list[Path]], skipped: Skipped) -> str:
    if skipped:
        reason, count = skipped.most_common(1)[0]
        return f"the source's archives hold no image that could be unpacked ({count}: {reason}): unpack them by hand"
    if not groups:
        return "the source folder is empty: give a folder of scans"
    if "foreign" in groups:
        return f"the source holds {len(groups['foreign'])} packed archives and no images: unpack them first"
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


def _innermost(folder: Path) -> Path:
    """Go down while a folder holds nothing but one folder, as archives of a folder do."""
    while True:
        inside = [p for p in folder.iterdir() if not p.name.startswith(".")]
        if len(inside) != 1 or not inside[0].is_dir():
            return folder
        folder = inside[0]


def _kind(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(NIFTI):
        return "nifti"
    if name.endswith(ITK):
        return "itk"
    if name.endswith(".npz"):
        return "npz"
    if name.endswith(PICTURES):
        return "png"
    if name == "dicomdir":
        return "beside"
    if name.endswith((".dcm", ".ima")):
        return "dicom"
    if name.endswith(TABLES):
        return "table"
    if is_packed(path) or name.endswith(FOREIGN):
        return "foreign"
    if name.endswith(BESIDE) or name in {"readme", "license", "changes"}:
        return "beside"
    return "dicom" if _preamble(path) else "stranger"


def _preamble(path: Path) -> bool:
    """Whether the file carries DICOM's magic word after its 128-byte preamble (PS3.10, 7.1)."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _by_folders(found: Found) -> Found:
    """Tell the layouts of volumes apart by their folders and by dataset.json."""
    parts = [found.parts(p) for p in found.files]
    if found.layout == "nifti" and any(re.fullmatch(r"sub-[A-Za-z0-9]+", p[0]) for p in parts if len(p) > 1):
        return _as(found, "bids")
    card = _card(found.root)
    listed = card.get("training")
    if isinstance(listed, list) and listed and all(isinstance(e, dict) and "image" in e for e in listed):
        return _as(found, "decathlon", card)
    if any(p[0] == "imagesTr" for p in parts):
        return _as(found, "nnunet", card)
    return found


def _as(found: Found, layout: Layout, card: dict[str, Any] | None = None) -> Found:
    return Found(layout, found.roots, found.files, found.tables, found.skipped, card)


def _card(root: Path) -> dict[str, Any]:
    try:
        card = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}


def strangers(found: Found) -> Skipped:
    """Return a count of its own that begins with what discovery left out."""
    start = Skipped(found.skipped)
    start.files = list(found.skipped.files)
    return start
