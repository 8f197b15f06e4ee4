"""What is read of a DICOM file before its pixels: allow-listed tags, and a place for each of its frames.

Private tags are never asked for, and elements outside the list are skipped unread. Enhanced objects keep a frame's
place in functional groups (PS3.3, C.7.6.16), reconstructed nuclear medicine in its detector's (C.8.4.11).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medvae.vault.dicom_file import open_dataset
from medvae.vault.dicom_plain import PLAIN_TAGS, Plain, plain_way
from medvae.vault.dicom_suv import SUV_TAGS, suv_factor
from medvae.vault.scan import Rules, Unusable

ATTRIBUTES = {
    "age": "PatientAge",
    "sex": "PatientSex",
    "modality": "Modality",
    "contrast": "ContrastBolusAgent",
    "body_part": "BodyPartExamined",
    "manufacturer": "Manufacturer",
    "slice_thickness": "SliceThickness",
}
MARK_TAGS = (
    "EchoTime", "EchoNumbers", "DiffusionBValue", "TemporalPositionIdentifier", "TriggerTime", "FrameReferenceTime",
    "AcquisitionNumber", "ImageType",
)  # fmt: skip
HEADER_TAGS = (
    *ATTRIBUTES.values(), *MARK_TAGS, "PatientID", "IssuerOfPatientID", "SeriesInstanceUID", "SOPInstanceUID",
    "SOPClassUID", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PixelSpacing",
    "ImagerPixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "SpacingBetweenSlices", "SliceVector",
    "BurnedInAnnotation", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "DetectorInformationSequence", "ReferencedSeriesSequence", "SegmentSequence", *SUV_TAGS, *PLAIN_TAGS,
)  # fmt: skip
NOT_SCANS = frozenset({"RTDOSE", "RTPLAN", "RTSTRUCT", "RTRECORD", "SR", "PR", "KO", "ECG", "EEG", "HD", "REG", "FID",
                       "RWV", "DOC", "PLAN", "AU", "M3D"})  # fmt: skip
DIRECTORY = "1.2.840.10008.1.3.10"
SEGMENTATIONS = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})
TEXT_IN_PICTURE = frozenset({"US", "IVUS", "SC", "XC", "ES", "OT"})  # kinds of image that often show text
FRAME_TYPES = ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

Marks = tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Frame:
    """One image of a file. spacing is (between rows, between columns) in mm; marks: what tells apart images at one
    place, in the order of `MARK_TAGS`; segment: for segmentations, its number; thickness: of a slice alone, in mm;
    plain, offset: the short way to its pixels, where there is one."""

    file: str
    index: int
    rows: int
    columns: int
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    marks: Marks = ()
    segment: int = 0
    thickness: float = 1.0
    plain: Plain | None = None
    offset: int = field(default=0, compare=False)  # grows with what is not read


@dataclass(frozen=True, slots=True, repr=False)
class Header:
    """What is read of one file. frames: its images with their places; where several have none, the first
    of them, and their number in `unplaced`; suv: whether PET values can be turned into SUV."""

    file: str
    series: str
    instance: str
    patient: str
    issuer: str
    frames: tuple[Frame, ...]
    unplaced: int
    attributes: tuple[tuple[str, str], ...]
    burned_in: bool
    suv: bool
    segmented_series: str = ""
    segments: tuple[tuple[int, str], ...] = ()

    @property
    def is_segmentation(self) -> bool:
        """Whether the file is a segmentation and no image."""
        return bool(self.segments)


def read_header(path: Path, rules: Rules = Rules()) -> Header:  # noqa: B008 - frozen
    """Read the allow-listed tags of one file. Raises Unusable where it cannot be an image of a cohort."""
    with path.open("rb") as stream:
        values = _Values(open_dataset(path, HEADER_TAGS, rules, stream=stream))
        short = None if rules.display else plain_way(values.file_meta, values, stream)
    try:
        return _header(path, values, rules, short)
    except Unusable:
        raise
    except Exception:  # values may be of any kind and number
        raise Unusable("header cannot be read") from None


class _Values(dict[str, Any]):
    """The elements of a header by keyword, read once. One that cannot be parsed fails whoever asks for it."""

    def __init__(self, ds: Any) -> None:
        from pydicom.datadict import keyword_for_tag

        super().__init__()
        self.file_meta = ds.file_meta
        for tag in ds.keys():  # noqa: SIM118 - iterating a data set parses its elements
            try:
                self[keyword_for_tag(tag)] = ds[tag].value
            except Exception:  # element values are parsed on access, with many kinds of error
                self[keyword_for_tag(tag)] = _UNREAD

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value. Raises Unusable for one that could not be parsed."""
        value = super().get(name, default)
        if value is _UNREAD:
            raise Unusable("header cannot be read")
        return value


