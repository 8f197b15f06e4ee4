"""The fixed, public embedding in which real and synthetic scans are compared.

Nothing in it is learned from patients, and nothing is downloaded. It is built from fixed filters, in 2D and 3D alike:
layout (low cosine coefficients), grey values (moments and quantiles), texture (the moduli of band-pass and derivative
responses, pooled over the scan and over its quadrants or octants) and their interplay across scales (a second layer
of moduli, as in the scattering transform of Bruna & Mallat 2013). Each column is then scaled to mean 0 and standard
deviation 1 on a procedural set of "dead leaves" images (Lee, Mumford & Huang 2001), shipped in assets/embedding.json.

Scans of any size are first resampled to one grid, so that the embedding does not depend on resolution. It sees
anatomy only as layout and texture: it is no substitute for a clinical reader, and the reports say so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.float32]

GRID = {2: 64, 3: 24}
SMOOTHING = (1.0, 2.0, 4.0, 8.0)
SLOPES = (1.0, 2.0, 4.0)
COSINE_ORDER = {2: 7, 3: 4}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
REFERENCE = {2: 400, 3: 120}
# Energies enter by their logarithm; this keeps an empty region finite, far below any texture that can be seen.
ENERGY_FLOOR = 1e-4
CHUNK_ELEMENTS = 2_000_000


def embed(images: npt.NDArray[Any]) -> Floats:
    """Return the embedding (N, D) of images (N, *spatial) with values in [0, 1]; D is 86 in 2D and 98 in 3D."""
    dims = images.ndim - 1
    centre, scale = _standard(dims)
    return (raw_features(images) - centre) / scale


def raw_features(images: npt.NDArray[Any]) -> Floats:
    """Return the features (N, D) before scaling, a bounded number of scans at a time."""
    dims = images.ndim - 1
    chunk = max(1, CHUNK_ELEMENTS // GRID[dims] ** dims)
    parts = [_features(_to_grid(images[i : i + chunk])) for i in range(0, len(images), chunk)]
    return np.concatenate(parts)


def _features(x: FloatArray) -> Floats:
    dims = x.ndim - 1
    smooth = [_along_all(x, _gaussian(GRID[dims], sigma, 0)) for sigma in SMOOTHING]
    bands = [np.abs(a - b) for a, b in zip([x, *smooth[:-1]], smooth, strict=True)]
    columns = [_layout(x), _grey_values(x), *(_log(_pool(band)) for band in bands)]
    columns += [_log(np.stack([_mean(b), _deviation(b)], axis=1)) for b in bands]
    columns.append(_log(_slopes(x)))
    columns.append(_log(_second_layer(bands)))
    return np.concatenate(columns, axis=1).astype(np.float64)


def _layout(x: FloatArray) -> FloatArray:
    """Low coefficients of an orthonormal cosine transform, those of total order up to COSINE_ORDER."""
    dims, n = x.ndim - 1, x.shape[1]
    order = COSINE_ORDER[dims]
    k, place = np.arange(order + 1)[:, None], np.arange(n)[None, :]
    rows = np.cos(math.pi * k * (2 * place + 1) / (2 * n)) / n
    coefficients = _along_all(x, rows.astype(np.float32))
    total = np.sum(np.meshgrid(*[np.arange(order + 1)] * dims, indexing="ij"), axis=0)
    return np.asarray(coefficients.reshape(len(x), -1)[:, total.ravel() <= order])


def _grey_values(x: FloatArray) -> FloatArray:
    flat = x.reshape(len(x), -1)
    levels = np.quantile(flat, QUANTILES, axis=1).T
    return np.concatenate([flat.mean(1)[:, None], flat.std(1)[:, None], levels], axis=1).astype(np.float32)


def _slopes(x: FloatArray) -> FloatArray:
    """Mean modulus of directional derivatives: along each axis, and in 2D along both diagonals."""
    found = []
    for sigma in SLOPES:
        flat, steep = (_gaussian(x.shape[1], sigma, order) for order in (0, 1))
        along = []
        for axis in range(1, x.ndim):
            slope = x
            for other in range(1, x.ndim):
                slope = _along(slope, steep if other == axis else flat, other)
            along.append(slope)
        if len(along) == 2:
            along += [(along[0] + along[1]) / math.sqrt(2), (along[0] - along[1]) / math.sqrt(2)]
        found += [_mean(np.abs(slope)) for slope in along]
    return np.stack(found, axis=1)


def _second_layer(bands: list[FloatArray]) -> FloatArray:
    """Mean modulus of coarser bands of the modulus of each band."""
    found = []
    for i, band in enumerate(bands[:-1]):
        levels = [_along_all(band, _gaussian(band.shape[1], sigma, 0)) for sigma in SMOOTHING[i:]]
        found += [_mean(np.abs(a - b)) for a, b in pairwise(levels)]
    return np.stack(found, axis=1)


def _pool(x: FloatArray) -> FloatArray:
    """Means over the quadrants (2D) or octants (3D): shape (N, 2 ** dims)."""
    half = x.shape[1] // 2
    split = x.reshape(len(x), *[size for _ in range(x.ndim - 1) for size in (2, half)])
    pooled = split.mean(axis=tuple(range(2, split.ndim, 2)))
    return np.asarray(pooled.reshape(len(x), -1))


def _mean(x: FloatArray) -> FloatArray:
    return np.asarray(x.reshape(len(x), -1).mean(1))


def _deviation(x: FloatArray) -> FloatArray:
    return np.asarray(x.reshape(len(x), -1).std(1))


def _log(energy: FloatArray) -> FloatArray:
    return np.asarray(np.log(energy + np.float32(ENERGY_FLOOR)))


def _along(x: FloatArray, matrix: FloatArray, axis: int) -> FloatArray:
    return np.moveaxis(np.moveaxis(x, axis, -1) @ matrix.T, -1, axis)


def _along_all(x: FloatArray, matrix: FloatArray) -> FloatArray:
    for axis in range(1, x.ndim):
        x = _along(x, matrix, axis)
    return x


@cache
def _gaussian(size: int, sigma: float, order: int) -> FloatArray:
    """Gaussian smoothing (order 0) or its derivative (order 1) with mirrored borders, as a matrix (size, size)."""
    from scipy.ndimage import gaussian_filter1d

    matrix = gaussian_filter1d(np.eye(size), sigma, axis=0, order=order, mode="reflect")
    return np.asarray(matrix, dtype=np.float32)


def _to_grid(images: npt.NDArray[Any]) -> FloatArray:
    x = np.asarray(images, dtype=np.float32)
    for axis in range(1, x.ndim):
        x = _along(x, _resampling(x.shape[axis], GRID[x.ndim - 1]), axis)
    return x


@cache
def _resampling(size: int, grid: int) -> FloatArray:
    """Resample one axis: area means where it shrinks, linear interpolation where it grows; (grid, size)."""
    if size <= grid:
        places = (np.arange(grid) + 0.5) * size / grid - 0.5
        rows = [np.interp(places, np.arange(size), np.eye(size)[j]) for j in range(size)]
        return np.stack(rows, axis=1).astype(np.float32)
    edges = np.arange(grid + 1) * size / grid
    left, right = edges[:-1, None], edges[1:, None]
    cells = np.arange(size)[None, :]
    overlap = np.clip(np.minimum(right, cells + 1) - np.maximum(left, cells), 0, None)
    return np.asarray(overlap / overlap.sum(1, keepdims=True), dtype=np.float32)


@cache
def _standard(dims: int) -> tuple[Floats, Floats]:
    """Return the shipped centre and scale (D,) of the raw features."""
    text = resources.files("medvae.audit").joinpath("assets/embedding.json").read_text(encoding="utf-8")
    entry: Mapping[str, Any] = json.loads(text)[f"{dims}d"]
    return np.asarray(entry["centre"], dtype=np.float64), np.asarray(entry["scale"], dtype=np.float64)


def reference_standard(dims: int) -> dict[str, list[float]]:
    """Compute what assets/embedding.json ships for 2 or 3 dimensions: no patient and no download involved."""
    features = raw_features(dead_leaves(dims, REFERENCE[dims]))
    scale = np.maximum(features.std(0), 1e-3)
    return {"centre": [round(float(v), 6) for v in features.mean(0)], "scale": [round(float(v), 6) for v in scale]}


def dead_leaves(dims: int, count: int) -> FloatArray:
    """Return procedural images (count, *grid): ellipsoids that hide each other, blurred, with noise.

    Drawn from the legacy generator, whose stream numpy froze for good.
    """
    from scipy.ndimage import gaussian_filter

    draw, n = np.random.RandomState(20240501), GRID[dims]
    place = np.stack(np.meshgrid(*[np.arange(n)] * dims, indexing="ij"))
    images = np.empty((count, *[n] * dims), dtype=np.float32)
    for image in images:
        image[...] = draw.uniform(0, 0.3)
        for _ in range(draw.randint(5, 60)):
            centre = draw.uniform(0, n, size=dims).reshape(-1, *[1] * dims)
            radius = (n * draw.uniform(0.03, 0.4) * draw.uniform(0.6, 1.4, size=dims)).reshape(-1, *[1] * dims)
            image[(((place - centre) / radius) ** 2).sum(0) < 1] = draw.uniform(0, 1)
        blurred = gaussian_filter(image, draw.uniform(0.2, 1.5)) + draw.normal(0, draw.uniform(0, 0.05), image.shape)
        image[...] = np.clip(blurred, 0, 1)
    return images
