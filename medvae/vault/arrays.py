"""MedMNIST-style .npz archives, read row by row, and folders of PNG or JPEG pictures."""

from __future__ import annotations

import math
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from medvae.errors import CohortError
from medvae.vault.discover import Found, strangers
from medvae.vault.nifti import split_masks
from medvae.vault.scan import MAX_PIXELS, MAX_VOXELS, Scan, Source, Split, Unusable, Volume, names_of, stem

PARTS: tuple[tuple[str, Split | None], ...] = (
    ("train_", "train"), ("val_", "holdout"), ("test_", "holdout"), ("", None),
)  # fmt: skip
ROW_NOTE = (
    "each row of the .npz counts as one patient, as it names none: if a person has several rows, epsilon protects a "
    "row and not the person"
)
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
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile):
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


def npz_source(found: Found) -> Source:
    """List the rows of `[train_|val_|test_]images`, with labels, masks, patients and further columns beside them.

    Arrays of val_ and test_ are held out. Raises CohortError for a torn file, pickled or colour arrays.
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
            scans += _rows(images, masks, columns, prefix, split if fixed else None)
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile):
        raise CohortError(TORN) from None
    if not scans:
        raise CohortError("the .npz holds no array named images or train_images: name the arrays as MedMNIST does")
    shapes = {s.shape[1:] for s in streams}
    shape = streams[0].shape[1:]
    if len(shapes) > 1 or len({s.dtype for s in streams}) > 1:
        raise CohortError("the image arrays of the .npz differ in size or type: make them alike")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[-1] in (3, 4)):
        raise CohortError(f"the images of the .npz have the shape {shape}: give grayscale images in 2D or 3D")
    own = any(s.patient is not None and not s.patient.startswith("\0row") for s in scans)
    return Source(
        "npz", len(shape), scans, shape=shape, window=_window(streams[0].dtype), skipped=strangers(found),
        unit_note="" if own else ROW_NOTE,
    )  # fmt: skip


def _columns(path: Path, members: dict[str, str], prefix: str, count: int) -> dict[str, npt.NDArray[Any]]:
    """Return the one-dimensional arrays of a part by name, such as labels, patients, age; each has `count` rows."""
    columns: dict[str, npt.NDArray[Any]] = {}
    others = [p for p, _ in PARTS if p and p != prefix]
    with np.load(path, allow_pickle=False) as archive:
        for key in members:
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or name in ("images", "masks") or (not prefix and key.startswith((*others,))):
                continue
            values = archive[key]
            if values.ndim == 2 and values.shape[1] == 1:
                values = values[:, 0]
            if name in ("labels", "patients") and values.shape != (count,):
                raise CohortError(f"the .npz has {count} images and {name} of the shape {values.shape}: give one a row")
            if values.shape == (count,):
                columns[name] = values
    return columns


def _rows(
    images: RowStream, masks: RowStream | None, columns: dict[str, npt.NDArray[Any]], prefix: str, split: Split | None
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
            names=frozenset(),
            read=partial(_read_row, images, masks, i),
            patient=f"\0row {prefix}{i}" if patients is None else str(patients[i]),
            attributes={name: values[i] for name, values in text.items()},
            split=split,
            has_mask=masks is not None,
        )
        for i in range(count)
    ]


def _read_row(images: RowStream, masks: RowStream | None, index: int) -> Volume:
    mask = None if masks is None else masks.row(index)
    return Volume(images.row(index).astype(np.float32), mask=mask)


def _window(dtype: np.dtype[Any]) -> tuple[float, float] | None:
    """Return the natural range of 8-bit samples; wider types have none that is meaningful."""
    return (0.0, 1.0) if dtype.kind == "b" else (0.0, 255.0) if dtype == np.uint8 else None


def picture_source(found: Found) -> Source:
    """List the pictures of a folder, with masks from masks/ or labels/."""
    images, masks, skipped = split_masks(found)
    scans = []
    for path in images:
        alone = sum(stem(p.name) == stem(path.name) for p in images) == 1 if masks else True
        mask = masks.pop(stem(path.name), None) if alone else None
        scans.append(Scan(names_of(path, found.root), partial(read_picture, path, mask), has_mask=mask is not None))
    skipped["mask without an image"] += len(masks)
    eight = all(_bits(p) == 8 for p in images)
    table = found.tables[0] if len(found.tables) == 1 else None
    return Source(
        "png", 2, scans, window=(0.0, 255.0) if eight else None, table=table, skipped=strangers(found) + skipped
    )


def _bits(path: Path) -> int:
    """Return 8 or 16 by the header alone; files that cannot be opened are judged when they are read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return 16 if image.mode.startswith(("I", "F")) else 8
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 8


def read_picture(path: Path, mask: Path | None) -> Volume:
    """Read one picture, (rows, columns); colour files are taken only where all channels are equal."""
    image = _picture(path).astype(np.float32)
    return Volume(image) if mask is None else Volume(image, mask=_picture(mask, labels=True))


def _picture(path: Path, labels: bool = False) -> npt.NDArray[Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unusable("header claims an absurd size")
            if image.mode == "1":
                image = image.convert("L")  # type: ignore[assignment]
            elif (
                image.mode not in ("L", "F", "I")
                and not image.mode.startswith("I;16")
                and not (
                    labels and image.mode == "P"  # a palette mask's indices are its labels
                )
            ):
                image = image.convert("RGB")  # type: ignore[assignment]
            array = np.asarray(image)
    except Image.DecompressionBombError:
        raise Unusable("header claims an absurd size") from None
    except UnidentifiedImageError:
        raise Unusable("not an image") from None
    except (OSError, ValueError, SyntaxError, EOFError, zlib.error):
        raise Unusable("truncated file") from None
    if array.ndim == 3:
        if (array != array[..., :1]).any():
            raise Unusable("colour")
        array = array[..., 0]
    return array