_UNREAD = object()


def _header(path: Path, ds: Any, rules: Rules, short: tuple[Plain, int] | None) -> Header:
    modality = str(ds.get("Modality") or "").strip()
    if ds.file_meta.get("MediaStorageSOPClassUID") == DIRECTORY or modality in NOT_SCANS:
        raise Unusable("no scan but a plan, dose, report or the like")
    rows, columns = int(ds.get("Rows") or 0), int(ds.get("Columns") or 0)
    if not rows or not columns:
        raise Unusable("no image size (Rows, Columns)")
    count = int(ds.get("NumberOfFrames") or 1)
    if rows * columns > rules.max_pixels or rows * columns * count > _most(ds, rules) or count < 1:
        raise Unusable("header claims an absurd size")
    segmented = ds.get("SOPClassUID") in SEGMENTATIONS
    if rules.colour == "refuse" and (
        int(ds.get("SamplesPerPixel") or 1) > 1 or ds.get("PhotometricInterpretation") == "PALETTE COLOR"
    ):
        raise Unusable("colour")
    burned_in = _burned_in(ds, modality)
    if burned_in and rules.burned_in == "skip":
        raise Unusable("may show burned-in text")
    frames, placed = _frames(str(path), ds, rows, columns, count)
    if short is not None:
        frames = (replace(frames[0], plain=short[0], offset=short[1]),)
    attributes = {k: str(ds.get(tag)).strip() for k, tag in ATTRIBUTES.items() if ds.get(tag) not in (None, "")}
    attributes["contrast"] = "yes" if "contrast" in attributes else "no"
    attributes.setdefault("modality", "OT")
    patient = str(ds.get("PatientID") or "").strip()
    referenced = ds.get("ReferencedSeriesSequence") or [{}]
    return Header(
        file=str(path),
        series=str(ds.get("SeriesInstanceUID") or ""),
        instance=str(ds.get("SOPInstanceUID") or ""),
        patient=patient,
        # An issuer alone names nobody: all blank ids of one hospital would become one patient.
        issuer=str(ds.get("IssuerOfPatientID") or "").strip() if patient else "",
        frames=frames,
        unplaced=0 if placed else count,
        attributes=tuple(sorted(attributes.items())),
        burned_in=burned_in,
        suv=suv_factor(ds) is not None,
        segmented_series=str(referenced[0].get("SeriesInstanceUID") or "") if segmented else "",
        segments=_segments(ds) if segmented else (),
    )


def _most(ds: Any, rules: Rules) -> int:
    """Return the most voxels of a file: a segmentation has frames for every segment, and is read frame by frame."""
    return 8 * rules.max_voxels if ds.get("SOPClassUID") in SEGMENTATIONS else rules.max_voxels


def _burned_in(ds: Any, modality: str) -> bool:
    """Whether the pixels may show text: said so, or of a kind that often does and not said otherwise."""
    said = str(ds.get("BurnedInAnnotation") or "").strip().upper()
    kind = modality in TEXT_IN_PICTURE or str(ds.get("SOPClassUID") or "").startswith(SECONDARY_CAPTURE)
    return said == "YES" or (kind and said != "NO")


def _segments(ds: Any) -> tuple[tuple[int, str], ...]:
    """Return every segment's number with what it stands for, as a code."""
    found = []
    for item in ds["SegmentSequence"]:
        code = (item.get("SegmentedPropertyTypeCodeSequence") or [{}])[0]
        words = f"{code.get('CodingSchemeDesignator', '')}:{code.get('CodeValue', '')}:{item.get('SegmentLabel', '')}"
        found.append((int(item.SegmentNumber), words))
    return tuple(found)


