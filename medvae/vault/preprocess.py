"""From a decoded scan to the cohort's grid: orientation, intensity, and resampling.

Constants of the config and the scan's own statistics only: nothing is estimated over the cohort.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.errors import CohortError, ConfigError
from medvae.types import FloatArray, Intensity
from medvae.vault.resize import area, linear, nearest
from medvae.vault.scan import MAX_VOXELS, Unusable, Volume

SHEAR = 1e-2  # largest cosine between two axes of an affine that counts as rectangular
MAX_LABEL = 255


@dataclass(frozen=True)
class Grid:
    """What every scan is brought to: a shape in voxels, a spacing in mm (None: the whole field of view is
    resized to the shape), and the intensity rule."""

    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    intensity: Intensity


@dataclass(frozen=True, repr=False)
class Prepared:
    """image: (*shape) float32 in [0, 1]; mask: (*shape) uint8 or None; labels: the mask's non-zero values before
    resampling."""

    image: FloatArray
    mask: npt.NDArray[np.uint8] | None
    labels: frozenset[int]


def prepare(volume: Volume, grid: Grid) -> Prepared:
    """Bring one scan to the grid. 3D arrays come out as RAS, 2D images as shown: rows down, columns to the right.

    Raises Unusable for NaN, constant images and affines that are singular or sheared, CohortError for a mask whose
    shape or place is not its image's.
    """
    array, mask = volume.array, volume.mask
    _check_mask(volume)
    if array.size == 0:
        raise Unusable("constant")
    ends = array.min(), array.max()  # NaN and infinity come out at the ends
    if not np.isfinite(ends).all():
        raise Unusable("not finite")
    if ends[0] == ends[1]:
        raise Unusable("constant")
    channels = [_scale(array, grid.intensity)]
    if mask is not None:
        channels.append(_as_labels(mask))
    labels = _present(channels[1]) if mask is not None else frozenset()
    voxel_mm: tuple[float, ...] | None = None
    if volume.affine is not None:
        channels, voxel_mm = _orient(channels, volume.affine)
        if len(grid.shape) == 2:
            channels, voxel_mm = _flatten(channels, voxel_mm)
    if channels[0].ndim != len(grid.shape):
        short = len(grid.shape) == 2
        raise Unusable("a volume where single slices are asked" if short else "a single slice where volumes are asked")
    image = np.clip(_resample(channels[0], grid, voxel_mm, labels=False), 0, 1)
    if image.min() == image.max():
        raise Unusable("constant")
    out = _resample(channels[1], grid, voxel_mm, labels=True).astype(np.uint8) if mask is not None else None
    return Prepared(image, out, labels)


def _check_mask(volume: Volume) -> None:
    if volume.mask is None:
        return
    if volume.mask.shape != volume.array.shape:
        raise CohortError(
            f"a mask has the shape {volume.mask.shape} and its image {volume.array.shape}: "
            "resample the mask to its image"
        )
    if volume.affine is None or volume.mask_affine is None or not np.isfinite(volume.affine).all():
        return
    far = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]).T
    far = far * np.array([*volume.array.shape, 1])[:, None]
    apart = np.abs((volume.affine - volume.mask_affine) @ far).max()
    if not apart <= 0.5 * np.linalg.norm(volume.affine[:3, :3], axis=0).max():
        raise CohortError("a mask lies elsewhere than its image by their affines: resample the mask to its image")


def _as_labels(mask: npt.NDArray[Any]) -> FloatArray:
    rounded = np.rint(mask)
    if not np.isfinite(mask).all() or np.abs(mask - rounded).max() > 1e-3:
        raise CohortError("a mask holds values that are not whole numbers: give label maps, not probabilities")
    if rounded.min() < 0 or rounded.max() > MAX_LABEL:
        raise CohortError(f"a mask holds labels outside 0 to {MAX_LABEL}: number the labels anew")
    return np.asarray(rounded, dtype=np.float32)


def _present(labels: FloatArray) -> frozenset[int]:
    """Return the labels above 0 that occur."""
    counts = np.bincount(labels.ravel(order="K").astype(np.uint8), minlength=MAX_LABEL + 1)
    return frozenset(int(v) for v in np.flatnonzero(counts) if v)


def _scale(array: FloatArray, intensity: Intensity) -> FloatArray:
    """Scale to [0, 1] by a public window in raw units, or by percentiles of this scan."""
    low, high = intensity.low, intensity.high
    if intensity.mode == "percentile":
        ends = (intensity.low, intensity.high)
        low, high = (float(v) for v in np.percentile(array.ravel(order="K"), ends))
        if not low < high:
            # Nearly all voxels are alike, as in a binary volume: the scan's whole range is the honest window.
            low, high = float(array.min()), float(array.max())
    scaled = np.subtract(array, np.float32(low), dtype=np.float32)
    scaled /= np.float32(high - low)
    return np.clip(scaled, 0, 1, out=scaled)


def _orient(channels: list[FloatArray], affine: npt.NDArray[np.float64]) -> tuple[list[FloatArray], tuple[float, ...]]:
    """Turn (X, Y, Z) arrays to the RAS axes closest to theirs; return them with the voxel size in mm."""
    from nibabel.orientations import apply_orientation, io_orientation

    axes = affine[:3, :3]
    norms = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or abs(np.linalg.det(axes)) <= 1e-6 * norms.prod():
        raise Unusable("affine is singular or not finite")
    cosines = (axes / norms).T @ (axes / norms)
    if np.abs(cosines - np.eye(3)).max() > SHEAR:
        raise Unusable("affine has shear")
    turn = io_orientation(affine)
    voxel = [float(norms[list(turn[:, 0]).index(axis)]) for axis in range(3)]
    return [apply_orientation(channel, turn) for channel in channels], tuple(voxel)


def _flatten(channels: list[FloatArray], voxel_mm: tuple[float, ...]) -> tuple[list[FloatArray], tuple[float, ...]]:
    """Turn a RAS volume of one slice into (rows, columns) as radiologists view it.

    Axial: rows to posterior, columns to the patient's left; coronal: rows to inferior, columns to left; sagittal:
    rows to inferior, columns to posterior.
    """
    thin = [axis for axis, size in enumerate(channels[0].shape) if size == 1]
    if not thin:
        raise Unusable("a volume where single slices are asked")
    axis = thin[-1]
    rest = [v for a, v in enumerate(voxel_mm) if a != axis]
    flat = [np.ascontiguousarray(np.flip(c.squeeze(axis).T, axis=(0, 1))) for c in channels]
    return flat, (rest[1], rest[0])


def _resample(array: FloatArray, grid: Grid, voxel_mm: tuple[float, ...] | None, labels: bool) -> FloatArray:
    """Resample to the grid's spacing and pad or crop around the centre, or resize the field of view to its shape."""
    if grid.spacing_mm is not None:
        if voxel_mm is None:
            raise Unusable("no PixelSpacing")
        from monai.transforms import ResizeWithPadOrCrop  # not at the top: it takes seconds to import

        spaced = _respace(array, grid.spacing_mm, voxel_mm, labels)
        return _first(ResizeWithPadOrCrop(grid.shape)(spaced[None]))
    if array.shape == grid.shape:
        return array
    if labels:
        return nearest(array, grid.shape)
    if all(new <= old for new, old in zip(grid.shape, array.shape, strict=True)):
        return area(array, grid.shape)
    return linear(array, grid.shape)


