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
MAX_LISTED = 100_000  # files in the private list of what was skipped


@dataclass(frozen=True)
class Rules:
    """What the readers take and what they count and leave, from the config; see IngestConfig for the words."""

    colour: Literal["refuse", "luminance"] = "refuse"
    frames: Literal["refuse", "first", "mean", "all"] = "refuse"
    slice_gap: Literal["refuse", "skip", "resample"] = "refuse"
    burned_in: Literal["note", "skip", "refuse"] = "note"
    display: bool = False
    max_voxels: int = MAX_VOXELS

    @property
    def max_pixels(self) -> int:
        """The most pixels of a single image."""
        return min(MAX_PIXELS, self.max_voxels)


EXTENSIONS = (
    ".nii.gz", ".nii", ".dcm", ".ima", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".nrrd", ".nhdr", ".mha",
    ".mhd",
)  # fmt: skip

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
    "slices of different size or spacing": "keep one matrix size and spacing a series, or set slice_gap to skip",
    "slice gaps or uneven spacing": "complete the series, or set slice_gap to skip or resample",
    "gantry tilt": "set slice_gap to skip or resample",
    "a single slice where volumes are asked": "ingest in 2D with a shape of two numbers",
    "a volume where single slices are asked": "give a shape of three numbers",
    "colour": "give --colour luminance, or convert to grayscale",
    "several frames and no rule for them": "give --frames first, mean or all",
    "no scan but a plan, dose, report or the like": "give image objects",
    "two slices at one place": "keep one acquisition a series",
    "too long a hole in the series": "complete the series",
    "compressed image of another size than its header": "export the files again from their archive",
    "may show burned-in text": "clean the pixels, or set burned_in to note",
    "no window in the header": "choose another intensity than display",
    "segmentation that fits no series": "give the series it was drawn on, on the same grid",
    "several segmentations of one series": "keep one segmentation a series",
    "same pixels as another file": "one copy is used",
    "same pixels as a scan of another patient": "the two patients are counted as one",
    "unsafe name or link in an archive": "pack the folder again with plain files",
    "archive within an archive": "unpack it first",
    "unreadable archive": "pack the folder again, as zip or tar",
    "data outside its own folder": "keep the pixel file beside its header",
    "decoder crashed": "convert the files to an uncompressed transfer syntax",
    "missing value of a condition": "fill the table in, or set missing to class",
    "complex numbers": "give magnitudes",
    "header claims an absurd size": "check the file's header, or raise max_voxels",
    "header cannot be read": "check or rewrite the file's header",
    "affine is singular or not finite": "repair the header's orientation",
    "affine has shear": "resample to a rectangular grid first",
    "not finite": "replace NaN and infinite values",
    "constant": "leave empty images out, or choose a window that holds the tissue",
    "further channel": "one channel a scan is used",
    "test image of the layout": "only training images are used",
    "duplicate file": "one copy is used",
    "mask without an image": "give the image, too",
    "over max_scans_per_patient": "raise max_scans_per_patient",
}
GEOMETRY = frozenset({"slices of different size or spacing", "slice gaps or uneven spacing", "gantry tilt"})


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

    files: its files, as paths below the source's root; also: further names that a table may use; patient: the id the
    source itself gives, if any; attributes: allow-listed values that may serve as conditions; split: where the source
    itself fixes it.
    """

    files: tuple[str, ...]
    read: Callable[[], Volume]
    patient: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    split: Split | None = None
    has_mask: bool = False
    also: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """What a table may call it: made when it is asked for, as a large archive has millions of them."""
        return frozenset().union(self.also, *map(names_of, self.files)) - {""}


@dataclass(repr=False)
class Source:
    """All scans of a source, with the public facts that the preprocessing needs.

    shape: the scans' own shape where all have one (npz); window: the natural public range of the sample format,
    such as (0, 255); spaced: whether millimetres are known; unused: names of files that were seen but not used, and the
    patients known of them; notes: what the reader has to say, in counts.
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
    skipped: Skipped = field(default_factory=lambda: Skipped())
    unit_note: str = ""
    notes: list[str] = field(default_factory=list)


class Skipped(Counter[str]):
    """Counts by reason, with the files behind them as far as they are known: those go to the private list only."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.files: list[tuple[str, str]] = []

    def leave(self, reason: str, *files: str, count: int = 1) -> None:
        """Count a reason; remember the files, up to a bound."""
        self[reason] += count
        if len(self.files) < MAX_LISTED:
            self.files += [(reason, f) for f in files]


def names_of(relative: str) -> frozenset[str]:
    """Return what a table may call a file: path below the root or bare name, each with and without extension."""
    bare = relative.rpartition("/")[2]
    return frozenset({relative, bare, stem(relative), stem(bare)})


def below(path: Path, root: Path) -> str:
    """Return a path below its root in the form that names are made of."""
    return path.relative_to(root).as_posix()


def stem(name: str) -> str:
    """Return the name without its image extension; .nii.gz counts as one."""
    lower = name.lower()
    for extension in EXTENSIONS:
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
