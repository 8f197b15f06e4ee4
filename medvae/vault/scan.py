"""What the readers of the vault hand on: a scan that can be read later, and why a scan could not be used.

Everything here lives in memory only. Names and patient ids of a `Scan` serve to join tables and to group by
patient; nothing of them is written or put into a message.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medvae.types import FloatArray

Split = Literal["train", "holdout"]

MAX_VOXELS = 2**28  # a gigabyte of float32: the largest scan that is decoded
MAX_PIXELS = 2**26  # 8192 x 8192: the largest single image that is decoded

REMEDIES: dict[str, str] = {
    "not an image": "give a folder of NIfTI, DICOM or PNG images, or an .npz file",
    "truncated file": "copy the files again from their source",
    "unreadable file": "copy the files again, or leave them out",
    "undecodable pixel data": "convert the files to an uncompressed transfer syntax",
    "no pixel data": "give image objects, not reports or structure sets",
    "no image size (Rows, Columns)": "give image objects, not reports or structure sets",
    "no PixelSpacing": "export with spacing, or ingest in 2D without spacing_mm",
    "no slice position or orientation": "export with ImagePositionPatient and ImageOrientationPatient, or ingest in 2D",
    "no PatientID": "give a table with file and patient_id columns",
    "mixed orientations": "keep one orientation a series, or set slice_gap to skip",
    "slices of different size or spacing": "keep one matrix size and spacing a series, or set slice_gap to skip",
    "slice gaps or uneven spacing": "complete the series, or set slice_gap to skip",
    "a single slice where volumes are asked": "ingest in 2D with a shape of two numbers",
    "a volume where single slices are asked": "give a shape of three numbers",
    "colour": "convert to grayscale",
    "multi-frame": "convert to single-frame objects or NIfTI",
    "more than three dimensions": "split time series or channels into single volumes",
    "header claims an absurd size": "check the file's header",
    "header cannot be read": "check or rewrite the file's header",
    "affine is singular or not finite": "repair the header's orientation",
    "affine has shear (gantry tilt)": "resample to a rectangular grid first",
    "not finite": "replace NaN and infinite values",
    "constant": "leave empty images out, or choose a window that holds the tissue",
    "further channel": "one channel a scan is used",
    "test image of the layout": "only training images are used",
    "duplicate file": "one copy is used",
    "mask without an image": "give the image, too",
    "over max_scans_per_patient": "raise max_scans_per_patient",
}
GEOMETRY = frozenset({"mixed orientations", "slices of different size or spacing", "slice gaps or uneven spacing"})


class Unusable(Exception):
    """A verdict on one scan, and no error: `reason` is a key of `REMEDIES`, and all that is kept of it is a count."""

    def __init__(self, reason: str) -> None:
        if reason not in REMEDIES:
            raise ValueError("unknown reason")
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, repr=False)
class Volume:
    """One decoded scan.

    array: (X, Y, Z) with `affine` to RAS millimetres (4, 4), or (rows, columns) or (X, Y, Z) with none.
    mask: integer labels of any shape (compared with the array's later), or None.
    `mask_affine` is compared with `affine` where both are known.
    """

    array: FloatArray
    affine: npt.NDArray[np.float64] | None = None
    mask: npt.NDArray[Any] | None = None
    mask_affine: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, repr=False)
class Scan:
    """One scan as found, before it is decoded.

    names: what a table may call it; patient: the id the source itself gives, if any; attributes: allow-listed
    values that may serve as conditions; split: where the source itself fixes it.
    """

    names: frozenset[str]
    read: Callable[[], Volume]
    patient: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    split: Split | None = None
    has_mask: bool = False


@dataclass(repr=False)
class Source:
    """All scans of a source, with the public facts that the preprocessing needs.

    shape: the scans' own shape where all have one (npz); window: the natural public range of the sample format,
    such as (0, 255); spaced: whether millimetres are known; unused: names of files that were
    seen but not used, and the patients known of them.
    """

    layout: str
    dims: int
    scans: list[Scan]
    modality: str = "OT"
    shape: tuple[int, ...] | None = None
    window: tuple[float, float] | None = None
    spaced: bool = False
    table: Path | None = None
    unused: set[str] = field(default_factory=set)
    unused_patients: set[str] = field(default_factory=set)
    skipped: Counter[str] = field(default_factory=Counter)
    unit_note: str = ""


def names_of(path: Path, root: Path) -> frozenset[str]:
    """Return what a table may call the file: path below root or bare name, each with and without extension."""
    relative = path.relative_to(root).as_posix()
    return frozenset({relative, path.name, stem(relative), stem(path.name)})


def stem(name: str) -> str:
    """Return the name without its image extension; .nii.gz counts as one."""
    lower = name.lower()
    for extension in (".nii.gz", ".nii", ".dcm", ".ima", ".png", ".jpg", ".jpeg"):
        if lower.endswith(extension):
            return name[: -len(extension)]
    return name


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and logs of the file-format libraries: they quote header values, which may identify."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
