"""The short way to plain pixels: uncompressed gray single images, read straight from where the header pass found them.

Most of an archive is of this kind, and reading its headers twice would double the work. Anything else takes the whole
way (dicom_pixels), and so does a file that is not as its header said; tests hold both ways to the same values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from medvae.types import FloatArray

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
PIXEL_DATA = b"\xe0\x7f\x10\x00"
PLAIN_TAGS = (
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
)  # fmt: skip
Padding = tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Plain:
    """How stored bytes become values: the same for most images of a series. shift: unused bits above the stored."""

    dtype: str
    shift: int
    slope: float
    intercept: float
    padding: Padding


def plain_way(file_meta: Any, values: Mapping[str, Any], stream: BinaryIO) -> tuple[Plain, int] | None:
    """Return the short way to a file's pixels and where they begin; None for all that needs the whole way.

    `stream` stands at the pixel data element, where reading the header has ended.
    """
    try:
        return _plain_way(file_meta, values, stream)
    except Exception:  # values of any kind and number: the whole way judges them
        return None


def _plain_way(file_meta: Any, values: Mapping[str, Any], stream: BinaryIO) -> tuple[Plain, int] | None:
    syntax = file_meta.get("TransferSyntaxUID")
    bits, stored = int(values.get("BitsAllocated") or 0), int(values.get("BitsStored") or 0)
    if (
        syntax not in (IMPLICIT, EXPLICIT)
        or bits not in (8, 16)
        or not 0 < stored <= bits
        or int(values.get("HighBit") or 0) != stored - 1
        or values.get("PhotometricInterpretation") != "MONOCHROME2"
        or int(values.get("SamplesPerPixel") or 0) != 1
        or int(values.get("NumberOfFrames") or 1) != 1
        or str(values.get("Modality")).strip() == "PT"  # its units need the whole header
        or values.get("ModalityLUTSequence") is not None
        or values.get("SharedFunctionalGroupsSequence") is not None
        or values.get("PerFrameFunctionalGroupsSequence") is not None
    ):
        return None
    offset = stream.tell()
    head = stream.read(12)
    long = syntax == EXPLICIT
    # Some files say that they are implicit and are not; as a length, these letters would be odd, which none may be.
    if head[:4] != PIXEL_DATA or long != (head[4:6] in (b"OB", b"OW")):
        return None
    length = int.from_bytes(head[8:12] if long else head[4:8], "little")
    size = int(values["Rows"]) * int(values["Columns"]) * (bits // 8)
    slope, intercept = rescale(values)
    if length < size or length == 2**32 - 1 or not (math.isfinite(slope) and math.isfinite(intercept)):
        return None
    signed = int(values.get("PixelRepresentation") or 0) == 1
    plain = Plain(f"<{'i' if signed else 'u'}{bits // 8}", bits - stored, slope, intercept, padding_of(values))
    return plain, offset + (12 if long else 8)


def read_plain(file: str, offset: int, rows: int, columns: int, plain: Plain) -> FloatArray | None:
    """Return the image, (rows, columns) float32; None where the file ends before it."""
    with Path(file).open("rb") as stream:
        stored = np.fromfile(stream, dtype=plain.dtype, count=rows * columns, offset=offset)
    if stored.size < rows * columns:
        return None
    if plain.shift:
        np.left_shift(stored, plain.shift, out=stored)
        np.right_shift(stored, plain.shift, out=stored)
    stored = stored.reshape(rows, columns)
    where = padded(stored, plain.padding)
    return without_padding(in_units(stored, plain.slope, plain.intercept), where)


def rescale(values: Mapping[str, Any]) -> tuple[float, float]:
    """Return slope and intercept of a header or a functional group; 1 and 0 where it has none."""
    slope, intercept = values.get("RescaleSlope"), values.get("RescaleIntercept")
    return (1.0 if slope is None else float(slope)), (0.0 if intercept is None else float(intercept))


def in_units(stored: npt.NDArray[Any], slope: float, intercept: float) -> FloatArray:
    """Return stored * slope + intercept as float32."""
    if slope == 1 and intercept == int(intercept) and stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2:
        values = stored.astype(np.float32)
        values += np.float32(intercept)  # exact: 17 bits fit into float32
        return values
    return (stored.astype(np.float64) * slope + intercept).astype(np.float32)


def padding_of(values: Mapping[str, Any]) -> Padding:
    """Return the least and the largest padding value (PS3.3, C.7.5.1.1.2), or None.

    A value that was written unsigned beside signed pixels, as some scanners do, is read as they meant it.
    """
    low = values.get("PixelPaddingValue")
    if low is None:
        return None
    high = values.get("PixelPaddingRangeLimit")
    bits, signed = int(values.get("BitsAllocated") or 16), int(values.get("PixelRepresentation") or 0)
    ends = [int(v) for v in (low, low if high is None else high)]
    ends = [v - 2**bits if signed and v >= 2 ** (bits - 1) else v for v in ends]
    return min(ends), max(ends)


def padded(stored: npt.NDArray[Any], padding: Padding) -> npt.NDArray[np.bool_] | None:
    """Return where the stored values are padding, or None where none is."""
    if padding is None:
        return None
    low, high = padding
    where = np.asarray(stored == low if low == high else (stored >= low) & (stored <= high))
    return where if where.any() and not where.all() else None


def without_padding(values: FloatArray, where: npt.NDArray[np.bool_] | None) -> FloatArray:
    """Set padding to the least value beside it, in place."""
    if where is not None:
        values[where] = np.min(values, where=~where, initial=np.inf)
    return values
