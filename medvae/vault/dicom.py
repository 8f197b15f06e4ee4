"""DICOM trees: headers of allow-listed tags first, then stacks, then pixels one scan at a time."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medvae.errors import CohortError, PrivacyError
from medvae.types import FloatArray, Progress
from medvae.vault.dicom_geometry import Geometry, geometry, straighten
from medvae.vault.dicom_header import Frame, Header, read_header
from medvae.vault.dicom_pixels import read_frames
from medvae.vault.dicom_plain import read_plain
from medvae.vault.dicom_seg import MISFIT, conflicting, read_mask
from medvae.vault.dicom_series import stacks
from medvae.vault.discover import Found, strangers
from medvae.vault.pool import Map, in_chunks, one_by_one
from medvae.vault.scan import Rules, Scan, Skipped, Source, Unusable, Volume, names_of

CHUNK = 32  # headers a task
DEFAULT = Rules()


@dataclass(repr=False)
class _Tree:
    """What the headers of a tree add up to."""

    found: Found
    skipped: Skipped
    series: dict[tuple[str, str], list[Header]] = field(default_factory=lambda: defaultdict(list))
    masks: dict[str, list[Header]] = field(default_factory=lambda: defaultdict(list))
    unused: set[str] = field(default_factory=set)
    issuers: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def leave(self, reason: str, *files: str) -> None:
        names = [self.found.name(f) for f in files]
        self.skipped.leave(reason, *names)
        for name in names:
            self.unused |= names_of(name)


def dicom_source(
    found: Found,
    dims: int | None,
    need_spacing: bool,
    progress: Progress | None = None,
    rules: Rules = DEFAULT,
    run: Map = one_by_one,
) -> Source:
    """Group the files of a DICOM tree into scans.

    dims: 2 makes every image a scan, 3 every stack; None decides by what most stacks are. Files and series that
    cannot be used are counted by reason; a 2D scan without PixelSpacing is used unless `need_spacing`.

    Raises PrivacyError for images that may show text where the rules refuse them, CohortError for segmentations that
    number their segments differently.
    """
    tree = _read_tree(found, progress, rules, run)
    burned = sum(h.burned_in for headers in tree.series.values() for h in headers)
    if burned and rules.burned_in == "refuse":
        raise PrivacyError(
            f"{burned} of {len(found.files)} files may show burned-in text (names, dates): clean their pixels, or "
            "leave them out with --burned-in skip"
        )
    parts: list[tuple[Header, list[Frame]]] = []
    for headers in tree.series.values():
        parts += _parts(headers, tree, rules)
    if dims is None:
        several = sum(len(frames) > 1 for _, frames in parts)
        dims = 3 if parts and 2 * several >= len(parts) else 2
    wanted = parts if dims == 3 else [(h, [f]) for h, frames in parts for f in frames]
    names = _patients(tree)
    scans: list[Scan] = []
    patients: set[str] = set()
    used: set[str] = set()
    for header, frames in wanted:
        patient = names.get((header.patient, header.issuer))
        try:
            scan = _scan(header, frames, tree, dims, need_spacing, rules)
        except Unusable as verdict:
            tree.leave(verdict.reason, *{f.file for f in frames})
            patients.add(header.patient)
            continue
        used |= {header.series} if scan.has_mask else set()
        scans.append(replace(scan, patient=patient))
    for name, masks in tree.masks.items():
        if name not in used:
            for mask in masks:
                tree.leave("mask without an image", mask.file)
    modalities = {s.attributes["modality"] for s in scans}
    modality = modalities.pop() if len(modalities) == 1 else "mixed" if modalities else "OT"
    return Source(
        "dicom", dims, scans, modality, spaced=True, unused=tree.unused, unused_patients=patients,
        skipped=tree.skipped, notes=_notes(tree, burned),
    )  # fmt: skip


def _read_tree(found: Found, progress: Progress | None, rules: Rules, run: Map) -> _Tree:
    tree = _Tree(found, strangers(found))
    shared: dict[Any, Any] = {}  # one copy of what all images of a series say
    instances: set[str] = set()
    verdicts = in_chunks(run, partial(_header_or_reason, rules=rules), found.files, CHUNK)
    for done, (path, verdict) in enumerate(zip(found.files, verdicts, strict=True), start=1):
        if progress is not None:
            progress(done, len(found.files))
        if verdict is None or isinstance(verdict, str):
            tree.leave(verdict or "decoder crashed", str(path))
            continue
        if verdict.instance and verdict.instance in instances:
            tree.leave("duplicate file", str(path))
            continue
        instances.add(verdict.instance)
        if verdict.is_segmentation:
            tree.masks[verdict.segmented_series].append(verdict)
            continue
        header = replace(
            verdict,
            series=sys.intern(verdict.series),
            patient=sys.intern(verdict.patient),
            attributes=shared.setdefault(verdict.attributes, verdict.attributes),
            frames=tuple(_lean(f, shared) for f in verdict.frames),
        )
        if header.patient:
            tree.issuers[header.patient].add(header.issuer)
        tree.series[header.patient, header.series or header.file].append(header)
    wrong = conflicting([m for masks in tree.masks.values() for m in masks])
    if wrong:
        raise CohortError(
            f"{wrong} segment numbers stand for different things in different segmentations: number the segments alike"
        )
    return tree


def _lean(frame: Frame, shared: dict[Any, Any]) -> Frame:
    """Let a frame share with others what is the same in all of them: an archive has millions."""

    def one(value: Any) -> Any:
        return shared.setdefault(value, value)

    return replace(
        frame, orientation=one(frame.orientation), spacing=one(frame.spacing), marks=one(frame.marks),
        plain=one(frame.plain),
    )  # fmt: skip


def _header_or_reason(path: Path, rules: Rules) -> Header | str:
    try:
        return read_header(path, rules)
    except Unusable as verdict:
        return verdict.reason
    except OSError:
        return "unreadable file"


def _parts(headers: Sequence[Header], tree: _Tree, rules: Rules) -> Iterator[tuple[Header, list[Frame]]]:
    """Yield the scans of one series as (a header that speaks for it, its images)."""
    placed = {h.file: h for h in headers if not h.unplaced}
    found, copies = stacks([f for h in placed.values() for f in h.frames], partial(_same_pixels, rules=rules))
    for copy in copies:
        tree.leave("same pixels as another file", copy.file)
    for frames in found:
        yield placed[frames[0].file], frames
    for header in headers:
        if header.unplaced:
            yield from _by_rule(header, tree, rules)


def _by_rule(header: Header, tree: _Tree, rules: Rules) -> Iterator[tuple[Header, list[Frame]]]:
    """Yield what the config takes of several frames without a place: cine, dynamic and whole-slide images."""
    if rules.frames == "refuse":
        tree.leave("several frames and no rule for them", header.file)
        return
    wanted = {"first": [0], "mean": [-1], "all": range(header.unplaced)}[rules.frames]
    for i in wanted:
        yield header, [replace(header.frames[0], index=i)]


def _same_pixels(one: Frame, other: Frame, rules: Rules) -> bool:
    try:
        (a,), (b,) = (read_frames(Path(f.file), [f.index], rules) for f in (one, other))
    except Unusable:
        return False
    return np.array_equal(a, b)


def _patients(tree: _Tree) -> dict[tuple[str, str], str]:
    """Return the patient of every (id, issuer). An id that occurs with and without an issuer is one person: taking two
    for one costs quality, and taking one for two costs privacy."""
    return {
        (patient, issuer): patient if "" in issuers or not issuer else f"{patient}\0{issuer}"
        for patient, issuers in tree.issuers.items()
        for issuer in issuers
    }


def _scan(header: Header, frames: list[Frame], tree: _Tree, dims: int, need_spacing: bool, rules: Rules) -> Scan:
    if dims == 3 and len(frames) < 2:
        raise Unusable("a single slice where volumes are asked")
    if (dims == 3 or need_spacing) and any(f.spacing is None for f in frames):
        raise Unusable("no PixelSpacing")
    if frames[0].rows * frames[0].columns * len(frames) > rules.max_voxels:
        raise Unusable("header claims an absurd size")
    where = geometry(frames, rules)
    masks = tree.masks.get(header.series, [])
    if len(masks) > 1:
        raise Unusable("several segmentations of one series")
    if masks and where.straight is not None:
        raise Unusable(MISFIT)
    mask = (Path(masks[0].file), masks[0].frames) if masks else None
    ordered = tuple(frames[i] for i in where.order)
    files = tuple(dict.fromkeys(tree.found.name(f.file) for f in ordered))
    read = partial(read_stack, ordered, where, mask, rules)
    return Scan(files, read, None, dict(header.attributes), has_mask=mask is not None, also=(header.series,))


def read_stack(
    ordered: Sequence[Frame],
    where: Geometry,
    mask: tuple[Path, tuple[Frame, ...]] | None = None,
    rules: Rules = DEFAULT,
) -> Volume:
    """Decode images, in order along the normal, into (columns, rows, slices) with a RAS affine.

    An index of -1 is the mean over all frames of the file.
    """
    names = {frame.file for frame in ordered}
    if len(names) == 1 and len(ordered) > 1:
        images = read_frames(Path(names.pop()), [frame.index for frame in ordered], rules)
    else:
        images = [_image(frame, rules) for frame in ordered]
    if len({image.shape for image in images}) > 1:
        raise Unusable("slices of different size or spacing")
    stack = np.stack(images).T  # as it lies in memory: turning it around costs more than decoding did
    if where.straight is not None:
        stack = straighten(stack, where.straight)
    if mask is None:
        return Volume(stack, where.affine)
    return Volume(stack, where.affine, read_mask(*mask, stack.shape, where.affine), where.affine)


def _image(frame: Frame, rules: Rules) -> FloatArray:
    if frame.index < 0:
        mean: FloatArray = np.mean(read_frames(Path(frame.file), None, rules), axis=0, dtype=np.float32)
        return mean
    if frame.plain is not None:
        image = read_plain(frame.file, frame.offset, frame.rows, frame.columns, frame.plain)
        if image is not None:
            return image
    return read_frames(Path(frame.file), [frame.index], rules)[0]


def _notes(tree: _Tree, burned: int) -> list[str]:
    headers = [h for group in tree.series.values() for h in group]
    notes = []
    if burned:
        notes.append(
            f"{burned} images are of a kind that may show burned-in text (names, dates): look at them, or leave them "
            "out with --burned-in skip"
        )
    merged = sum("" in issuers and len(issuers) > 1 for issuers in tree.issuers.values())
    if merged:
        notes.append(f"{merged} patient ids occur with and without an issuer: each counts as one patient")
    pet = [h.suv for h in headers if dict(h.attributes)["modality"] == "PT"]
    if pet and not all(pet):
        notes.append(
            f"{pet.count(False)} of {len(pet)} PET images stay in the units of their files: tags for SUV are missing"
        )
    return notes
