"""From a folder of real scans to a cohort store: the only way in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medvae.config import IngestConfig
from medvae.errors import CohortError, ConfigError
from medvae.types import Condition, ImageSpace, Progress, encode_conditions
from medvae.vault.arrays import npz_source, picture_source
from medvae.vault.conditions import check_holders, plan_conditions, values_of
from medvae.vault.dicom import dicom_source
from medvae.vault.discover import Found, discover
from medvae.vault.grid import choose_grid, common_modality
from medvae.vault.nifti import nifti_source
from medvae.vault.preprocess import Grid, prepare
from medvae.vault.scan import GEOMETRY, REMEDIES, Source, Unusable, quiet
from medvae.vault.split import assign, cap, number_patients
from medvae.vault.store import SCHEMA, CohortWriter, check_free
from medvae.vault.table import Row, attach, read_table
from medvae.vault.tally import Tally

MIN_TRAIN_PATIENTS = 2


def ingest(source: Path, out: Path, config: IngestConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Find the scans of `source`, group them by patient, preprocess and store them; return cohort.json's content.

    One scan is in memory at a time. `progress` counts a DICOM tree's headers first, and then the scans. Scans that
    cannot be used are counted by reason in "skipped". The patient id serves to group and to split and is never stored.

    Raises CohortError or ConfigError with one sentence where the source cannot be used as asked; `out` then does not
    exist. Messages hold counts and reasons, never a name of a file or a value of a patient.
    """
    check_free(out)
    if out.resolve().is_relative_to(source.resolve()):
        raise CohortError("the output folder lies inside the source, where it would be read as scans: give one outside")
    with quiet():
        src = _declared(_read(discover(source), config, progress), config)
        rows = _usable_rows(src, config)
        conditions = plan_conditions(_specs(src, config), rows)
        modality = common_modality(src, conditions)
        grid, notes = choose_grid(src, config)
        with_masks = _with_masks(rows)
        tally = Tally(src.skipped)
        rows = _capped(rows, config, tally)
        numbers = number_patients(rows, config.split_seed)
        with CohortWriter(out, grid.shape, with_masks) as writer:
            kept = _store(rows, numbers, grid, conditions, writer, tally, progress)
            sides = assign(kept, config.holdout, config.split_seed)
            train = sum(s == "train" for s in sides.values())
            if train < MIN_TRAIN_PATIENTS:
                raise CohortError(
                    f"the training split has {train} of {len(sides)} patients and needs {MIN_TRAIN_PATIENTS} or more: "
                    "add patients, or lower the holdout share"
                )
            spacing = grid.spacing_mm or (1.0,) * len(grid.shape)
            space = ImageSpace(grid.shape, spacing, modality, grid.intensity, conditions, tally.mask_labels())
            info = {
                "schema": SCHEMA,
                "layout": src.layout,
                "unit": "patient",
                "patients": len(sides),
                "images": len(kept),
                "spatial_dims": space.spatial_dims,
                "spatial_shape": list(space.spatial_shape),
                "conditions": {c.name: c.to_json() for c in conditions},
                "masks": with_masks,
                "skipped": tally.reasons(),
                "split": {"train": train, "holdout": len(sides) - train},
                "max_scans_per_patient": config.max_scans_per_patient,
                "split_seed": config.split_seed,
                "notes": [*notes, *tally.notes()],
                "space": space.to_json(),
            }
            if src.unit_note:
                info["unit_note"] = src.unit_note
            writer.finish(info, {numbers[p]: side for p, side in sides.items()})
    return info


def _read(found: Found, config: IngestConfig, progress: Progress | None) -> Source:
    if found.layout == "npz":
        if config.labels is not None:
            raise ConfigError("an .npz carries its labels inside: leave --labels out")
        return npz_source(found)
    if found.layout == "png":
        return picture_source(found)
    if found.layout != "dicom":
        return replace(nifti_source(found), dims=len(config.shape) if config.shape else 3)
    src = dicom_source(found, len(config.shape) if config.shape else None, config.spacing_mm is not None, progress)
    faulty = sum(src.skipped[r] for r in GEOMETRY)
    if faulty and config.slice_gap == "refuse":
        reason = max(GEOMETRY, key=lambda r: src.skipped[r])
        raise CohortError(
            f"{faulty} of {faulty + len(src.scans)} series cannot be stacked ({reason}): {REMEDIES[reason]}"
        )
    return src


def _declared(src: Source, config: IngestConfig) -> Source:
    """Take the modality from the config where the format does not tell it."""
    if config.modality is None or src.modality == config.modality:
        return src
    if src.modality != "OT":
        raise ConfigError(f"the source is of modality {src.modality}, not {config.modality}: leave the modality out")
    return replace(src, modality=config.modality)


def _usable_rows(src: Source, config: IngestConfig) -> list[Row]:
    """Join the table; leave out DICOM scans without a patient where others have one."""
    _some(len(src.scans), src.skipped)
    path = config.labels or src.table
    table = read_table(path) if path is not None else None
    if table is None and any(s.patient is not None for s in src.scans):
        named = [s for s in src.scans if s.patient is not None]
        src.skipped["no PatientID"] += len(src.scans) - len(named)
        src.scans = named
    return attach(table, src)


def _some(usable: int, skipped: Counter[str]) -> None:
    """Raise CohortError, naming the most frequent reason, where nothing is left to use."""
    if usable:
        return
    total = sum(skipped.values())
    if not total:
        raise CohortError("the source holds no scans: give a folder of NIfTI, DICOM or PNG images, or an .npz file")
    reason, count = max(skipped.items(), key=lambda item: (item[1], item[0]))
    raise CohortError(f"nothing can be used: {reason} in {count} of {total} cases: {REMEDIES[reason]}")


def _specs(src: Source, config: IngestConfig) -> tuple[str, ...]:
    if config.conditions:
        return config.conditions
    return ("label",) if src.layout == "npz" and all("label" in s.attributes for s in src.scans) else ()


def _capped(rows: list[Row], config: IngestConfig, tally: Tally) -> list[Row]:
    kept = cap(rows, config.max_scans_per_patient, config.split_seed)
    tally.skipped["over max_scans_per_patient"] += len(rows) - len(kept)
    return kept


def _with_masks(rows: Sequence[Row]) -> bool:
    count = sum(r.scan.has_mask for r in rows)
    if 0 < count < len(rows):
        raise CohortError(f"{len(rows) - count} of {len(rows)} scans have no mask: add theirs, or take all masks away")
    return count > 0


def _store(
    rows: list[Row],
    numbers: Mapping[str, int],
    grid: Grid,
    conditions: tuple[Condition, ...],
    writer: CohortWriter,
    tally: Tally,
    progress: Progress | None,
) -> list[Row]:
    """Decode, preprocess and append scan by scan; return the rows that were kept."""
    if any(r.scan.names for r in rows):  # rows of an .npz have no names and stay in the order of their stream
        rows = sorted(rows, key=lambda r: (numbers[r.patient], sorted(r.scan.names)))
    kept: list[Row] = []
    for done, row in enumerate(rows, start=1):
        try:
            volume = row.scan.read()
            prepared = prepare(volume, grid)
        except Unusable as verdict:
            tally.skipped[verdict.reason] += 1
        else:
            tally.look(volume, prepared.labels, row.patient)
            vector = encode_conditions(conditions, values_of(row, conditions))
            writer.append(prepared.image, prepared.mask, numbers[row.patient], vector)
            kept.append(row)
        if progress is not None:
            progress(done, len(rows))
    _some(len(kept), tally.skipped)
    check_holders(conditions, kept)
    return kept
