"""The cohort store: arrays on disk that are written as a stream and read by memory map, never as a whole."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from medvae.errors import CohortError
from medvae.types import Batch, FloatArray, ImageSpace, Private
from medvae.vault.scan import Split
from medvae.vault.workplace import Workplace

SCHEMA = "medvae.cohort/1"
LEVELS = 65535  # [0, 1] as uint16: a step of 1.5e-5, far below any scanner's noise
CHUNK = 2**22
SPLITS: tuple[Split, Split] = ("train", "holdout")


class CohortWriter:
    """Writes a cohort folder scan by scan into a hidden sibling and renames it at the end.

    Leaving the block by an error or without `finish` removes everything; Ctrl-C leaves it to be gone on with, where a
    `place` with a story is given. The arrays are appended with plain writes and not through a memory map, so that a
    full disk is an OSError and not a crash.
    """

    def __init__(self, out: Path, shape: tuple[int, ...], masks: bool, place: Workplace | None = None) -> None:
        self._own = Workplace(out) if place is None else None
        self._place = place or self._own
        self._shape = shape
        self._with_masks = masks
        self._patients: list[int] = []
        self._conditions: list[FloatArray] = []
        self._images: _Appender | None = None
        self._masks: _Appender | None = None

    def __enter__(self) -> CohortWriter:
        if self._own is not None:
            self._own.__enter__()
            self.open()
        return self

    def open(self, rows: int = 0) -> None:
        """Begin after `rows` scans that an interrupted run has written. Raises CohortError where they are not there."""
        folder = self._folder
        self._images = _Appender(folder / "images.npy", np.dtype("<u2"), self._shape, rows)
        if self._with_masks:
            self._masks = _Appender(folder / "masks.npy", np.dtype("|u1"), self._shape, rows)

    @property
    def _folder(self) -> Path:
        if self._place is None:
            raise ValueError("the writer has no place")
        return self._place.folder

    def append(
        self, image: npt.NDArray[Any], mask: npt.NDArray[np.uint8] | None, patient: int, condition: FloatArray
    ) -> None:
        """Add one scan: image (*shape) as `levels` gives it, mask (*shape) of labels, the encoded condition (K,)."""
        if self._images is None:
            raise ValueError("the writer is not open")
        self._images.append(image if image.dtype == np.uint16 else levels(image))
        if self._masks is not None and mask is not None:
            self._masks.append(mask)
        self.remember(patient, condition)

    def remember(self, patient: int, condition: FloatArray) -> None:
        """Take note of a scan that an interrupted run has written."""
        self._patients.append(patient)
        self._conditions.append(condition)

    def finish(
        self, info: Mapping[str, Any], sides: Mapping[int, Split], same: Mapping[int, int] | None = None
    ) -> None:
        """Write index, key and, last, cohort.json; then give the folder its name.

        sides: the split of every patient number that was appended; same: numbers that turned out to be another's.
        Numbers become 0 to patients - 1.
        """
        if self._images is None or self._place is None:
            raise ValueError("the writer is not open")
        self._images.close()
        if self._masks is not None:
            self._masks.close()
        owners = [(same or {}).get(p, p) for p in self._patients]
        numbers, patient = np.unique(np.asarray(owners, dtype="<i8"), return_inverse=True)
        split = np.asarray([SPLITS.index(sides[int(n)]) for n in numbers], dtype=np.uint8)
        index = io.BytesIO()
        condition = np.stack(self._conditions).astype("<f4")
        np.savez(index, patient=patient.astype("<i8"), split=split, condition=condition)
        (self._folder / "index.npz").write_bytes(index.getvalue())
        key = os.open(self._folder / "key", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(key, "wb") as stream:
            stream.write(secrets.token_bytes(32))
        text = json.dumps(info, indent=2, allow_nan=False) + "\n"
        (self._folder / "cohort.json").write_text(text, encoding="utf-8")
        self._place.deliver()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for appender in (self._images, self._masks):
            if appender is not None:
                appender.abandon()
        if self._own is not None:
            self._own.__exit__(kind, error, trace)


def levels(image: FloatArray) -> npt.NDArray[np.uint16]:
    """Return an image in [0, 1] as it is stored."""
    stored: npt.NDArray[np.uint16] = np.rint(image * np.float32(LEVELS)).astype("<u2")
    return stored


class _Appender:
    """An .npy file that grows by rows; its header is written again with the final length."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], rows: int = 0) -> None:
        self._dtype, self._shape, self._rows = dtype, shape, rows
        self._stream: IO[bytes] = path.open("r+b" if rows else "wb")
        header = self._header()
        end = len(header) + rows * int(np.prod(shape)) * dtype.itemsize
        if rows and os.fstat(self._stream.fileno()).st_size < end:
            raise CohortError("what an interrupted run has left is torn, and was removed: run the command again")
        self._stream.truncate(end if rows else 0)
        self._stream.write(header)
        self._stream.seek(end)

    def _header(self) -> bytes:
        # numpy pads headers so that the first axis may grow in place.
        header = io.BytesIO()
        fields = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows, *self._shape)}
        np.lib.format.write_array_header_1_0(header, fields)
        return header.getvalue()

    def append(self, row: npt.NDArray[Any]) -> None:
        if row.shape != self._shape or row.dtype != self._dtype:
            raise ValueError("a row of another shape or type")
        self._stream.write(np.ascontiguousarray(row).tobytes())
        self._stream.flush()
        self._rows += 1

    def close(self) -> None:
        self._stream.seek(0)
        self._stream.write(self._header())
        self._stream.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # the disk is full: the file is about to be removed
            self._stream.close()


