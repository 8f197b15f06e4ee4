"""DICOM trees: headers of allow-listed tags first, then series, then pixels one scan at a time.

Coordinates are RAS millimetres inside medvae; DICOM's are LPS (PS3.3, C.7.6.2.1.1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medvae.types import FloatArray, Progress
from medvae.vault.discover import Found, strangers
from medvae.vault.scan import MAX_PIXELS, MAX_VOXELS, Scan, Source, Unusable, Volume, names_of
from medvae.vault.series import Geometry, geometry

ATTRIBUTES = {
    "age": "PatientAge",
    "sex": "PatientSex",
    "modality": "Modality",
    "contrast": "ContrastBolusAgent",
    "body_part": "BodyPartExamined",
    "manufacturer": "Manufacturer",
    "slice_thickness": "SliceThickness",
}
HEADER_TAGS = (
    *ATTRIBUTES.values(), "PatientID", "IssuerOfPatientID", "SeriesInstanceUID", "SOPInstanceUID", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PixelSpacing", "ImagerPixelSpacing",
    "ImageOrientationPatient", "ImagePositionPatient",
)  # fmt: skip
PIXEL_TAGS = (
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "PixelData", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "FloatPixelData", "DoubleFloatPixelData",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Header:
    """What is read of one file before its pixels; spacing is (between rows, between columns) in mm."""

    path: Path
    series: str
    instance: str
    patient: str | None
    rows: int
    columns: int
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    attributes: dict[str, str]


def dicom_source(found: Found, dims: int | None, need_spacing: bool, progress: Progress | None = None) -> Source:
    """Group the files of a DICOM tree into scans.

    dims: 2 makes every slice a scan, 3 every series; None decides by what most series are. Files and series that
    cannot be used are counted by reason; a 2D scan without PixelSpacing is used unless `need_spacing`.
    """
    skipped = strangers(found)
    unused: set[str] = set()
    patients: set[str] = set()
    series: dict[tuple[str, str], dict[str, Header]] = defaultdict(dict)
    for done, path in enumerate(found.files, start=1):
        if progress is not None:
            progress(done, len(found.files))
        try:
            header = read_header(path)
        except Unusable as verdict:
            skipped[verdict.reason] += 1
            unused |= names_of(path, found.root)
            continue
        group = series[header.patient or "", header.series or str(path)]
        if header.instance in group:
            skipped["duplicate file"] += 1
            unused |= names_of(path, found.root)
            continue
        group[header.instance or str(path)] = header
    groups = [list(g.values()) for g in series.values()]
    if dims is None:
        several = sum(len(g) > 1 for g in groups)
        dims = 3 if groups and 2 * several >= len(groups) else 2
    scans: list[Scan] = []
    for members in groups if dims == 3 else [[h] for g in groups for h in g]:
        try:
            scans.append(_scan(members, found.root, dims, need_spacing))
        except Unusable as verdict:
            skipped[verdict.reason] += 1
            unused |= {n for h in members for n in names_of(h.path, found.root)}
            patients.add((members[0].patient or "").split("\0")[0])
    unused -= {n for s in scans for n in s.names}
    modalities = {s.attributes["modality"] for s in scans}
    modality = modalities.pop() if len(modalities) == 1 else "mixed" if modalities else "OT"
    return Source("dicom", dims, scans, modality, spaced=True, unused=unused, unused_patients=patients, skipped=skipped)


def _scan(group: Sequence[Header], root: Path, dims: int, need_spacing: bool) -> Scan:
    if dims == 3 and len(group) < 2:
        raise Unusable("a single slice where volumes are asked")
    if (dims == 3 or need_spacing) and any(h.spacing is None for h in group):
        raise Unusable("no PixelSpacing")
    first = group[0]
    if first.rows * first.columns * len(group) > MAX_VOXELS:
        raise Unusable("header claims an absurd size")
    where = geometry([(h.rows, h.columns, h.orientation, h.position, h.spacing) for h in group])
    names = frozenset().union(*(names_of(h.path, root) for h in group))
    read = partial(read_series, [group[i].path for i in where.order], where)
    return Scan(names | {first.series} - {""}, read, first.patient, first.attributes)


def read_header(path: Path) -> Header:
    """Read the allow-listed tags of one file. Raises Unusable where it cannot be an image of a cohort."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        with path.open("rb") as stream:
            ds = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=list(HEADER_TAGS))
    except InvalidDicomError:
        raise Unusable("not an image") from None
    except EOFError:
        raise Unusable("truncated file") from None
    except Exception:  # pydicom raises many kinds on foreign bytes, all of them about this one file
        raise Unusable("unreadable file") from None
    try:
        return _header(path, ds)
    except Unusable:
        raise
    except Exception:  # element values are parsed on access, again with many kinds of error
        raise Unusable("header cannot be read") from None


