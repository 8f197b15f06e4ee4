"""The geometry of a DICOM series: order of its slices and the affine of its volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medvae.vault.scan import Unusable

Vector = tuple[float, ...]
Plane = tuple[int, int, Vector | None, Vector | None, Vector | None]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # a single image without orientation is taken as it is shown
ORIGIN = (0.0, 0.0, 0.0)
SAME_DIRECTION = 1e-3  # largest difference of direction cosines
EVEN = 0.01  # largest deviation of a slice distance, as a share of the median
SHEAR = 0.01  # largest drift of the slices sideways, as a share of the distance


@dataclass(frozen=True)
class Geometry:
    """order: indices of the slices along the normal; affine: (4, 4) from (column, row, slice) to RAS mm."""

    order: tuple[int, ...]
    affine: npt.NDArray[np.float64]


def geometry(planes: Sequence[Plane]) -> Geometry:
    """Return the geometry of slices given as (rows, columns, orientation, position, spacing).

    The affine's columns are row direction times column spacing, column direction times row spacing, and the step
    from slice to slice (PS3.3, C.7.6.2.1.1), turned from LPS to RAS. A single slice may lack any of them.

    Raises Unusable for mixed orientations, differing sizes, gaps, and slices that drift sideways (gantry tilt).
    """
    rows, columns = planes[0][:2]
    if len(planes) == 1:
        _, _, orientation, position, spacing = planes[0]
        planes = [(rows, columns, orientation or AXIAL, position or ORIGIN, spacing or (1.0, 1.0))]
    if any(p[2] is None or p[3] is None or p[4] is None for p in planes):
        raise Unusable("no slice position or orientation")
    directions = np.asarray([p[2] for p in planes], dtype=np.float64)
    spacings = np.asarray([p[4] for p in planes], dtype=np.float64)
    if np.abs(directions - directions[0]).max() > SAME_DIRECTION:
        raise Unusable("mixed orientations")
    if any(p[:2] != (rows, columns) for p in planes) or not np.allclose(spacings, spacings[0], rtol=1e-3):
        raise Unusable("slices of different size or spacing")
    along_row, along_column = directions[0, :3], directions[0, 3:]
    lengths = np.linalg.norm(along_row), np.linalg.norm(along_column)
    if not np.allclose(lengths, 1, atol=1e-2) or abs(along_row @ along_column) > 1e-2:
        raise Unusable("affine is singular or not finite")
    normal = np.cross(along_row, along_column)
    positions = np.asarray([p[3] for p in planes], dtype=np.float64)
    order, step = _steps(positions, normal)
    affine = np.eye(4)
    affine[:3, 0] = along_row * spacings[0, 1]
    affine[:3, 1] = along_column * spacings[0, 0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[order[0]]
    return Geometry(tuple(int(i) for i in order), LPS_TO_RAS @ affine)


def _steps(positions: npt.NDArray[np.float64], normal: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.intp], Vector]:
    """Return the order of the slices along the normal and the vector from one to the next, in LPS mm."""
    if len(positions) == 1:
        return np.zeros(1, dtype=np.intp), tuple(normal)
    height = positions @ normal
    order = np.argsort(height, kind="stable")
    gaps = np.diff(height[order])
    median = float(np.median(gaps))
    if median <= 0 or np.abs(gaps - median).max() > max(EVEN * median, 1e-3):
        raise Unusable("slice gaps or uneven spacing")
    sideways = positions - np.outer(height, normal)
    if np.abs(sideways - sideways[order[0]]).max() > SHEAR * float(height[order[-1]] - height[order[0]]):
        raise Unusable("affine has shear (gantry tilt)")
    return order, tuple(normal * float(gaps.mean()))
