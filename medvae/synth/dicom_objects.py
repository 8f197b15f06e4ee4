"""DICOM image objects built from named attributes, never by copying a header.

MR and CT become series of single-frame MR and CT images. A 2D X-ray (CR, DX, RG) becomes a Computed Radiography image,
the radiograph whose mandatory attributes may all be left empty: a DX image demands a detector, a laterality and an
anatomic region, which would have to be invented. Any other modality becomes Secondary Capture for the same reason:
single-frame in 2D, multi-frame in 3D. Every object says that it is synthetic: attribute (0008,001C), Series
Description, Image Comments and Derivation Description.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
)

from medvae.synth.identifiers import fresh_uid
from medvae.synth.values import TWELVE_BITS, Scale
from medvae.version import __version__

MAKER = "medvae"
X_RAYS = frozenset({"CR", "DX", "RG"})
MIDNIGHT = "000000"  # the time of day of the writing is nobody's business
_LONG_STRING = 64  # characters of one LO value, PS3.5 6.2
_AXIAL = [1, 0, 0, 0, 1, 0]
_PER_FRAME_GROUPS = 0x52009230


@dataclass(frozen=True)
class Origin:
    """What is true of every object of one cohort: how it was made, when, and how identity was protected."""

    method: tuple[str, ...]
    derivation: str
    date: str  # YYYYMMDD
    body_part: str


@dataclass(frozen=True)
class Subject:
    """The synthetic subject of one study. Age in years; sex is M, F or O."""

    patient_id: str
    issuer: str
    comment: str
    age: float | None = None
    sex: str = ""


@dataclass(frozen=True)
class Grid:
    """Frames of one image: (F, rows, columns), rows running to the back and columns to the left of the patient."""

    frames: npt.NDArray[Any]
    spacing_mm: tuple[float, float, float]  # between rows, columns, frames
    volume: bool

    def position(self, frame: int) -> list[str]:
        """Return Image Position (Patient) in LPS mm, with the middle of the grid at the origin."""
        count, rows, columns = self.frames.shape
        row, column, between = self.spacing_mm
        return [_ds(-(columns - 1) * column / 2), _ds(-(rows - 1) * row / 2), _ds((frame - (count - 1) / 2) * between)]


def grid_of(array: npt.NDArray[Any], spacing_mm: tuple[float, ...]) -> Grid:
    """Turn a RAS volume (X, Y, Z), or a 2D image (rows, columns), into DICOM frames.

    Axial frames seen from the feet: columns run to the left (-x), rows to the back (-y), frames to the head (+z), so
    the orientation 1,0,0,0,1,0 and rising positions form a right-handed frame.
    """
    if array.ndim == 2:
        return Grid(array[None], (spacing_mm[0], spacing_mm[1], 1.0), volume=False)
    x, y, z = spacing_mm
    return Grid(array[::-1, ::-1].transpose(2, 1, 0), (y, x, z), volume=True)


def method_pieces(statements: Iterable[str]) -> tuple[str, ...]:
    """Cut statements into values of at most 64 characters, as De-identification Method (0012,0063) demands."""
    clean = (s.replace("\\", "/") for s in statements)
    return tuple(piece for s in clean for piece in textwrap.wrap(s, _LONG_STRING))


def image_objects(grid: Grid, scale: Scale, modality: str, subject: Subject, origin: Origin) -> list[FileDataset]:
    """Return the objects of one series in a study of its own, with fresh UIDs: one a frame, or one multi-frame."""
    common = _common(subject, origin)
    # MR has no rescale to raw units: whole raw units are stored themselves, all else as codes of arbitrary units.
    shift = int(scale.intercept) if modality == "MR" and scale.integer else 0
    _pixel_format(common, grid, shift, shift + scale.top)
    if modality in X_RAYS and not grid.volume:
        return [_radiograph(common, grid, scale)]
    if modality not in ("MR", "CT"):
        common.Modality = "OT"
        return [_secondary_capture(common, grid, scale, origin)]
    common.Modality = modality
    _single_frame_series(common, grid)
    if modality == "CT":
        _ct_image(common, scale)
        sop_class, low, width = CTImageStorage, scale.intercept, scale.slope * scale.top
    else:
        _mr_image(common, grid)
        sop_class, low, width = MRImageStorage, shift, scale.top
    common.WindowCenter = _ds(low + width / 2)
    common.WindowWidth = _ds(width)
    pixels = (grid.frames.astype(np.int32) + shift).astype("<u2")
    return [_slice(common, sop_class, grid, i, frame.tobytes()) for i, frame in enumerate(pixels)]


def declare_synthetic(dataset: Dataset, subject: Subject, origin: Origin) -> None:
    """Set what every object of ours says about itself, images and segmentations alike."""
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SyntheticData = "YES"
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = list(origin.method)
    # A generated image shows no person's face and carries no text of an acquisition.
    dataset.BurnedInAnnotation = "NO"
    dataset.RecognizableVisualFeatures = "NO"
    dataset.LongitudinalTemporalInformationModified = "REMOVED"
    dataset.IssuerOfPatientID = subject.issuer
    dataset.ImageComments = subject.comment
    dataset.SeriesDescription = f"SYNTHETIC by {MAKER}"
    dataset.ContentQualification = "RESEARCH"
    dataset.ContributingEquipmentSequence = [_equipment(origin)]


def _common(subject: Subject, origin: Origin) -> Dataset:
    d = Dataset()
    declare_synthetic(d, subject, origin)
    d.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    d.DerivationDescription = origin.derivation
    d.PatientName = f"{subject.patient_id}^SYNTHETIC"
    d.PatientID = subject.patient_id
    d.PatientBirthDate = ""
    d.PatientSex = subject.sex
    if subject.age is not None:
        d.PatientAge = f"{round(subject.age):03d}Y"
    d.StudyInstanceUID = fresh_uid()
    d.StudyDate = origin.date
    d.StudyTime = MIDNIGHT
    d.StudyID = "1"
    d.AccessionNumber = ""
    d.ReferringPhysicianName = ""
    d.StudyDescription = "SYNTHETIC"
    d.SeriesInstanceUID = fresh_uid()
    d.SeriesNumber = 1
    d.BodyPartExamined = origin.body_part
    d.Manufacturer = MAKER
    d.ManufacturerModelName = MAKER
    d.SoftwareVersions = __version__
    d.DeviceSerialNumber = "0"
    return d


def _pixel_format(d: Dataset, grid: Grid, low: int, high: int) -> None:
    d.SamplesPerPixel = 1
    d.PhotometricInterpretation = "MONOCHROME2"
    d.Rows, d.Columns = grid.frames.shape[1:]
    d.BitsAllocated = 16
    d.BitsStored = 12 if low >= 0 and high <= TWELVE_BITS else 16
    d.HighBit = d.BitsStored - 1
    d.PixelRepresentation = int(low < 0)


def _single_frame_series(d: Dataset, grid: Grid) -> None:
    d.FrameOfReferenceUID = fresh_uid()
    d.PositionReferenceIndicator = ""
    d.PatientPosition = "HFS"
    d.ImageOrientationPatient = _AXIAL
    d.PixelSpacing = [_ds(s) for s in grid.spacing_mm[:2]]
    d.SliceThickness = _ds(grid.spacing_mm[2])
    d.SpacingBetweenSlices = _ds(grid.spacing_mm[2])
    d.AcquisitionNumber = ""


def _ct_image(d: Dataset, scale: Scale) -> None:
    d.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    d.KVP = ""
    _rescale(d, scale, "HU")


def _mr_image(d: Dataset, grid: Grid) -> None:
    d.ScanningSequence = "RM"  # "research mode": no sequence of a scanner was played
    d.SequenceVariant = "NONE"
    d.ScanOptions = ""
    d.MRAcquisitionType = "3D" if grid.volume else "2D"
    d.RepetitionTime = ""
    d.EchoTime = ""
    d.EchoTrainLength = ""


def _slice(common: Dataset, sop_class: str, grid: Grid, index: int, pixels: bytes) -> FileDataset:
    d = _file(common, sop_class)
    d.InstanceNumber = index + 1
    d.ImagePositionPatient = grid.position(index)
    d.PixelData = pixels
    return d


def _radiograph(common: Dataset, grid: Grid, scale: Scale) -> FileDataset:
    d = _file(common, ComputedRadiographyImageStorage)
    d.Modality = "CR"
    d.ViewPosition = ""
    d.KVP = ""
    d.PatientOrientation = ""
    d.InstanceNumber = 1
    # No Pixel Spacing: that would claim a calibration for magnification, PS3.3 10.7.1.3.
    d.ImagerPixelSpacing = [_ds(s) for s in grid.spacing_mm[:2]]
    _rescale(d, scale, "US")
    d.WindowCenter = _ds(scale.intercept + scale.slope * scale.top / 2)
    d.WindowWidth = _ds(scale.slope * scale.top)
    d.PixelData = grid.frames.astype("<u2").tobytes()
    return d


def _secondary_capture(common: Dataset, grid: Grid, scale: Scale, origin: Origin) -> FileDataset:
    sop_class = MultiFrameGrayscaleWordSecondaryCaptureImageStorage if grid.volume else SecondaryCaptureImageStorage
    d = _file(common, sop_class)
    d.ConversionType = "SYN"
    d.PatientOrientation = ""
    d.InstanceNumber = 1
    d.ContentDate = origin.date
    d.ContentTime = MIDNIGHT
    _rescale(d, scale, "US")
    d.PixelData = grid.frames.astype("<u2").tobytes()
    if not grid.volume:
        d.NominalScannedPixelSpacing = [_ds(s) for s in grid.spacing_mm[:2]]
        return d
    d.PresentationLUTShape = "IDENTITY"
    d.NumberOfFrames = len(grid.frames)
    d.FrameOfReferenceUID = fresh_uid()
    d.PositionReferenceIndicator = ""
    d.FrameIncrementPointer = _PER_FRAME_GROUPS
    measures = _item(
        PixelSpacing=[_ds(s) for s in grid.spacing_mm[:2]],
        SliceThickness=_ds(grid.spacing_mm[2]),
        SpacingBetweenSlices=_ds(grid.spacing_mm[2]),
    )
    plane = _item(ImageOrientationPatient=_AXIAL)
    d.SharedFunctionalGroupsSequence = [_item(PixelMeasuresSequence=[measures], PlaneOrientationSequence=[plane])]
    d.PerFrameFunctionalGroupsSequence = [
        _item(PlanePositionSequence=[_item(ImagePositionPatient=grid.position(i))]) for i in range(len(grid.frames))
    ]
    return d


def _rescale(d: Dataset, scale: Scale, unit: str) -> None:
    d.RescaleIntercept = _ds(scale.intercept)
    d.RescaleSlope = _ds(scale.slope)
    d.RescaleType = unit


def _file(common: Dataset, sop_class: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = fresh_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d = FileDataset("", dict(common.items()), preamble=b"\0" * 128, file_meta=meta)
    d.SOPClassUID = sop_class
    d.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    return d


def _equipment(origin: Origin) -> Dataset:
    purpose = _item(CodeValue="109100", CodingSchemeDesignator="DCM", CodeMeaning="Synthesizing Equipment")
    return _item(
        Manufacturer=MAKER,
        ManufacturerModelName=MAKER,
        SoftwareVersions=__version__,
        ContributionDateTime=origin.date,
        ContributionDescription=origin.derivation,
        PurposeOfReferenceCodeSequence=[purpose],
    )


def _item(**values: Any) -> Dataset:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return item


def _ds(value: float) -> str:
    # A decimal string holds 16 characters, PS3.5 6.2.
    return f"{value + 0.0:.10g}"