def _header(path: Path, ds: Any) -> Header:
    rows, columns = ds.get("Rows"), ds.get("Columns")
    if not rows or not columns:
        raise Unusable("no image size (Rows, Columns)")
    if int(rows) * int(columns) > MAX_PIXELS:
        raise Unusable("header claims an absurd size")
    if int(ds.get("NumberOfFrames") or 1) > 1:
        raise Unusable("multi-frame")
    if int(ds.get("SamplesPerPixel") or 1) > 1 or ds.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise Unusable("colour")
    patient = str(ds.get("PatientID") or "").strip()
    issuer = str(ds.get("IssuerOfPatientID") or "").strip()
    attributes = {k: str(ds.get(tag)).strip() for k, tag in ATTRIBUTES.items() if ds.get(tag) not in (None, "")}
    attributes["contrast"] = "yes" if "contrast" in attributes else "no"
    attributes.setdefault("modality", "OT")
    return Header(
        path=path,
        series=str(ds.get("SeriesInstanceUID") or ""),
        instance=str(ds.get("SOPInstanceUID") or ""),
        # An issuer alone names nobody: all blank ids of one hospital would become one patient.
        patient=f"{patient}\0{issuer}" if patient and issuer else patient or None,
        rows=int(rows),
        columns=int(columns),
        orientation=_numbers(ds.get("ImageOrientationPatient"), 6),
        position=_numbers(ds.get("ImagePositionPatient"), 3),
        spacing=_spacing(ds),
        attributes=attributes,
    )


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    if value is None or len(value) != count:
        return None
    numbers = tuple(float(v) for v in value)
    return numbers if np.isfinite(numbers).all() else None


def _spacing(ds: Any) -> tuple[float, ...] | None:
    """Return PixelSpacing, or for projections ImagerPixelSpacing; None unless both numbers are above zero."""
    for tag in ("PixelSpacing", "ImagerPixelSpacing"):
        spacing = _numbers(ds.get(tag), 2)
        if spacing is not None and min(spacing) > 0:
            return spacing
    return None


def read_series(paths: Sequence[Path], where: Geometry) -> Volume:
    """Decode the slices in order along the normal into a volume (columns, rows, slices) with its RAS affine."""
    return Volume(np.stack([read_slice(path).T for path in paths], axis=-1), where.affine)


def read_slice(path: Path) -> FloatArray:
    """Decode one image, (rows, columns) float32 in modality units: rescaled, MONOCHROME1 turned so that more is
    brighter, padding set to the least value beside it."""
    import pydicom
    from pydicom.pixels import apply_modality_lut

    try:
        ds = pydicom.dcmread(path, specific_tags=list(PIXEL_TAGS))
        if not any(t in ds for t in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise Unusable("no pixel data")
        _check_length(ds)
        stored = ds.pixel_array
        padding = _padding(ds, stored)
        values: FloatArray = apply_modality_lut(_upright(ds, stored), ds).astype(np.float32)
    except Unusable:
        raise
    except EOFError:
        raise Unusable("truncated file") from None
    except Exception:  # decoders raise many kinds, all of them about this one file
        raise Unusable("undecodable pixel data") from None
    if padding is not None and padding.any() and not padding.all():
        values[padding] = values[~padding].min()
    return values


def _check_length(ds: Any) -> None:
    """Compare the bytes that are there with what the header claims, before any allocation."""
    if "PixelData" not in ds:
        return
    if not ds.PixelData:
        raise Unusable("no pixel data")
    if not ds.file_meta.TransferSyntaxUID.is_encapsulated:
        claimed = (int(ds.Rows) * int(ds.Columns) * int(ds.BitsAllocated) + 7) // 8
        if len(ds.PixelData) < claimed:
            raise Unusable("truncated file")


def _upright(ds: Any, stored: Any) -> Any:
    """Turn MONOCHROME1, where the least stored value is shown white, over the range that BitsStored allows."""
    if ds.get("PhotometricInterpretation") != "MONOCHROME1" or stored.dtype.kind == "f":
        return stored
    top = -1 if int(ds.PixelRepresentation) else 2 ** int(ds.BitsStored) - 1
    return top - stored.astype(np.int64)


def _padding(ds: Any, stored: Any) -> Any:
    """Return where the pixels are padding (PS3.3, C.7.5.1.1.2), or None."""
    low = ds.get("PixelPaddingValue")
    if low is None:
        return None
    ends = sorted(_signed(int(v), ds) for v in (low, ds.get("PixelPaddingRangeLimit", low)))
    return (stored >= ends[0]) & (stored <= ends[-1])


def _signed(value: int, ds: Any) -> int:
    """Read a padding value that was written unsigned beside signed pixels, as some scanners do."""
    bits = int(ds.BitsAllocated)
    return value - 2**bits if int(ds.PixelRepresentation) and value >= 2 ** (bits - 1) else value