def _respace(array: FloatArray, spacing_mm: tuple[float, ...], voxel_mm: tuple[float, ...], labels: bool) -> FloatArray:
    """Resample (*S) to a voxel size; images are smoothed first where the grid is coarser, as against aliasing."""
    import torch
    from monai.data import MetaTensor
    from monai.transforms import GaussianSmooth, Spacing

    factors = [s / v for s, v in zip(spacing_mm, voxel_mm, strict=True)]
    if math.prod(n / f + 1 for n, f in zip(array.shape, factors, strict=True)) > MAX_VOXELS:
        raise ConfigError("a scan would have too many voxels at this spacing_mm: give a coarser spacing in millimetres")
    tensor = torch.from_numpy(np.ascontiguousarray(array))[None]
    if not labels and max(factors) > 1:
        tensor = GaussianSmooth(sigma=[max(0.0, (f - 1) / 2) for f in factors])(tensor)
    image = MetaTensor(tensor, affine=torch.diag(torch.tensor([*voxel_mm, 1.0], dtype=torch.float64)))
    mode = "nearest" if labels else "bilinear"
    return _first(Spacing(pixdim=spacing_mm, mode=mode, padding_mode="border")(image))


def _plain(tensor: Any) -> FloatArray:
    """Return a MONAI result as a plain float32 array without metadata."""
    return np.asarray(tensor.numpy() if hasattr(tensor, "numpy") else tensor, dtype=np.float32)


def _first(tensor: Any) -> FloatArray:
    """Return the only channel of a MONAI result."""
    only: FloatArray = _plain(tensor)[0]
    return only
