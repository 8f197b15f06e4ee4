"""Sources for the vault's tests: small folders as a hospital would give them, written with plain libraries."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def write_slice(path: Path, pixels: np.ndarray, leave_out: Sequence[str] = (), **tags: Any) -> None:
    """Write one CT-like DICOM file; `tags` replace or add attributes, `leave_out` removes them."""
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = generate_uid()
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.SeriesInstanceUID = generate_uid()
    ds.Modality = "CT"
    ds.PatientID = "P1"
    ds.Rows, ds.Columns = pixels.shape[-2:]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.PixelSpacing = [1, 1]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.ImagePositionPatient = [0, 0, 0]
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.PixelData = pixels.tobytes()
    for name in leave_out:
        delattr(ds, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def write_series(folder: Path, volume: np.ndarray, patient: str, gap: float = 2.0, **tags: Any) -> None:
    """Write (slices, rows, columns) as one series with the slices `gap` mm apart, in shuffled file order."""
    series = generate_uid()
    order = np.random.default_rng(0).permutation(len(volume))
    for name, k in enumerate(order):
        own = {"ImagePositionPatient": [0, 0, float(k * gap)], "SeriesInstanceUID": series, "PatientID": patient}
        write_slice(folder / f"{name}.dcm", volume[k], **{**own, **tags})


def noise(shape: tuple[int, ...], seed: int, kind: str = "i2") -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(kind)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_nifti_cohort(folder: Path, patients: int = 4, scans: int = 2, masks: bool = True) -> list[dict[str, Any]]:
    """Write images/, labels/ and table.csv: `scans` volumes of 8x9x7 a patient; return the table's rows."""
    rows = []
    for p in range(patients):
        for s in range(scans):
            name = f"vol_{p}_{s}"
            image = noise((8, 9, 7), seed=100 * p + s, kind="f4")
            mask = np.zeros(image.shape, np.uint8)
            mask[2:5, 2:5, 2:5] = 1
            mask[5:7, 5:7, 5:7] = 2
            for sub, array in (("images", image), ("labels", mask))[: 1 + masks]:
                (folder / sub).mkdir(parents=True, exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / sub / f"{name}.nii.gz")
            rows.append({"file": name, "patient_id": f"pat{p}", "group": "ab"[p % 2], "age": 30 + p})
    write_table(folder / "table.csv", rows)
    return rows