class CohortStore:
    """A cohort on disk. Rows are scans; patients are integers 0 to patients - 1. Nothing here is ever a copy of all.

    space: the public facts; info: the content of cohort.json.
    """

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.info = info
        self.space = ImageSpace.from_json(info["space"])
        self._folder = folder
        self._images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        self._masks = np.load(folder / "masks.npy", mmap_mode="r", allow_pickle=False) if info["masks"] else None
        with np.load(folder / "index.npz", allow_pickle=False) as index:
            self.patient: npt.NDArray[np.int64] = index["patient"]
            self.split: npt.NDArray[np.uint8] = index["split"]
            self.condition: FloatArray = index["condition"]
        rows = (info["images"], *self.space.spatial_shape)
        fits = self._images.shape == rows and self._images.dtype == np.uint16
        fits &= self._masks is None or (self._masks.shape == rows and self._masks.dtype == np.uint8)
        fits &= self.patient.shape == (info["images"],) and self.split.shape == (info["patients"],)
        fits &= self.condition.shape == (info["images"], self.space.condition_width)
        if not fits:
            raise ValueError("the arrays do not match cohort.json")
        self._order = np.argsort(self.patient, kind="stable")
        self._starts = np.searchsorted(self.patient[self._order], np.arange(info["patients"] + 1))

    def __repr__(self) -> str:
        return "CohortStore()"

    def __len__(self) -> int:
        return len(self.patient)

    def patients(self, split: Split) -> npt.NDArray[np.int64]:
        """Return the patients of a split, rising."""
        return np.flatnonzero(self.split == SPLITS.index(split)).astype(np.int64)

    def rows(self, patients: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the rows of the given patients, patient after patient in the given order."""
        parts = [self._order[self._starts[p] : self._starts[p + 1]] for p in np.atleast_1d(np.asarray(patients, int))]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)

    def load(self, rows: npt.ArrayLike) -> Batch:
        """Read the given rows: x is (B, 1 + labels, *spatial), sorted by patient and then by row."""
        asked = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        asked = asked[np.lexsort((asked, self.patient[asked]))]
        x = np.empty((len(asked), self.space.channels, *self.space.spatial_shape), dtype=np.float32)
        np.divide(self._images[asked], np.float32(LEVELS), out=x[:, 0])
        if self._masks is not None:
            masks = self._masks[asked]
            for channel, label in enumerate(self.space.mask_labels, start=1):
                x[:, channel] = masks == label
        return Batch(x, self.condition[asked], self.patient[asked])

    def masks(self, rows: npt.ArrayLike) -> npt.NDArray[np.uint8] | None:
        """Return the label maps of the given rows in the given order, (B, *spatial), or None where there are none."""
        return None if self._masks is None else np.asarray(self._masks[np.asarray(rows, dtype=np.int64)])

    def scan_digests(self) -> frozenset[bytes]:
        """Return SHA-256 of every scan's image, to compare two cohorts in memory; never to be stored or shown.

        Scans of one value throughout are nobody's and are left out.
        """
        whole = (image for image in self._images if image.min() != image.max())
        return frozenset(hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest() for image in whole)

    def fingerprint(self) -> str:
        """Return HMAC-SHA256 over images, masks and index under the cohort's own random key, as hex.

        Keyed, since a plain hash of scans would let anyone who holds one confirm membership.
        """
        mac = hmac.new((self._folder / "key").read_bytes(), SCHEMA.encode(), hashlib.sha256)
        for name in ("images.npy", "masks.npy", "index.npz"):
            path = self._folder / name
            if path.exists():
                mac.update(f"{name}:{path.stat().st_size}:".encode())
                for chunk in _chunks(path):
                    mac.update(chunk)
        return mac.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def open_cohort(path: Path) -> Private[CohortStore]:
    """Open a cohort folder. Raises CohortError where it is missing, foreign, of another version, or torn."""
    if not path.is_dir():
        raise CohortError("there is no cohort folder here: make one with `medvae ingest SOURCE -o COHORT`")
    try:
        info = json.loads((path / "cohort.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CohortError("this folder is not a cohort: give the output of `medvae ingest`") from None
    schema = info.get("schema") if isinstance(info, dict) else None
    if schema != SCHEMA:
        raise CohortError(f"the cohort is not of version {SCHEMA}: ingest the source again with this medvae")
    try:
        return Private(CohortStore(path, info))
    except (OSError, ValueError, KeyError, TypeError):
        raise CohortError("the cohort's files are torn or do not match cohort.json: ingest the source again") from None
