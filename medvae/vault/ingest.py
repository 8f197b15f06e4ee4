"""From a folder of real scans to a cohort store: the only way in."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.config import IngestConfig
from medvae.errors import CohortError, ConfigError
from medvae.types import Condition, ImageSpace, Progress, encode_conditions
from medvae.vault.arrays import npz_source
from medvae.vault.conditions import check_holders, plan_conditions, settle_missing, values_of
from medvae.vault.dicom import dicom_source
from medvae.vault.discover import Found, discover
from medvae.vault.grid import choose_grid, common_modality
from medvae.vault.layout_bids import bids_source
from medvae.vault.layouts import volume_source
from medvae.vault.pictures import picture_source
from medvae.vault.pool import Map, in_chunks, one_by_one, parallel
from medvae.vault.preprocess import Grid, prepare
from medvae.vault.scan import GEOMETRY, REMEDIES, Rules, Scan, Skipped, Source, Unusable, quiet
from medvae.vault.split import assign, cap, number_patients, spelling
from medvae.vault.store import SCHEMA, CohortWriter, levels
from medvae.vault.table import Row, attach, read_table
from medvae.vault.tally import Tally, fingerprint
from medvae.vault.workplace import Workplace
from medvae.version import __version__

MIN_TRAIN_PATIENTS = 2
GIB = 2**30
CHUNK = 2**18  # voxels that a task may give back: one scan, or several small ones


def ingest(source: Path, out: Path, config: IngestConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Find the scans of `source`, group them by patient, preprocess and store them; return cohort.json's content.

    A few scans are in memory at a time. `progress` counts a DICOM tree's headers first, and then the scans. Scans that
    cannot be used are counted by reason in "skipped", and listed by file in the cohort's private folder. The patient id
    serves to group and to split and is never stored. A run that was interrupted goes on where it was.

    Raises CohortError or ConfigError with one sentence where the source cannot be used as asked; `out` then does not
    exist. Messages hold counts and reasons, never a name of a file or a value of a patient.
    """
    if out.resolve().is_relative_to(source.resolve()):
        raise CohortError("the output folder lies inside the source, where it would be read as scans: give one outside")
    rules = Rules(
        colour=config.colour, frames=config.frames, slice_gap=config.slice_gap, burned_in=config.burned_in,
        display=config.intensity == "display", max_voxels=config.max_voxels,
    )  # fmt: skip
    with quiet(), Workplace(out, _story(source, config)) as place, parallel(config.workers, config.cluster) as run:
        found = discover(source, place.folder / "unpacked", int(config.max_unpacked_gib * GIB))
        src = _declared(_read(found, config, rules, progress, run), config)
        rows = _usable_rows(src, found, config)
        rows, dropped = settle_missing(_specs(src, config), rows, config.missing)
        src.skipped["missing value of a condition"] += dropped
        conditions = plan_conditions(_specs(src, config), rows)
        modality = common_modality(src, conditions)
        grid, notes = choose_grid(src, config)
        with_masks = _with_masks(rows)
        tally = Tally(src.skipped, config.identical, copies=found.layout == "dicom")
        rows = _capped(rows, config, tally)
        numbers = number_patients(rows, config.split_seed)
        with CohortWriter(out, grid.shape, with_masks, place) as writer:
            work = _Work(grid, conditions, numbers, tally, place, writer, found)
            kept = work.store(rows, run if found.layout != "npz" else one_by_one, progress)
            tally.check_shared()
            people = tally.people()
            named = {number: patient for patient, number in numbers.items()}
            kept = [replace(r, patient=named[tally.person(numbers[r.patient])]) for r in kept]
            check_holders(conditions, kept)
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
                "notes": [found.sentence(), *notes, *src.notes, *tally.notes(), *spelling(r.patient for r in kept)],
                "space": space.to_json(),
            }
            if src.unit_note:
                info["unit_note"] = src.unit_note
            _list_skipped(place.folder / "private", tally.skipped)
            writer.finish(info, {numbers[p]: side for p, side in sides.items()}, people)
    return info


def _story(source: Path, config: IngestConfig) -> str:
    """Name the source and the settings: a run goes on only with work of the same."""
    said = config.model_dump_json(exclude={"workers", "cluster"})
    at = os.stat(source) if source.is_file() else None
    file = "" if at is None else f"{at.st_size} {at.st_mtime_ns}"
    return hashlib.sha256(f"{__version__}\n{source.resolve()}\n{file}\n{said}".encode()).hexdigest()


def _read(found: Found, config: IngestConfig, rules: Rules, progress: Progress | None, run: Map) -> Source:
    if found.layout == "npz":
        if config.labels is not None:
            raise ConfigError("an .npz carries its labels inside: leave --labels out")
        return npz_source(found, rules)
    if found.layout == "png":
        return picture_source(found, rules)
    if found.layout != "dicom":
        src = bids_source(found, rules) if found.layout == "bids" else volume_source(found, rules)
        return replace(src, dims=len(config.shape) if config.shape else 3)
    dims = len(config.shape) if config.shape else None
    src = dicom_source(found, dims, config.spacing_mm is not None, progress, rules, run)
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


