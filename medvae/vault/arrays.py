"""MedMNIST-style .npz archives, read row by row."""

from __future__ import annotations

import math
import zipfile
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from medvae.errors import CohortError
from medvae.vault.discover import Found, strangers
from medvae.vault.nifti import LUMINANCE
from medvae.vault.scan import MAX_VOXELS, Rules, Scan, Source, Split, Volume

PARTS: tuple[tuple[str, Split | None], ...] = (
    ("train_", "train"), ("val_", "holdout"), ("test_", "holdout"), ("", None),
)  # fmt: skip
ROW_NOTE = (
    "each row of the .npz counts as one patient, as it names none: if a person has several rows, epsilon protects a "
    "row and not the person"
)
MAX_CELL = 4096  # bytes of one value in a column
TORN = "the .npz file is truncated or holds other things than plain arrays: save it again with numpy.savez"


class RowStream:
    """The rows of one array of an .npz, decompressed one after the other: memory holds one row.

    Rows can be asked for in rising order only.
    """

    def __init__(self, path: Path, member: str) -> None:
        self._path, self._member = path, member
        self._stream: IO[bytes] | None = None
        self._next = 0
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            self.shape, self.dtype = _array_header(stream)
            size = archive.getinfo(member).file_size
        self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        if self.shape[0] * self._row_bytes > size or math.prod(self.shape[1:]) > MAX_VOXELS:
            raise CohortError(TORN)

    def row(self, index: int) -> npt.NDArray[Any]:
        """Return row `index`, of the shape `shape[1:]`."""
        try:
            if self._stream is None:
                self._stream = zipfile.ZipFile(self._path).open(self._member)  # noqa: SIM115 - read on through many calls
                _array_header(self._stream)
            while self._next < index:
                self._stream.read(self._row_bytes)
                self._next += 1
            data = self._stream.read(self._row_bytes)
            self._next += 1
        except Exception:  # zipfile raises many kinds on foreign bytes
            raise CohortError(TORN) from None
        if len(data) < self._row_bytes:
            raise CohortError(TORN)
        return np.frombuffer(data, dtype=self.dtype).reshape(self.shape[1:])


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if fortran or dtype.kind not in "buif" or len(shape) < 1:
        raise CohortError("the .npz holds arrays that are not plain numbers in C order: save them with numpy.savez")
    return shape, dtype


def npz_source(found: Found, rules: Rules = Rules()) -> Source:  # noqa: B008 - frozen
    """List the rows of `[train_|val_|test_]images`, with labels, masks, patients and further columns beside them.

    Arrays of val_ and test_ are held out. Raises CohortError for a torn file, pickled arrays, and colour where it is
    refused.
    """
    path = found.files[0]
    try:
        with zipfile.ZipFile(path) as archive:
            members = {n.removesuffix(".npy"): n for n in archive.namelist() if n.endswith(".npy")}
        parts = [(prefix, split) for prefix, split in PARTS if f"{prefix}images" in members]
        fixed = {split for _, split in parts} >= {"train", "holdout"}
        scans: list[Scan] = []
        streams: list[RowStream] = []
        for prefix, split in parts:
            images = RowStream(path, members[f"{prefix}images"])
            masks = RowStream(path, members[f"{prefix}masks"]) if f"{prefix}masks" in members else None
            columns = _columns(path, members, prefix, images.shape[0])
            streams.append(images)
            scans += _rows(images, masks, columns, prefix, split if fixed else None, rules)
    except CohortError:
        raise
    except Exception:  # zipfile and numpy raise many kinds on foreign bytes
        raise CohortError(TORN) from None
    if not scans:
        raise CohortError("the .npz holds no array named images or train_images: name the arrays as MedMNIST does")
    shapes = {s.shape[1:] for s in streams}
    shape = streams[0].shape[1:]
    if len(shapes) > 1 or len({s.dtype for s in streams}) > 1:
        raise CohortError("the image arrays of the .npz differ in size or type: make them alike")
    if _coloured(shape):
        if rules.colour == "refuse":
            raise CohortError(f"the images of the .npz have the shape {shape} in colour: give --colour luminance")
        shape = shape[:-1]
    if len(shape) not in (2, 3):
        raise CohortError(f"the images of the .npz have the shape {shape}: give grayscale images in 2D or 3D")
    own = any(s.patient is not None and not s.patient.startswith("\0row") for s in scans)
    return Source(
        "npz", len(shape), scans, shape=shape, window=_window(streams[0].dtype), skipped=strangers(found),
        unit_note="" if own else ROW_NOTE,
    )  # fmt: skip


def _coloured(shape: tuple[int, ...]) -> bool:
    """Whether rows of that shape are pictures in colour, as MedMNIST writes them: (rows, columns, 3)."""
    return len(shape) in (3, 4) and shape[-1] in (3, 4)


def _columns(path: Path, members: dict[str, str], prefix: str, count: int) -> dict[str, npt.NDArray[Any]]:
    """Return the one-dimensional arrays of a part by name, such as labels, patients, age; each has `count` rows."""
    columns: dict[str, npt.NDArray[Any]] = {}
    others = [p for p, _ in PARTS if p and p != prefix]
    with np.load(path, allow_pickle=False) as archive:
        for key in members:
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or name in ("images", "masks") or (not prefix and key.startswith((*others,))):
                continue
            if not _is_column(path, members[key], count):
                if name in ("labels", "patients"):
                    raise CohortError(f"the .npz has {count} images and {name} of another shape: give one a row")
                continue
            values = archive[key]
            if values.ndim == 2 and values.shape[1] == 1:
                values = values[:, 0]
            columns[name] = values
    return columns


def _is_column(path: Path, member: str, count: int) -> bool:
    """Whether an array has one value a row, by its header alone: a member may claim any size."""
    with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    return shape in ((count,), (count, 1)) and dtype.itemsize <= MAX_CELL


def _rows(
    images: RowStream,
    masks: RowStream | None,
    columns: dict[str, npt.NDArray[Any]],
    prefix: str,
    split: Split | None,
    rules: Rules,
) -> list[Scan]:
    count = images.shape[0]
    if masks is not None and masks.shape[0] != count:
        raise CohortError(f"the .npz has {count} images and {masks.shape[0]} masks: give one mask an image")
    patients = columns.pop("patients", None)
    if "labels" in columns:
        columns["label"] = columns.pop("labels")
    text = {name: [str(v) for v in values.tolist()] for name, values in columns.items()}
    return [
        Scan(
            files=(),
            read=partial(_read_row, images, masks, i, _coloured(images.shape[1:]) and rules.colour == "luminance"),
            patient=f"\0row {prefix}{i}" if patients is None else str(patients[i]),
            attributes={name: values[i] for name, values in text.items()},
            split=split,
            has_mask=masks is not None,
        )
        for i in range(count)
    ]


def _read_row(images: RowStream, masks: RowStream | None, index: int, coloured: bool) -> Volume:
    mask = None if masks is None else masks.row(index)
    row = images.row(index)
    return Volume((row[..., :3] @ LUMINANCE if coloured else row).astype(np.float32), mask=mask)


def _window(dtype: np.dtype[Any]) -> tuple[float, float] | None:
    """Return the natural range of 8-bit samples; wider types have none that is meaningful."""
    return (0.0, 1.0) if dtype.kind == "b" else (0.0, 255.0) if dtype == np.uint8 else None
