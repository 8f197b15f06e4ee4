"""NIfTI cohorts: plain folders with images/ and labels/, nnU-Net's raw layout, and BIDS."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.errors import CohortError
from medvae.vault.discover import Found, strangers
from medvae.vault.scan import MAX_VOXELS, Scan, Source, Unusable, Volume, names_of, stem

MASK_FOLDERS = frozenset({"labels", "label", "masks", "mask", "segmentations", "labelstr"})
MASK_SUFFIXES = ("_mask", "_seg", "_dseg", "_label")
# Entities that tell derived files of one image apart (BIDS 1.9, appendix "entities").
DERIVED_ENTITIES = frozenset({"desc", "label", "space", "res", "den", "seg", "atlas", "hemi", "from", "to", "mode"})
MRI_SUFFIXES = frozenset({"T1w", "T2w", "FLAIR", "PDw", "T2starw", "T1map", "T2map", "inplaneT1", "inplaneT2"})


def nifti_source(found: Found) -> Source:
    """List the scans of a NIfTI folder in one of its three layouts, with the masks that belong to them."""
    if found.layout == "bids":
        return _bids(found)
    images, masks, skipped = split_masks(found)
    if found.layout == "nnunet":
        images, skipped = _nnunet_images(found, images, skipped)
    by_stem = {_case(p, found.layout): p for p in images}
    if len(by_stem) < len(images):
        by_stem = {stem(p.relative_to(found.root).as_posix()): p for p in images}
    scans = []
    for key, image in by_stem.items():
        mask = masks.pop(Path(key).name, None) if len(by_stem) == len(images) else None
        names = names_of(image, found.root) | {Path(key).name}
        scans.append(Scan(names=names, read=partial(read_nifti, image, mask), has_mask=mask is not None))
    skipped["mask without an image"] += len(masks)
    unused = {n for p in found.files if p not in set(images) for n in names_of(p, found.root)}
    modality = _nnunet_modality(found.root) if found.layout == "nnunet" else "OT"
    table = found.tables[0] if len(found.tables) == 1 else None
    unused -= {n for s in scans for n in s.names}
    return Source(
        found.layout, 3, scans, modality, spaced=True, table=table, unused=unused, skipped=strangers(found) + skipped
    )


def split_masks(found: Found) -> tuple[list[Path], dict[str, Path], Counter[str]]:
    """Tell images from masks by folder (labels/, masks/, labelsTr/) or by suffix (_mask, _seg).

    Returns the images, the masks by the stem of their image, and an empty count.
    """
    images: list[Path] = []
    masks: dict[str, Path] = {}
    for path in found.files:
        name = stem(path.name)
        if any(part.lower() in MASK_FOLDERS for part in path.relative_to(found.root).parts[:-1]):
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
    return images, masks, Counter()


def _case(path: Path, layout: str) -> str:
    return re.sub(r"_\d{4}$", "", stem(path.name)) if layout == "nnunet" else stem(path.name)


def _nnunet_images(found: Found, images: list[Path], skipped: Counter[str]) -> tuple[list[Path], Counter[str]]:
    """Keep channel 0000 of the training images (nnU-Net v2, dataset format)."""
    train = [p for p in images if p.relative_to(found.root).parts[0] == "imagesTr"]
    first = [p for p in train if not re.search(r"_\d{4}$", stem(p.name)) or stem(p.name).endswith("_0000")]
    counts = {"test image of the layout": len(images) - len(train), "further channel": len(train) - len(first)}
    return first, skipped + Counter(counts)


def _nnunet_modality(root: Path) -> str:
    """Return the DICOM modality that dataset.json declares for the first channel; OT where it does not."""
    try:
        card = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        channel = str((card.get("channel_names") or card.get("modality"))["0"]).upper()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "OT"
    return "CT" if channel == "CT" else "MR" if channel.startswith(("MR", "T1", "T2", "FLAIR")) else "OT"


def _entities(path: Path) -> tuple[dict[str, str], str]:
    *parts, suffix = stem(path.name).split("_")
    return dict(p.split("-", 1) for p in parts if "-" in p), suffix


def _bids(found: Found) -> Source:
    """List the images of a BIDS data set; a participant's label is the patient, derivatives give masks."""
    images: list[tuple[Path, dict[str, str], str]] = []
    masks: dict[frozenset[tuple[str, str]], Path] = {}
    for path in found.files:
        entities, suffix = _entities(path)
        core = frozenset((k, v) for k, v in entities.items() if k not in DERIVED_ENTITIES)
        if suffix in {"mask", "dseg"}:
            if core in masks:
                raise CohortError("several masks belong to one image of the BIDS source: keep one mask an image")
            masks[core] = path
        elif path.relative_to(found.root).parts[0].startswith("sub-"):
            images.append((path, entities, suffix))
    scans = []
    for path, entities, suffix in images:
        mask = masks.get(frozenset(entities.items()))
        scans.append(
            Scan(
                names=names_of(path, found.root),
                read=partial(read_nifti, path, mask),
                patient=path.relative_to(found.root).parts[0],
                attributes={"suffix": suffix},
                has_mask=mask is not None,
            )
        )
    suffixes = {s for _, _, s in images}
    modality = "MR" if suffixes and suffixes <= MRI_SUFFIXES else "CT" if suffixes == {"ct"} else "OT"
    table = next((t for t in found.tables if t == found.root / "participants.tsv"), None)
    return Source("bids", 3, scans, modality, spaced=True, table=table, skipped=strangers(found))


def read_nifti(path: Path, mask: Path | None) -> Volume:
    """Read one image, (X, Y, Z) in its header's scaled units, and its mask.

    Raises Unusable for files that are torn, have more than three dimensions, hold colour, or claim an absurd size.
    """
    array, affine = _load(path)
    if mask is None:
        return Volume(array.astype(np.float32), affine)
    labels, mask_affine = _load(mask)
    return Volume(array.astype(np.float32), affine, labels, mask_affine)


def _load(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        image = nibabel.load(path)
        shape = tuple(int(n) for n in image.shape)
        dtype = image.get_data_dtype()
    except EOFError:
        raise Unusable("truncated file") from None
    except (OSError, ValueError, zlib.error, ImageFileError):
        raise Unusable("unreadable file") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise Unusable("more than three dimensions")
    if dtype.fields is not None or dtype.kind == "c":
        raise Unusable("colour")
    if len(shape) < 2 or min(shape) < 1 or math.prod(shape) > MAX_VOXELS:
        raise Unusable("header claims an absurd size")
    try:
        array = np.asanyarray(image.dataobj).reshape(shape if len(shape) == 3 else (*shape, 1))
    except (OSError, ValueError, EOFError, zlib.error):
        raise Unusable("truncated file") from None
    return array, np.asarray(image.affine, dtype=np.float64)
