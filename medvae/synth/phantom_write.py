"""Write phantoms as a hospital would keep its scans, so that the demo and the tests walk the way of real data."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from medvae.errors import ConfigError
from medvae.synth.phantom import LESION_CLASSES, PhantomCohort
from medvae.synth.staging import staged_folder
from medvae.synth.values import Scale, codes, grid_affine
from medvae.types import Progress

Layout = Literal["nifti", "dicom", "npz", "png"]
_SCALE = Scale(1.0, 0.0, 4095)


def write_phantom(
    cohort: PhantomCohort, folder: Path, layout: Layout = "nifti", progress: Progress | None = None
) -> None:
    """Write a source folder that `ingest` reads like any other. Raises RunError where `folder` is not empty.

    nifti: images/, labels/ and table.csv with scan, patient_id, lesion, age.
    dicom: one folder a patient with a real MR series a scan; PatientID and PatientAge in the tags, and table.csv with
    patient_id, lesion. Masks are left out.
    png (2D only): images/, labels/ and table.csv. npz: phantom.npz with images (8 bit), labels, lesion,
    patients, age and masks.
    """
    writers: dict[str, Callable[[PhantomCohort, Path, Progress], None]] = {
        "nifti": _nifti,
        "dicom": _dicom,
        "npz": _npz,
        "png": _png,
    }
    if layout not in writers:
        raise ConfigError(f"phantoms have no layout {layout!r}: use one of {', '.join(writers)}")
    if layout == "png" and cohort.spatial_dims == 3:
        raise ConfigError("phantom volumes cannot be written as PNG: use nifti, dicom or npz")
    with staged_folder(folder) as out:
        writers[layout](cohort, out, progress or (lambda done, total: None))


def scan_names(cohort: PhantomCohort) -> list[str]:
    """Return one name a scan, such as PHANTOM-0007_scan2."""
    counts: dict[int, int] = {}
    names = []
    for p in cohort.patients.tolist():
        counts[p] = counts.get(p, 0) + 1
        names.append(f"{cohort.patient_ids[p]}_scan{counts[p]}")
    return names


def _nifti(cohort: PhantomCohort, out: Path, progress: Progress) -> None:
    from medvae.synth.write_nifti import save_nifti

    affine = grid_affine(cohort.images.shape[1:], cohort.spacing_mm)
    for kind in ("images", "labels"):
        (out / kind).mkdir()
    for i, name in enumerate(scan_names(cohort)):
        save_nifti(out / "images" / f"{name}.nii.gz", codes(cohort.images[i], _SCALE).astype(np.int16), affine)
        save_nifti(out / "labels" / f"{name}.nii.gz", cohort.masks[i], affine)
        progress(i + 1, len(cohort))
    _scan_table(cohort, out, "scan", "")


def _png(cohort: PhantomCohort, out: Path, progress: Progress) -> None:
    from medvae.synth.write_png import save_png

    for kind in ("images", "labels"):
        (out / kind).mkdir()
    for i, name in enumerate(scan_names(cohort)):
        save_png(out / "images" / f"{name}.png", np.rint(cohort.images[i] * 255).astype(np.uint8))
        save_png(out / "labels" / f"{name}.png", cohort.masks[i])
        progress(i + 1, len(cohort))
    _scan_table(cohort, out, "file", "images/{}.png")


def _npz(cohort: PhantomCohort, out: Path, progress: Progress) -> None:
    np.savez_compressed(
        out / "phantom.npz",
        images=np.rint(cohort.images * 255).astype(np.uint8),
        labels=cohort.lesion[cohort.patients],
        lesion=np.asarray(LESION_CLASSES, dtype=np.str_)[cohort.lesion[cohort.patients]],
        patients=np.asarray(cohort.patient_ids, dtype=np.str_)[cohort.patients],
        age=cohort.age[cohort.patients],
        masks=cohort.masks,
    )
    progress(len(cohort), len(cohort))


def _dicom(cohort: PhantomCohort, out: Path, progress: Progress) -> None:
    from medvae.synth import dicom_objects as objects

    origin = objects.Origin(
        method=("Procedural phantom, no person was scanned",),
        derivation="Painted by a procedure from random numbers",
        date="20260101",
        body_part="HEAD",
    )
    for i, name in enumerate(scan_names(cohort)):
        p = int(cohort.patients[i])
        who = objects.Subject(
            patient_id=cohort.patient_ids[p],
            issuer="PHANTOM HOSPITAL",
            comment="SYNTHETIC phantom, shows no person",
            age=float(cohort.age[p]),
        )
        grid = objects.grid_of(codes(cohort.images[i], _SCALE), cohort.spacing_mm)
        series = out / cohort.patient_ids[p] / name.rsplit("_", 1)[1]
        series.mkdir(parents=True)
        for n, dataset in enumerate(objects.image_objects(grid, _SCALE, "MR", who, origin)):
            dataset.save_as(series / f"IM{n + 1:04d}.dcm", enforce_file_format=True)
        progress(i + 1, len(cohort))
    rows = [(pid, LESION_CLASSES[k]) for pid, k in zip(cohort.patient_ids, cohort.lesion, strict=True)]
    _table(out, ("patient_id", "lesion"), rows)


def _scan_table(cohort: PhantomCohort, out: Path, column: str, form: str) -> None:
    rows = [
        (
            form.format(name) if form else name,
            cohort.patient_ids[p],
            LESION_CLASSES[cohort.lesion[p]],
            f"{cohort.age[p]:.1f}",
        )
        for name, p in zip(scan_names(cohort), cohort.patients.tolist(), strict=True)
    ]
    _table(out, (column, "patient_id", "lesion", "age"), rows)


def _table(out: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with (out / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
