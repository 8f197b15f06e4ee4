"""NIfTI volumes, read one at a time: what a header claims is checked before it is believed."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.types import FloatArray
from medvae.vault.scan import Rules, Unusable, Volume

Array = npt.NDArray[Any]
LUMINANCE = np.asarray([0.299, 0.587, 0.114])  # ITU-R BT.601
MAX_EXTENSIONS = 2**24  # bytes between header and data
LOAD_ERRORS = (OSError, ValueError, OverflowError, MemoryError, zlib.error)


def read_nifti(path: Path, mask: Path | None, frame: int | None = None, rules: Rules = Rules()) -> Volume:  # noqa: B008
    """Read one image, (X, Y, Z) in its header's scaled units, and its mask.

    frame: which volume of a 4D file, or -1 for the mean over all; None takes 3D files only, and 4D ones by
    `rules.frames`. Raises Unusable for files that are torn, have frames and no rule, hold colour where that is refused,
    complex numbers, or claim an absurd size.
    """
    array, affine = _load(path, frame, rules)
    if mask is None:
        return Volume(array, affine)
    labels, mask_affine = _load(mask, None, Rules(max_voxels=rules.max_voxels))
    return Volume(array, affine, labels, mask_affine)


def count_frames(path: Path) -> int:
    """Return how many volumes a file holds by its header; 1 where it cannot be read, which reading will say."""
    try:
        shape, _, _ = _header(path)
    except Unusable:
        return 1
    return math.prod(shape[3:])


def frame_by_rule(shape: tuple[int, ...], frame: int | None, rules: Rules) -> int:
    """Return the volume to take of (X, Y, Z, ...), -1 for the mean. Raises Unusable where no rule is given."""
    count = math.prod(shape[3:])
    if frame is not None or count == 1:
        return frame or 0
    if rules.frames == "refuse" or rules.frames == "all":
        raise Unusable("several frames and no rule for them")
    return -1 if rules.frames == "mean" else 0


def _header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any], Any]:
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        _check_offset(path)
        image = nibabel.load(path)
        return tuple(int(n) for n in image.shape), image.get_data_dtype(), image
    except Unusable:
        raise
    except EOFError:
        raise Unusable("truncated file") from None
    except (*LOAD_ERRORS, ImageFileError):
        raise Unusable("unreadable file") from None
    except Exception:  # nibabel raises many kinds on foreign bytes, all of them about this one file
        raise Unusable("unreadable file") from None


def _check_offset(path: Path) -> None:
    """Refuse extensions of an absurd size before nibabel reads them: a compressed file claims gigabytes at no cost."""
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
        start = stream.read(176)
    order = "<" if start[:2] in (b"\x5c\x01", b"\x1c\x02") else ">"
    size = struct.unpack_from(f"{order}i", start)[0] if len(start) == 176 else 0
    offset = struct.unpack_from(f"{order}q", start, 168) if size == 540 else struct.unpack_from(f"{order}f", start, 108)
    if size in (348, 540) and not offset[0] < MAX_EXTENSIONS:
        raise Unusable("header claims an absurd size")


def _load(path: Path, frame: int | None, rules: Rules) -> tuple[Array, npt.NDArray[np.float64]]:
    shape, dtype, image = _header(path)
    colour = dtype.fields is not None
    if dtype.kind == "c":
        raise Unusable("complex numbers")
    if colour and rules.colour == "refuse":
        raise Unusable("colour")
    volume = shape[:3] if len(shape) > 2 else (*shape, 1)
    if len(shape) < 2 or min(shape) < 1 or math.prod(volume) > rules.max_voxels:
        raise Unusable("header claims an absurd size")
    wanted = frame_by_rule(shape, frame, rules)
    try:
        proxy = image.dataobj
        if len(shape) <= 3:
            array = np.asanyarray(proxy)
        elif wanted >= 0:
            array = np.asanyarray(proxy[(..., *np.unravel_index(wanted, shape[3:]))])
        else:
            array = _mean(proxy, shape)
        array = array.reshape(volume)
        return (_gray(array) if colour else _plain(array)), np.asarray(image.affine, dtype=np.float64)
    except (*LOAD_ERRORS, EOFError):
        raise Unusable("truncated file") from None


def _mean(proxy: Any, shape: tuple[int, ...]) -> FloatArray:
    """Average over all axes beyond the third, volume by volume: memory holds two."""
    total = np.zeros(shape[:3], dtype=np.float64)
    for index in np.ndindex(*shape[3:]):
        total += np.asanyarray(proxy[(..., *index)])
    return (total / math.prod(shape[3:])).astype(np.float32)


def _gray(array: Array) -> FloatArray:
    channels = np.stack([array[name] for name in list(array.dtype.names or ())[:3]], axis=-1)
    return np.asarray(channels @ LUMINANCE, dtype=np.float32)


def _plain(array: Array) -> FloatArray:
    """Return float32, whatever the numbers were: beyond its range they become infinite, which is refused later."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32, order="K")
