"""The geometry of a stack of DICOM images: their order, the volume's affine, and a way to make crooked stacks straight.

Coordinates are RAS millimetres inside medvae; DICOM's are LPS (PS3.3, C.7.6.2.1.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.types import FloatArray
from medvae.vault.dicom_header import Frame
from medvae.vault.scan import Rules, Unusable

Matrix = npt.NDArray[np.float64]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # a single image without orientation is taken as it is shown
ORIGIN = (0.0, 0.0, 0.0)
SAME_DIRECTION = 1e-3  # largest difference of direction cosines
SAME_PLACE = 1e-3  # mm along the normal
EVEN = 0.01  # largest deviation of a slice distance, as a share of the median
SHEAR = 0.01  # largest drift of the slices sideways, as a share of the distance
LONGEST_HOLE = 3.0  # in median slice distances: what `resample` fills by interpolation


@dataclass(frozen=True)
class Straight:
    """How to resample a crooked stack. heights: (slices,) along the normal in mm, rising; shifts: (slices, 2) in
    voxels along (columns, rows), what each slice is moved by; pad: voxels added (before, after) of columns and rows."""

    heights: tuple[float, ...]
    shifts: tuple[tuple[float, float], ...]
    pad: tuple[tuple[int, int], tuple[int, int]]
    count: int


@dataclass(frozen=True)
class Geometry:
    """order: indices of the slices along the normal; affine: (4, 4) from (column, row, slice) to RAS mm."""

    order: tuple[int, ...]
    affine: Matrix
    straight: Straight | None = None


def same_direction(a: Frame, b: Frame) -> bool:
    """Whether two images lie in parallel planes with the same axes; images without orientation are alike."""
    if a.orientation is None or b.orientation is None:
        return a.orientation is b.orientation
    return max(abs(x - y) for x, y in zip(a.orientation, b.orientation, strict=True)) <= SAME_DIRECTION


def heights(frames: Sequence[Frame]) -> Matrix:
    """Return each image's place along the common normal in mm. Raises Unusable where one has no place."""
    if any(f.orientation is None or f.position is None for f in frames):
        raise Unusable("no slice position or orientation")
    orientation = np.asarray(frames[0].orientation, dtype=np.float64)
    normal = np.cross(orientation[:3], orientation[3:])
    found: Matrix = np.asarray([f.position for f in frames], dtype=np.float64) @ normal
    return found


def geometry(frames: Sequence[Frame], rules: Rules = Rules()) -> Geometry:  # noqa: B008 - frozen
    """Return the geometry of parallel images of one stack.

    The affine's columns are row direction times column spacing, column direction times row spacing, and the step from
    slice to slice. A single slice may lack any of them. With the rule `resample`, uneven spacing and gantry tilt give a
    rectangular grid at the median distance and the way to fill it.

    Raises Unusable for differing sizes, gaps, two slices at one place, and slices that drift sideways (gantry tilt).
    """
    first = frames[0]
    if len(frames) == 1:
        orientation, position = first.orientation or AXIAL, first.position or ORIGIN
        spacing = first.spacing or (1.0, 1.0)
        axes = _axes(orientation)
        return Geometry((0,), _affine(axes, spacing, axes[2] * first.thickness, position))
    if any(f.spacing is None for f in frames):
        raise Unusable("no slice position or orientation")
    height = heights(frames)
    spacings = np.asarray([f.spacing for f in frames], dtype=np.float64)
    if any((f.rows, f.columns) != (first.rows, first.columns) for f in frames) or not np.allclose(
        spacings, spacings[0], rtol=1e-3
    ):
        raise Unusable("slices of different size or spacing")
    axes = _axes(np.asarray([f.orientation for f in frames], dtype=np.float64).mean(axis=0))
    positions = np.asarray([f.position for f in frames], dtype=np.float64)
    order = np.argsort(height, kind="stable")
    places = positions[order]
    gaps = np.diff(height[order])
    step = (places[-1] - places[0]) / (len(frames) - 1)
    drift = (places - places[0]) - np.outer((places - places[0]) @ axes[2], axes[2])
    uneven = np.abs(gaps - np.median(gaps)).max() > max(EVEN * float(np.median(gaps)), SAME_PLACE)
    tilted = np.abs(drift).max() > SHEAR * float(gaps.sum())
    if gaps.min() <= SAME_PLACE:
        raise Unusable("two slices at one place")
    spacing = first.spacing or (1.0, 1.0)
    if (uneven or tilted) and rules.slice_gap == "resample":
        return _straightened(first, order, axes, places, drift, gaps, rules)
    if uneven:
        raise Unusable("slice gaps or uneven spacing")
    if tilted:
        raise Unusable("gantry tilt")
    return Geometry(tuple(map(int, order)), _affine(axes, spacing, step, places[0]))


