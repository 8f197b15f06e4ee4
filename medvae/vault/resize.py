"""Resizing of one scan's voxels in numpy, equal to what MONAI's Resize gives.

torch and MONAI take longer to import than a thousand slices take to read, and every process that decodes would import
them anew. The tests hold these functions to theirs.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from medvae.types import FloatArray


def nearest(array: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Take at each new voxel the old one under its centre: "nearest-exact", in whole numbers."""
    picked = [(2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(array.shape, shape, strict=True)]
    return np.asarray(array[np.ix_(*picked)])


def area(array: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Average over the old voxels that each new one touches: "area", for axes that do not grow.

    Axes are taken as they lie in memory, the one that shrinks most first and the innermost last: turning a large scan
    around takes longer than the rest.
    """
    order = np.argsort([-abs(step) for step in array.strides], kind="stable")
    lying, sizes = np.ascontiguousarray(array.transpose(order)), [shape[axis] for axis in order]
    last = lying.ndim - 1
    for axis in (*sorted(range(last), key=lambda a: sizes[a] / lying.shape[a]), last):
        lying = _average(lying, axis, sizes[axis])
    return lying.transpose(np.argsort(order))


def _average(array: FloatArray, axis: int, new: int) -> FloatArray:
    """Average along one axis over windows from floor(i * old / new) up to ceil((i + 1) * old / new)."""
    old = array.shape[axis]
    if old == new:
        return array
    if old % new == 0:
        parts = array.reshape((*array.shape[:axis], new, old // new, *array.shape[axis + 1 :]))
        whole: FloatArray = np.add.reduce(parts, axis=axis + 1) * np.float32(new / old)
        return whole
    before: tuple[Any, ...] = (slice(None),) * axis
    out = np.empty((*array.shape[:axis], new, *array.shape[axis + 1 :]), dtype=np.float32)
    for i in range(new):
        begin, end = i * old // new, -(-(i + 1) * old // new)
        place = out[(*before, i, ...)]
        np.add.reduce(array[(*before, slice(begin, end))], axis=axis, out=place)
        place *= np.float32(1 / (end - begin))
    return out


def linear(array: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Interpolate linearly between voxel centres, along axes that shrink after smoothing against aliasing."""
    for axis, new in enumerate(shape):
        if array.shape[axis] != new:
            weights = _weights(array.shape[axis], new)
            array = np.moveaxis(np.tensordot(weights, array, (1, axis)), 0, axis)
    return array


@lru_cache(maxsize=64)
def _weights(old: int, new: int) -> FloatArray:
    """Return (new, old): what each old voxel of a line adds to each new one.

    Smoothing is by a Gaussian of sigma (old / new - 1) / 2, integrated over each voxel and cut at 4 sigma, with zeros
    beyond the ends.
    """
    place = np.maximum((np.arange(new) + 0.5) * old / new - 0.5, 0)
    low = np.floor(place).astype(int)
    high, share = np.minimum(low + 1, old - 1), place - low
    between = np.zeros((new, old))
    np.add.at(between, (np.arange(new), low), 1 - share)
    np.add.at(between, (np.arange(new), high), share)
    sigma = (old / new - 1) / 2
    if sigma > 0:
        reach = int(max(4 * sigma, 0.5) + 0.5)
        edges = [math.erf((k - 0.5) / (sigma * math.sqrt(2))) for k in range(-reach, reach + 2)]
        kernel = np.diff(edges) / 2
        between = between @ sum(w * np.eye(old, k=k) for k, w in zip(range(-reach, reach + 1), kernel, strict=True))
    return between.astype(np.float32)