def _frames(path: str, ds: Any, rows: int, columns: int, count: int) -> tuple[tuple[Frame, ...], bool]:
    """Return the frames of a file, and whether each has a place of its own."""
    per_frame = ds.get("PerFrameFunctionalGroupsSequence")
    if per_frame:
        if len(per_frame) != count:
            raise Unusable("header cannot be read")
        shared = (ds.get("SharedFunctionalGroupsSequence") or [{}])[0]
        marks = _marks(ds)
        frames = tuple(_enhanced(path, i, rows, columns, g, shared, marks) for i, g in enumerate(per_frame))
        placed = count == 1 or all(f.position is not None for f in frames)
        return (frames if placed else frames[:1]), placed
    orientation, position = _numbers(ds.get("ImageOrientationPatient"), 6), _numbers(ds.get("ImagePositionPatient"), 3)
    detector = (ds.get("DetectorInformationSequence") or [{}])[0]
    orientation = orientation or _numbers(detector.get("ImageOrientationPatient"), 6)
    position = position or _numbers(detector.get("ImagePositionPatient"), 3)
    step = float(ds.get("SpacingBetweenSlices") or 0)
    slices = ds.get("SliceVector")
    stacked = None not in (orientation, position) and step != 0 and slices is not None and len(slices) == count
    if count == 1 or not stacked:
        one = Frame(path, 0, rows, columns, orientation, position, _spacing(ds), _marks(ds), thickness=_thickness(ds))
        return (one,), count == 1
    normal = np.cross(orientation[:3], orientation[3:])  # type: ignore[index]
    places = [np.asarray(position) + normal * step * (int(s) - 1) for s in slices]
    return tuple(
        Frame(path, i, rows, columns, orientation, tuple(map(float, p)), _spacing(ds)) for i, p in enumerate(places)
    ), True


def _enhanced(path: str, index: int, rows: int, columns: int, own: Any, shared: Any, common: Marks) -> Frame:
    """Return a frame by its functional groups: its own go before the shared ones."""

    def macro(name: str) -> Any:
        return (own.get(name) or shared.get(name) or [{}])[0]

    measures = macro("PixelMeasuresSequence")
    content = macro("FrameContentSequence")
    segment = macro("SegmentIdentificationSequence").get("ReferencedSegmentNumber")
    marks = list(common)
    found = {
        "EchoTime": macro("MREchoSequence").get("EffectiveEchoTime"),
        "DiffusionBValue": macro("MRDiffusionSequence").get("DiffusionBValue"),
        "TemporalPositionIdentifier": content.get("TemporalPositionIndex"),
        "TriggerTime": macro("CardiacSynchronizationSequence").get("NominalCardiacTriggerDelayTime"),
        "AcquisitionNumber": content.get("FrameAcquisitionNumber"),
        "ImageType": next((t for m in FRAME_TYPES if (t := macro(m).get("FrameType")) is not None), None),
    }  # fmt: skip
    for name, value in found.items():
        if value is not None:
            marks[MARK_TAGS.index(name)] = str(value)
    return Frame(
        file=path, index=index, rows=rows, columns=columns,
        orientation=_numbers(macro("PlaneOrientationSequence").get("ImageOrientationPatient"), 6),
        position=_numbers(macro("PlanePositionSequence").get("ImagePositionPatient"), 3),
        spacing=_spacing(measures), marks=tuple(marks), segment=int(segment or 0), thickness=_thickness(measures),
    )  # fmt: skip


def _marks(ds: Any) -> Marks:
    return tuple("" if ds.get(tag) is None else str(ds.get(tag)) for tag in MARK_TAGS)


def _thickness(ds: Any) -> float:
    """Return how far a slice reaches, in mm: the distance between slices, else their thickness, else 1."""
    for tag in ("SpacingBetweenSlices", "SliceThickness"):
        value = float(ds.get(tag) or 0)
        if np.isfinite(value) and value > 0:
            return value
    return 1.0


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