def _axes(orientation: Any) -> Matrix:
    """Return the directions along a row, along a column, and of the normal, as rows of a matrix."""
    along_row, along_column = np.asarray(orientation[:3], float), np.asarray(orientation[3:], float)
    lengths = np.linalg.norm(along_row), np.linalg.norm(along_column)
    if not np.allclose(lengths, 1, atol=1e-2) or abs(along_row @ along_column) > 1e-2:
        raise Unusable("affine is singular or not finite")
    return np.stack([along_row, along_column, np.cross(along_row, along_column)])


def _affine(axes: Matrix, spacing: Sequence[float], step: Any, origin: Any) -> Matrix:
    affine = np.eye(4)
    affine[:3, 0] = axes[0] * spacing[1]
    affine[:3, 1] = axes[1] * spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = origin
    return LPS_TO_RAS @ affine


def _straightened(
    first: Frame, order: Any, axes: Matrix, places: Matrix, drift: Matrix, gaps: Matrix, rules: Rules
) -> Geometry:
    """Plan a rectangular grid: even at the median distance, and wide enough for all slices."""
    step = float(np.median(gaps))
    if gaps.max() > LONGEST_HOLE * step:
        raise Unusable("too long a hole in the series")
    spacing = first.spacing or (1.0, 1.0)
    shifts = np.stack([drift @ axes[0] / spacing[1], drift @ axes[1] / spacing[0]], axis=1)
    low = [max(0, math.ceil(-shifts[:, a].min() - 1e-6)) for a in (0, 1)]
    high = [max(0, math.ceil(shifts[:, a].max() - 1e-6)) for a in (0, 1)]
    count = int(gaps.sum() / step + 1e-6) + 1
    wide = (first.columns + low[0] + high[0]) * (first.rows + low[1] + high[1]) * count
    if wide > rules.max_voxels:
        raise Unusable("header claims an absurd size")
    origin = places[0] - axes[0] * low[0] * spacing[1] - axes[1] * low[1] * spacing[0]
    straight = Straight(
        heights=tuple(float(h) for h in np.concatenate([[0.0], np.cumsum(gaps)])),
        shifts=tuple((float(a), float(b)) for a, b in shifts),
        pad=((low[0], high[0]), (low[1], high[1])),
        count=count,
    )
    return Geometry(tuple(map(int, order)), _affine(axes, spacing, axes[2] * step, origin), straight)


def straighten(stack: FloatArray, straight: Straight, labels: bool = False) -> FloatArray:
    """Fill the rectangular grid from a crooked stack (columns, rows, slices).

    Each slice is moved in its plane, then slices are interpolated linearly along the normal (for labels: the nearest).
    What no slice covers gets the least value.
    """
    from scipy import ndimage

    fill = 0.0 if labels else float(stack.min())
    wide = np.pad(stack, (*straight.pad, (0, 0)), constant_values=fill)
    for k, shift in enumerate(straight.shifts):
        if max(map(abs, shift)) > 1e-6:
            wide[..., k] = ndimage.shift(wide[..., k], shift, order=0 if labels else 1, cval=fill)
    step = float(np.median(np.diff(straight.heights)))
    places = np.arange(straight.count) * step
    at = np.interp(places, straight.heights, np.arange(len(straight.heights)))
    if labels:
        return np.ascontiguousarray(wide[..., np.rint(at).astype(int)])
    below = np.minimum(at.astype(int), wide.shape[-1] - 2)
    share = (at - below).astype(np.float32)
    out: FloatArray = wide[..., below] * (1 - share) + wide[..., below + 1] * share
    return out
