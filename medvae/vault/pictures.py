"""Folders of PNG, JPEG, TIFF or BMP pictures, with a table that says whose they are."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.vault.discover import Found, strangers
from medvae.vault.layouts import split_masks
from medvae.vault.nifti import LUMINANCE
from medvae.vault.scan import Rules, Scan, Source, Unusable, Volume, stem

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # no other decoder of Pillow's is ever tried


def picture_source(found: Found, rules: Rules = Rules()) -> Source:  # noqa: B008 - frozen
    """List the pictures of a folder, with masks from masks/ or labels/. Pages of a TIFF are frames."""
    images, masks = split_masks(found)
    skipped = strangers(found)
    stems = [stem(p.name) for p in images]
    scans: list[Scan] = []
    for path, key in zip(images, stems, strict=True):
        mask = masks.pop(key, None) if masks and stems.count(key) == 1 else None
        pages = _pages(path) if rules.frames == "all" and mask is None else 1
        for page in range(pages) if pages > 1 else [None]:
            read = partial(read_picture, path, mask, page, rules)
            scans.append(Scan((found.name(path),), read, has_mask=mask is not None))
    for path in masks.values():
        skipped.leave("mask without an image", found.name(path))
    eight = all(_bits(p) == 8 for p in images)
    table = found.tables[0] if len(found.tables) == 1 else None
    return Source("png", 2, scans, window=(0.0, 255.0) if eight else None, table=table, skipped=skipped)


def read_picture(path: Path, mask: Path | None, page: int | None = None, rules: Rules = Rules()) -> Volume:  # noqa: B008
    """Read one picture, (rows, columns). Colour is taken where all channels are equal, or as luminance by the rules."""
    image = _picture(path, page, rules).astype(np.float32)
    return Volume(image) if mask is None else Volume(image, mask=_picture(mask, None, rules, labels=True))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a picture by its header. Every failure of a decoder is a verdict on this one file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except Unusable:
        raise
    except (Image.DecompressionBombError, MemoryError):
        raise Unusable("header claims an absurd size") from None
    except UnidentifiedImageError:
        raise Unusable("not an image") from None
    except (OSError, ValueError, SyntaxError, EOFError, zlib.error):
        raise Unusable("truncated file") from None
    except Exception:  # Pillow raises many kinds on foreign bytes (TypeError, KeyError, struct.error, ...)
        raise Unusable("unreadable file") from None


def _bits(path: Path) -> int:
    """Return 8 or 16 by the header alone; files that cannot be opened are judged when they are read."""
    try:
        with _opened(path) as image:
            return 16 if image.mode.startswith(("I", "F")) else 8
    except Unusable:
        return 8


def _pages(path: Path) -> int:
    try:
        with _opened(path) as image:
            return int(getattr(image, "n_frames", 1))
    except Unusable:
        return 1


def _picture(path: Path, page: int | None, rules: Rules, labels: bool = False) -> npt.NDArray[Any]:
    with _opened(path) as image:
        if image.width * image.height > rules.max_pixels:
            raise Unusable("header claims an absurd size")
        pages = int(getattr(image, "n_frames", 1))
        if pages == 1 or page is not None:
            image.seek(page or 0)
            return _array(image, rules, labels)
        if rules.frames in ("refuse", "all"):
            raise Unusable("several frames and no rule for them")
        if rules.frames == "first":
            return _array(image, rules, labels)
        total: Any = 0.0
        for i in range(pages):
            image.seek(i)
            if image.width * image.height > rules.max_pixels:
                raise Unusable("header claims an absurd size")
            total = total + _array(image, rules, labels)
        return np.asarray(total / pages)


def _array(image: Any, rules: Rules, labels: bool) -> npt.NDArray[Any]:
    if image.width * image.height > rules.max_pixels:
        raise Unusable("header claims an absurd size")
    if image.mode == "1":
        image = image.convert("L")
    elif (
        image.mode not in ("L", "F", "I")
        and not image.mode.startswith("I;16")
        and not (labels and image.mode == "P")  # a palette mask's indices are its labels
    ):
        image = image.convert("RGB")
    array = np.asarray(image)
    if array.ndim == 2:
        return array
    if (array == array[..., :1]).all():
        return array[..., 0]
    if rules.colour == "refuse" or labels:
        raise Unusable("colour")
    return np.asarray(array @ LUMINANCE, dtype=np.float32)
