"""DICOM segmentations as masks: each of their frames is put where it lies in the volume it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medvae.vault.dicom_file import open_dataset
from medvae.vault.dicom_geometry import LPS_TO_RAS, SAME_DIRECTION
from medvae.vault.dicom_header import Frame, Header
from medvae.vault.dicom_pixels import read_stored
from medvae.vault.scan import Rules, Unusable

MISFIT = "segmentation that fits no series"
LARGEST = 2**31  # voxels over all segments, of which the wanted frames alone are decoded
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
    top, is_map = _kind(path)
    decoded = read_stored(path, [i for _, i, _ in placed], Rules(max_voxels=LARGEST))
    for (k, _, frame), stored in zip(placed, decoded, strict=True):
        if is_map:
            mask[..., k] = np.maximum(mask[..., k], stored.T.astype(np.uint8))
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


def _kind(path: Path) -> tuple[int, bool]:
    """Return the value that stands for a full segment, and whether the frames are label maps."""
    ds = open_dataset(path, ["SOPClassUID", "SegmentationType", "MaximumFractionalValue"], Rules())
    kind = str(ds.get("SegmentationType") or "BINARY")
    return int(ds.get("MaximumFractionalValue") or 1) if kind == "FRACTIONAL" else 1, kind == "LABELMAP"


def conflicting(segmentations: Sequence[Header]) -> int:
    """Count the segment numbers that stand for different things in different files."""
    meanings: dict[int, set[str]] = {}
    for header in segmentations:
        for number, words in header.segments:
            meanings.setdefault(number, set()).add(words)
    return sum(len(m) > 1 for m in meanings.values())
