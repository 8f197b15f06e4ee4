"""Cohorts of volumes: plain folders with images/ and labels/, nnU-Net's raw layout, and the Medical Decathlon's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from medvae.errors import CohortError
from medvae.vault import itk, nifti
from medvae.vault.discover import ITK, Found, strangers
from medvae.vault.scan import Rules, Scan, Skipped, Source, names_of, stem

MASK_FOLDERS = frozenset({"labels", "label", "masks", "mask", "segmentations", "labelstr"})
MASK_SUFFIXES = ("_mask", "_seg", "_dseg", "_label")
SEVERAL = "several frames and no rule for them"


def volume_source(found: Found, rules: Rules = Rules()) -> Source:  # noqa: B008 - frozen
    """List the scans of a folder of volumes in one of its layouts, with the masks that belong to them."""
    if any(p.name.lower().endswith(ITK) for p in found.files):
        itk.simple_itk()
    skipped = strangers(found)
    images, masks = _decathlon(found, skipped) if found.layout == "decathlon" else split_masks(found)
    if found.layout == "nnunet":
        images = _nnunet_images(found, images, skipped)
    by_stem = {_case(p, found.layout): p for p in images}
    alone = len(by_stem) == len(images)
    if not alone:
        by_stem = {stem(found.name(p)): p for p in images}
    scans: list[Scan] = []
    for key, image in by_stem.items():
        mask = masks.pop(Path(key).name, None) if alone else None
        for read in readers(image, mask, rules):
            scans.append(Scan((found.name(image),), read, has_mask=mask is not None, also=(Path(key).name,)))
    for path in masks.values():
        skipped.leave("mask without an image", found.name(path))
    used = {n for s in scans for n in s.names}
    unused = {n for p in found.files for n in names_of(found.name(p))} - used
    table = found.tables[0] if len(found.tables) == 1 else None
    return Source(
        found.layout, 3, scans, _modality(found.card or {}), spaced=True, table=table, unused=unused, skipped=skipped
    )


def readers(image: Path, mask: Path | None, rules: Rules) -> Iterator[Any]:
    """Yield one reader for each scan of a file: several only where a 4D file is to give all its volumes."""
    kind: Any = itk if image.name.lower().endswith(ITK) else nifti
    read = kind.read_itk if kind is itk else kind.read_nifti
    count = kind.count_frames(image) if rules.frames == "all" and mask is None else 1
    for frame in range(count) if count > 1 else [None]:
        yield partial(read, image, mask, frame, rules)


def split_masks(found: Found) -> tuple[list[Path], dict[str, Path]]:
    """Tell images from masks by folder (labels/, masks/, labelsTr/) or by suffix (_mask, _seg).

    Returns the images, and the masks by the stem of their image.
    """
    images: list[Path] = []
    masks: dict[str, Path] = {}
    for path in found.files:
        name = stem(path.name)
        if any(part.lower() in MASK_FOLDERS for part in found.parts(path)[:-1]):
            key = name
        elif name.endswith(MASK_SUFFIXES):
            key = name[: name.rindex("_")]
        else:
            images.append(path)
            continue
        if key in masks:
            raise CohortError("two masks have the same name: keep one mask an image, with the image's name")
        masks[key] = path
    stems = {stem(p.name) for p in images}
    for key in [k for k in masks if k not in stems and k.endswith(MASK_SUFFIXES)]:
        masks.setdefault(key[: key.rindex("_")], masks.pop(key))
    return images, masks


def _case(path: Path, layout: str) -> str:
    return re.sub(r"_\d{4}$", "", stem(path.name)) if layout == "nnunet" else stem(path.name)


def _nnunet_images(found: Found, images: list[Path], skipped: Skipped) -> list[Path]:
    """Keep channel 0000 of the training images (nnU-Net v2, dataset format)."""
    first = []
    for path in images:
        case = stem(path.name)
        if found.parts(path)[0] != "imagesTr":
            skipped.leave("test image of the layout", found.name(path))
        elif re.search(r"_\d{4}$", case) and not case.endswith("_0000"):
            skipped.leave("further channel", found.name(path))
        else:
            first.append(path)
    return first


def _decathlon(found: Found, skipped: Skipped) -> tuple[list[Path], dict[str, Path]]:
    """Return the training images that dataset.json lists, and their masks; it may name only files that were found."""
    here = {found.name(p): p for p in found.files}
    images: list[Path] = []
    masks: dict[str, Path] = {}
    for entry in (found.card or {})["training"]:
        names = [str(entry.get(k, "")).removeprefix("./") for k in ("image", "label")]
        image, mask = (here.get(n) for n in names)
        if image is None:
            skipped.leave("unreadable file")
            continue
        images.append(image)
        if mask is not None:
            masks[stem(image.name)] = mask
    used = {*images, *masks.values()}
    for name, path in here.items():
        if path not in used:
            skipped.leave("test image of the layout", name)
    return images, masks


def _modality(card: Mapping[str, Any]) -> str:
    """Return the DICOM modality that dataset.json declares for the first channel; OT where it does not."""
    channels = card.get("channel_names") or card.get("modality")
    channel = str(channels.get("0", "")).upper() if isinstance(channels, dict) else ""
    return "CT" if channel == "CT" else "MR" if channel.startswith(("MR", "T1", "T2", "FLAIR")) else "OT"
