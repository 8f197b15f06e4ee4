"""DICOM: one study a synthetic subject, as MR, CT or Secondary Capture images, with the mask as a SEG series."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medvae.synth.identifiers import ISSUER, subject
from medvae.synth.staging import staged_folder
from medvae.synth.values import codes, scale_of
from medvae.types import ConditionValue, Progress, SyntheticCohort

# Body Part Examined is demanded wherever a laterality could matter. The code for "not told" does not exist.
BODY_PART_NOT_TOLD = "WHOLEBODY"
_SEX = {"m": "M", "male": "M", "f": "F", "female": "F", "o": "O", "other": "O"}


def write_dicom(
    cohort: SyntheticCohort, folder: Path, claim: Mapping[str, Any] | None = None, progress: Progress | None = None
) -> list[str]:
    """Write FOLDER/dicom/SYN0001/IM0001.dcm ... and SEG.dcm, and return the paths below FOLDER.

    A volume of shape (X, Y, Z) in RAS becomes Z axial slices; a 2D image (rows, columns) one object. CT holds HU by
    rescale; MR holds raw units, or 0..4095 where the intensity is by percentiles (`scale_of`). Conditions named
    "age" (years) and "sex" become Patient's Age and Sex; all are listed in Image Comments.
    claim: {"epsilon", "delta", "unit", "neighboring", "accountant"}, told in De-identification Method.
    `cohort.notes["body_part"]` may name the body part. Raises RunError where FOLDER/dicom is not empty.
    """
    from medvae.synth import dicom_objects as objects
    from medvae.synth.dicom_encode import write_series
    from medvae.synth.dicom_seg import segmentation

    space = cohort.space
    scale = scale_of(space.intensity)
    origin = objects.Origin(
        method=objects.method_pieces(claim_statements(claim)),
        derivation="Drawn from a conditional variational autoencoder; no acquired pixel was copied",
        date=datetime.now(UTC).strftime("%Y%m%d"),
        body_part=str(cohort.notes.get("body_part", BODY_PART_NOT_TOLD)),
    )
    written: list[str] = []
    with staged_folder(folder / "dicom") as out:
        for i, image in enumerate(cohort.images):
            name = subject(i, len(cohort))
            row = cohort.conditions[i]
            who = objects.Subject(name, ISSUER, _comment(row), **_demographics(row))
            grid = objects.grid_of(codes(image, scale), space.spacing_mm)
            images = objects.image_objects(grid, scale, space.modality, who, origin)
            files = {out / name / f"IM{n + 1:04d}.dcm": d for n, d in enumerate(images)}
            (out / name).mkdir()
            write_series(files)
            written += [f"dicom/{name}/{file.name}" for file in files]
            if cohort.masks is not None:
                frames = objects.grid_of(cohort.masks[i], space.spacing_mm).frames
                mask = segmentation(images, frames, space.mask_labels, who, origin)
                mask.save_as(out / name / "SEG.dcm", enforce_file_format=True)
                written.append(f"dicom/{name}/SEG.dcm")
            if progress is not None:
                progress(i + 1, len(cohort))
    return written


def claim_statements(claim: Mapping[str, Any] | None) -> Iterator[str]:
    """Say in words how identity was protected, from the numbers of a certificate."""
    yield "Generated image, no acquired pixel data"
    if claim is None:
        return
    epsilon = claim.get("epsilon")
    if epsilon is None:
        yield "Not differentially private"
        return
    yield f"Differential privacy: epsilon={epsilon:.6g}, delta={claim['delta']:.6g}"
    yield f"unit={claim['unit']}"
    yield ", ".join(f"{k}={claim[k]}" for k in ("neighboring", "accountant") if k in claim)


def _demographics(row: Mapping[str, ConditionValue]) -> dict[str, Any]:
    named = {name.lower(): value for name, value in row.items()}
    found: dict[str, Any] = {}
    age = named.get("age")
    if isinstance(age, int | float) and 0 <= age < 1000:
        found["age"] = float(age)
    if "sex" in named:
        found["sex"] = _SEX.get(str(named["sex"]).lower(), "")
    return found


def _comment(row: Mapping[str, ConditionValue]) -> str:
    values = (f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
    return "; ".join(["SYNTHETIC, shows no person", *values]).replace("\\", "/")