def _usable_rows(src: Source, found: Found, config: IngestConfig) -> list[Row]:
    """Join the table; leave out DICOM scans without a patient where others have one."""
    _some(len(src.scans), src.skipped)
    path = config.labels or src.table or _own_table(src, found)
    table = read_table(path) if path is not None else None
    if table is None and any(s.patient is not None for s in src.scans):
        named = [s for s in src.scans if s.patient is not None]
        for scan in src.scans:
            if scan.patient is None:
                src.skipped.leave("no PatientID", *scan.files)
        src.scans = named
    return attach(table, src)


def _own_table(src: Source, found: Found) -> Path | None:
    """Return the only table of a DICOM tree, where it reads as one that names scans or patients."""
    if src.layout != "dicom" or len(found.tables) != 1:
        return None
    try:
        attach(read_table(found.tables[0]), src)
    except CohortError:
        src.notes.append(
            "the table in the source does not fit its scans and was not used: give it as --labels to see why"
        )
        return None
    return found.tables[0]


def _some(usable: int, skipped: Skipped) -> None:
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


def _list_skipped(folder: Path, skipped: Skipped) -> None:
    """Write which files were left out and why: for the hospital's eyes, in a folder of mode 0700."""
    if not skipped.files:
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    lines = ["reason\tfile", *("\t".join(" ".join(cell.split()) for cell in pair) for pair in sorted(skipped.files))]
    path = folder / "skipped.tsv"
    path.touch(mode=0o600)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")


@dataclass(frozen=True, repr=False)
class _Done:
    """One scan, decoded and brought to the grid, as it is stored."""

    image: npt.NDArray[np.uint16]
    mask: npt.NDArray[np.uint8] | None
    labels: list[int]
    digest: str


def _decode(read: Any, grid: Grid) -> _Done | str:
    """Decode and preprocess one scan, or say why it cannot be used."""
    try:
        volume = read()
        made = prepare(volume, grid)
    except Unusable as verdict:
        return verdict.reason
    image = levels(made.image)
    return _Done(image, made.mask, sorted(made.labels), fingerprint(image, volume.array))


@dataclass(repr=False)
class _Work:
    """What storing needs; see `store`."""

    grid: Grid
    conditions: tuple[Condition, ...]
    numbers: Mapping[str, int]
    tally: Tally
    place: Workplace
    writer: CohortWriter
    found: Found

    def store(self, rows: list[Row], run: Map, progress: Progress | None) -> list[Row]:
        """Decode, preprocess and append scan by scan; return the rows that were kept.

        First the journal of an interrupted run is replayed, as far as it fits; then the rest is decoded, by `run`.
        """
        if any(r.scan.files for r in rows):  # rows of an .npz have no names and stay in the order of their stream
            rows = sorted(rows, key=lambda r: (self.numbers[r.patient], r.scan.files))
        kept, done = self._replay(rows)
        size = max(1, min(8, CHUNK // math.prod(self.grid.shape)))
        steps = in_chunks(run, partial(_decode, grid=self.grid), (r.scan.read for r in islice(rows, done, None)), size)
        for row, made in zip(islice(rows, done, None), steps, strict=True):
            done += 1
            key = self._key(row.scan)
            if made is None or isinstance(made, str):
                reason = made or "decoder crashed"
                self.tally.skipped.leave(reason, *row.scan.files)
                self.place.note({"scan": key, "reason": reason})
            else:
                if self._takes(row, made.digest, made.labels):
                    self.writer.append(made.image, made.mask, self.numbers[row.patient], self._vector(row))
                    kept.append(row)
                self.place.note({"scan": key, "digest": made.digest, "labels": made.labels})
            if progress is not None:
                progress(done, len(rows))
        _some(len(kept), self.tally.skipped)
        return kept

    def _replay(self, rows: list[Row]) -> tuple[list[Row], int]:
        kept: list[Row] = []
        done = 0
        for row, entry in zip(rows, self.place.entries(), strict=False):
            if entry.get("scan") != self._key(row.scan):
                break
            done += 1
            if "reason" in entry:
                self.tally.skipped.leave(str(entry["reason"]), *row.scan.files)
            elif self._takes(row, entry["digest"], entry["labels"]):
                self.writer.remember(self.numbers[row.patient], self._vector(row))
                kept.append(row)
        self.place.go_on(done)
        self.writer.open(len(kept))
        return kept, done

    def _takes(self, row: Row, digest: str, labels: list[int]) -> bool:
        return self.tally.take(digest, labels, self.numbers[row.patient], row.scan.files)

    def _vector(self, row: Row) -> Any:
        return encode_conditions(self.conditions, values_of(row, self.conditions))

    def _key(self, scan: Scan) -> str:
        """Name a scan by its files with their sizes and times, for the journal."""
        mac = hashlib.blake2b(repr((scan.files, scan.patient is None)).encode(), digest_size=16)
        for name in scan.files:
            at = self._stat(name)
            mac.update(b"" if at is None else f"{at.st_size} {at.st_mtime_ns}".encode())
        return mac.hexdigest()

    def _stat(self, name: str) -> os.stat_result | None:
        for root in (self.found.root, self.found.roots[0]):
            try:
                return os.stat(f"{root}/{name}")
            except OSError:
                continue
        return None
