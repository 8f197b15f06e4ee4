"""From the model's numbers in [0, 1] to the integers and the millimetres that files hold: one rule for all formats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medvae.errors import MedvaeError
from medvae.types import FloatArray, Intensity

TWELVE_BITS = 4095
_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class Scale:
    """raw = code * slope + intercept, for codes of 0..top."""

    slope: float
    intercept: float
    top: int

    @property
    def integer(self) -> bool:
        """Whether raw values are whole numbers themselves."""
        return self.slope == 1.0


def scale_of(intensity: Intensity) -> Scale:
    """Choose the integers that stand for [0, 1].

    A window of whole raw units (HU, 8-bit grey) keeps those units: code 0 is its lower end, one code is one unit.
    A window too narrow for that is cut into 4095 steps, with slope and intercept back to raw units. Percentiles of
    single scans have no common raw unit: 0..4095, arbitrary units, as in magnetic resonance.
    """
    if intensity.mode == "percentile":
        return Scale(1.0, 0.0, TWELVE_BITS)
    low, high = intensity.low, intensity.high
    whole = float(low).is_integer() and float(high).is_integer()
    if whole and high - low >= 255 and low >= _INT16.min and high <= _INT16.max and high - low <= _INT16.max:
        return Scale(1.0, low, int(high - low))
    return Scale((high - low) / TWELVE_BITS, low, TWELVE_BITS)


def codes(image: FloatArray, scale: Scale) -> npt.NDArray[np.uint16]:
    """Quantise an image of any shape with values in [0, 1]; the error is at most half a code."""
    if not np.isfinite(image).all():
        raise MedvaeError("a generated image holds values that are not finite: the model cannot be released")
    return np.rint(np.clip(image, 0.0, 1.0) * scale.top).astype(np.uint16)


def grid_affine(spatial_shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """Return the (4, 4) map from voxel indices to RAS millimetres, with the middle of the grid at the origin.

    A 3D array runs right, anterior, superior along its axes. A 2D array of (rows, columns), stored as (rows, columns,
    1), is taken for an axial slice as radiologists view it: rows run to the back, columns to the patient's left.
    """
    shape = np.asarray((*spatial_shape, 1)[:3])
    axes = np.diag((*spacing_mm, 1.0)[:3])
    if len(spatial_shape) == 2:
        axes = np.asarray([[0, -spacing_mm[1], 0], [-spacing_mm[0], 0, 0], [0, 0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = -axes @ ((shape - 1) / 2)
    return affine
