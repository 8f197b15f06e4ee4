"""What second moments are taken of: a few functions of the image, known from public numbers or from the mean alone.

    LowestCosines   of each axis and channel: for scans that fill their field of view
    Window          where the released mean says that shapes are: for images of two values

A small organ in a wide field of view is spread over a great many cosines: the 64 lowest hold a sixth of the variance of
adrenal glands in 64 x 64 x 64 voxels. If a shape varies smoothly and only where its mean says that it may be, then the
principal functions of

    K(u, v) = s(u) s(v) exp(-|u - v|^2 / 2 LENGTH^2),    s = the mean ramp (nets/shape.py),

hold most of what there is: the first 64 of them five sixths. docs/quality.md has the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medvae.nets.linear import SHELLS, cosine_matrix
from medvae.train.denoise import Array, shrink_along

# How far a shape's variations hang together, as a share of the field of view.
LENGTH = 0.15
# Points of the grid for each cosine of an axis.
POINTS = 2


class Subspace(Protocol):
    """D orthonormal functions of the basis' coefficients (C, *basis)."""

    @property
    def size(self) -> int:
        """How many functions there are, D."""
        ...

    def take(self, coefficients: Tensor) -> Tensor:
        """Return the products (B, D) of the functions with coefficients (B, C, *k), k at least the basis."""
        ...

    def spread(self, products: Array) -> Array:
        """Return the coefficients (N, C, *basis) that such products (N, D) stand for."""
        ...

    def shrink(self, rows: Array, noise_sd: Array, directions: Array, power: Array, longest: float) -> Array:
        """Shrink rows (H, C, *basis) to where scans vary: `shrink_along`, which has what the rest means.

        directions: (d, C, *basis); power: (C, SHELLS), the mean variance of a coefficient in each shell.
        """
        ...


@dataclass(frozen=True)
class LowestCosines:
    """The lowest cosines of each axis, `coarse` of `basis`, in each channel; shell: of the basis' coefficients."""

    channels: int
    basis: tuple[int, ...]
    coarse: tuple[int, ...]
    shell: npt.NDArray[np.int64]

    @property
    def size(self) -> int:
        """How many there are."""
        return self.channels * math.prod(self.coarse)

    @property
    def corner(self) -> tuple[slice, ...]:
        """Where they lie among coefficients (B, C, *k)."""
        return (slice(None), slice(None), *(slice(k) for k in self.coarse))

    def take(self, coefficients: Tensor) -> Tensor:
        """See Subspace."""
        return coefficients[self.corner].flatten(1)

    def spread(self, products: Array) -> Array:
        """See Subspace."""
        out = np.zeros((len(products), self.channels, *self.basis))
        out[self.corner] = products.reshape(len(products), self.channels, *self.coarse)
        return out

    def shrink(self, rows: Array, noise_sd: Array, directions: Array, power: Array, longest: float) -> Array:
        """See Subspace: beyond the directions, scans vary as much as the shell says."""
        flat = self.shell.ravel()
        count = np.maximum(np.bincount(flat, minlength=SHELLS), 1)
        explained = [np.bincount(flat, c.ravel(), SHELLS) / count for c in np.square(directions).sum(0)]
        left = np.maximum(power - explained, 0.0)[:, self.shell]
        return shrink_along(rows, noise_sd, directions, left, longest)


@dataclass(frozen=True)
class Window:
    """The first `size` of functions (n, n) of one channel's coefficients (*basis), n in number, most important first.

    variances: (n,), as expected of scans, falling and adding to 1; shell: of the basis' coefficients.
    """

    functions: Array
    variances: Array
    size: int
    shell: npt.NDArray[np.int64]

    def take(self, coefficients: Tensor) -> Tensor:
        """See Subspace."""
        kept = coefficients[(slice(None), slice(None), *(slice(k) for k in self.shell.shape))].flatten(1)
        return kept @ torch.as_tensor(self.functions[: self.size], dtype=kept.dtype).T

    def spread(self, products: Array) -> Array:
        """See Subspace."""
        return np.asarray(products @ self.functions[: self.size]).reshape(len(products), 1, *self.shell.shape)

    def shrink(self, rows: Array, noise_sd: Array, directions: Array, power: Array, longest: float) -> Array:
        """See Subspace: beyond the directions, scans vary as expected of the functions."""
        turned, seen = (v.reshape(len(v), -1) @ self.functions.T for v in (rows, directions))
        left = np.maximum(power[0, self.shell].sum() * self.variances - np.square(seen).sum(0), 0.0)
        return (shrink_along(turned, noise_sd, seen, left, longest) @ self.functions).reshape(rows.shape)


def window(mean: Array, spatial_shape: tuple[int, ...], size: int, shell: npt.NDArray[np.int64]) -> Window:
    """Return the functions that are where shapes are, of the mean ramp's coefficients (*basis).

    Post-processing: the mean is a release.
    """
    basis = mean.shape
    grid = tuple(min(n, POINTS * k) for n, k in zip(spatial_shape, basis, strict=True))
    axes = [cosine_matrix(k, n).T for k, n in zip(basis, grid, strict=True)]
    inside = np.maximum(_along(mean[None], axes)[0], 0.0)
    on_grid = _along(np.eye(mean.size).reshape(-1, *basis), axes) * inside
    # The smooth kernel's root, which cosines diagonalise.
    roots = [np.exp(-0.25 * (np.pi * LENGTH * np.arange(n)) ** 2)[:, None] * cosine_matrix(n, n) for n in grid]
    root = _along(on_grid, roots).reshape(mean.size, -1)
    values, vectors = np.linalg.eigh(root @ root.T)
    values = np.maximum(values[::-1], 0.0)
    functions = np.ascontiguousarray(vectors[:, ::-1].T)
    return Window(functions, values / max(float(values.sum()), 1e-30), min(size, mean.size), shell)


def _along(x: Array, axes: list[Array]) -> Array:
    """Multiply each axis but the first of (N, *a) by a matrix (b, a)."""
    for axis, matrix in enumerate(axes, start=1):
        x = np.moveaxis(np.moveaxis(x, axis, -1) @ matrix.T, -1, axis)
    return x
