"""DICOM segmentations as masks: each of their frames is put where it lies in the volume it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medvae.vault.dicom_geometry import LPS_TO_RAS, SAME_DIRECTION
from medvae.vault.dicom_header import Frame, Header
from medvae.vault.scan import Rules, Unusable

MISFIT = "segmentation that fits no series"
NEAR = 0.1  # largest distance from a voxel's centre, in voxels


def read_mask(
    path: Path, frames: Sequence[Frame], shape: tuple[int, ...], affine: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8]:
    """Return the label map (columns, rows, slices) of a segmentation on an image's grid of that shape and RAS affine.

    Labels are segment numbers; where segments overlap, the higher number stays; a fractional segment counts from one
    half. Frames outside the grid's slices are left out, as an image of one slice asks.

    Raises Unusable where the segmentation lies on another grid, or cannot be decoded.
    """
    columns, rows, slices = shape
    to_voxels = np.linalg.inv(LPS_TO_RAS @ affine)
    placed: list[tuple[int, int, Frame]] = []
    for i, frame in enumerate(frames):
        if frame.position is None or frame.orientation is None or (frame.rows, frame.columns) != (rows, columns):
            raise Unusable(MISFIT)
        voxel = to_voxels @ np.append(frame.position, 1.0)
        _check_direction(frame, affine)
        if np.abs(voxel[:2]).max() > NEAR or abs(voxel[2] - round(voxel[2])) > NEAR:
            raise Unusable(MISFIT)
        if 0 <= round(voxel[2]) < slices:
            placed.append((round(voxel[2]), i, frame))
    mask = np.zeros(shape, dtype=np.uint8)
    if not placed:
        return mask
    decoded, top, is_map = _decode(path, [i for _, i, _ in placed])
    for (k, _, frame), stored in zip(placed, decoded, strict=True):
        if is_map:
            mask[..., k] = np.maximum(mask[..., k], stored.T)
        else:
            drawn = top <= stored.T * 2
            mask[..., k] = np.maximum(mask[..., k], np.where(drawn, frame.segment, 0))
    return mask


def _check_direction(frame: Frame, affine: npt.NDArray[np.float64]) -> None:
    axes = (LPS_TO_RAS @ affine)[:3, :2]
    lengths = np.linalg.norm(axes, axis=0)
    orientation = np.asarray(frame.orientation).reshape(2, 3).T
    spacing = frame.spacing or (lengths[1], lengths[0])
    turned = np.abs(axes / lengths - orientation).max() > 10 * SAME_DIRECTION
    if turned or not np.allclose(spacing, lengths[::-1], rtol=1e-2):
        raise Unusable(MISFIT)


def _decode(path: Path, indices: list[int]) -> tuple[list[npt.NDArray[np.int64]], int, bool]:
    """Return the stored values of frames, the value that stands for a full segment, and whether they are label maps."""
    import pydicom
    from pydicom.pixels import iter_pixels

    from medvae.vault.dicom_guard import check_dataset, check_pixels
    from medvae.vault.dicom_pixels import PIXEL_TAGS

    rules = Rules()
    try:
        check_dataset(path, rules)
        ds = pydicom.dcmread(path, specific_tags=[*PIXEL_TAGS, "SegmentationType", "MaximumFractionalValue"])
        check_pixels(ds, rules)
        count = int(ds.get("NumberOfFrames") or 1)
        frames = [ds.pixel_array] if count == 1 else list(iter_pixels(ds, indices=indices))
        kind = str(ds.get("SegmentationType") or "BINARY")
        top = int(ds.get("MaximumFractionalValue") or 1) if kind == "FRACTIONAL" else 1
        return [f.astype(np.int64) for f in frames], top, kind == "LABELMAP"
    except Unusable:
        raise
    except Exception:  # decoders raise many kinds, all of them about this one file
        raise Unusable("undecodable pixel data") from None


def conflicting(segmentations: Sequence[Header]) -> int:
    """Count the segment numbers that stand for different things in different files."""
    meanings: dict[int, set[str]] = {}
    for header in segmentations:
        for number, words in header.segments:
            meanings.setdefault(number, set()).add(words)
    return sum(len(m) > 1 for m in meanings.values())
