"""The linear conditional VAE: a mean that is linear in the condition, plus a few directions, in a cosine basis.

x = m(c) + sum_j z_j u_j, with z ~ N(0, I): probabilistic PCA (Tipping & Bishop 1999) around a conditional mean.
All of it is held as buffers: they come from the private moments and are not trained further.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medvae.nets.mixture import MixturePart, MixtureShapes
from medvae.nets.shape import with_ramps
from medvae.types import Condition, ImageSpace

SHELLS = 12


def shells(spatial_shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Return the shell (0 .. SHELLS - 1) of each coefficient of a full DCT, shape `spatial_shape`.

    Shells are bands of equal width in log(1 + frequency), with frequency in half-cycles a field of view: narrow
    where anatomy varies most, wide where there is only texture.
    """
    axes = np.meshgrid(*(np.arange(n) for n in spatial_shape), indexing="ij")
    radius = np.sqrt(sum(np.square(a, dtype=np.float64) for a in axes))
    position = np.log1p(radius) / np.log1p(radius.max())
    return np.asarray(np.minimum((position * SHELLS).astype(np.int64), SHELLS - 1))


def cosine_matrix(count: int, size: int) -> npt.NDArray[np.float64]:
    """Return the first `count` rows of the orthonormal DCT-II of length `size`: shape (count, size)."""
    k = np.arange(count)[:, None]
    n = np.arange(size)[None, :]
    rows = np.sqrt(2.0 / size) * np.cos(np.pi * k * (2 * n + 1) / (2 * size))
    rows[0] /= math.sqrt(2.0)
    return np.asarray(rows, dtype=np.float64)


def design_width(conditions: tuple[Condition, ...]) -> int:
    """Return H, the width of `design`."""
    has_class = any(c.kind == "class" for c in conditions)
    return sum(c.width for c in conditions) + (0 if has_class else 1)


def design_norm(conditions: tuple[Condition, ...]) -> float:
    """Return the largest norm the unscaled design row can have: each condition (or the intercept) adds at most 1."""
    has_class = any(c.kind == "class" for c in conditions)
    return math.sqrt(len(conditions) + (0 if has_class else 1))


def design(condition: Tensor, conditions: tuple[Condition, ...]) -> Tensor:
    """Return regression rows h(c) of shape (B, H) with norm at most 1, from encoded conditions (B, K).

    One-hot columns already span the intercept; where there is no class, a constant column is put first.
    """
    rows = condition
    if not any(c.kind == "class" for c in conditions):
        rows = torch.cat([torch.ones(len(condition), 1, dtype=condition.dtype, device=condition.device), rows], dim=1)
    return rows / design_norm(conditions)


class LinearPart(nn.Module):
    """Holds m(c) and the directions as coefficients over the lowest cosines of each axis.

    mean_map: (H, C, *k); directions: (d, C, *k), each scaled by its standard deviation and mutually orthogonal.
    spectrum: (SHELLS, C, C), the covariance between channels of one cosine coefficient of what m(c) leaves over, by
    shell of frequency; contrast: (M,), how much brighter the image is inside each mask than around it, where m(c) does
    not already say so. These two are not part of p(x|z): sampling adds them as texture.
    two_valued: (), whether images are shapes, black and white: all of this is about their ramps then (shape.py).
    border_width: (), in voxels, of the grey border that sampled shapes get; 0 where every voxel is 0 or 1.
    mixture: in its place the directions' one Gaussian, where the cohort carries one.
    """

    mean_map: Tensor
    directions: Tensor
    spectrum: Tensor
    contrast: Tensor
    two_valued: Tensor
    border_width: Tensor

    def __init__(
        self,
        space: ImageSpace,
        basis_shape: tuple[int, ...],
        latent_dim: int,
        mixture: MixtureShapes | None = None,
    ) -> None:
        super().__init__()
        self.space = space
        self.mixture = None if mixture is None else MixturePart(space, mixture)
        self.register_buffer("contrast", torch.zeros(space.channels - 1))
        self.register_buffer("two_valued", torch.tensor(False))
        self.register_buffer("border_width", torch.tensor(0.0))
        self.register_buffer("spectrum", torch.zeros(SHELLS, space.channels, space.channels))
        self.register_buffer("mean_map", torch.zeros(design_width(space.conditions), space.channels, *basis_shape))
        self.register_buffer("directions", torch.zeros(latent_dim, space.channels, *basis_shape))
        for axis, (count, size) in enumerate(zip(basis_shape, space.spatial_shape, strict=True)):
            matrix = torch.as_tensor(cosine_matrix(count, size), dtype=torch.float32)
            self.register_buffer(f"axis_{axis}", matrix, persistent=False)

    def pixels(self, x: Tensor) -> Tensor:
        """Return the images (B, C, *spatial) that `reduce` takes: x itself, or what a subclass's input stands for."""
        return x

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Return what `pixels` makes of images, back again."""
        return pixels

    def levels(self, x: Tensor) -> Tensor:
        """Return what m(c) and the directions are about, in the form of x: x itself or, of shapes, their ramps."""
        if not self.two_valued:
            return x
        return self.from_pixels(with_ramps(self.pixels(x)))

    def reduce(self, x: Tensor) -> Tensor:
        """Return the coefficients (B, C, *k) of images (B, C, *spatial)."""
        return self._apply_axes(x, transpose=True)

    def expand(self, coefficients: Tensor) -> Tensor:
        """Return the images (B, C, *spatial) of coefficients (B, C, *k)."""
        return self._apply_axes(coefficients, transpose=False)

    def _apply_axes(self, x: Tensor, *, transpose: bool) -> Tensor:
        for axis in range(self.space.spatial_dims):
            matrix = getattr(self, f"axis_{axis}")
            moved = x.movedim(2 + axis, -1)
            x = (moved @ (matrix.T if transpose else matrix)).movedim(-1, 2 + axis)
        return x

    def mean_coefficients(self, condition: Tensor) -> Tensor:
        """Return the coefficients (B, C, *k) of m(c)."""
        rows = design(condition, self.space.conditions)
        mean: Tensor = torch.tensordot(rows, self.mean_map, dims=1)
        return mean

    def draw(self, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Return one draw (B, C, *k) a row of what the mixture puts around m(c), as coefficients of the basis."""
        if self.mixture is None:
            raise ValueError("this linear part has no mixture")
        drawn = self.mixture.draw(condition, generator)
        out = torch.zeros(len(drawn), *self.mean_map.shape[1:])
        out[(slice(None), slice(None), *(slice(k) for k in self.mixture.shapes.box))] = drawn
        return out

    def patterns(self) -> Tensor:
        """Return what varies around m(c) as patterns (n, C, *k) whose products sum to its second moment."""
        if self.mixture is None:
            return self.directions
        found = self.mixture.patterns()
        out = torch.zeros(len(found), *self.mean_map.shape[1:])
        out[(slice(None), slice(None), *(slice(k) for k in self.mixture.shapes.box))] = found
        return out

    def codes(self, coefficients: Tensor) -> Tensor:
        """Return the least-squares codes (B, d) of coefficients (B, C, *k) around m(c); no length, no code."""
        u = self.directions.flatten(1)
        lengths = u.square().sum(1)
        found = coefficients.flatten(1) @ u.T / lengths.clamp(min=1e-12)
        return torch.where(lengths > 0, found, torch.zeros_like(lengths))

    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return m(c) + sum_j z_j u_j (B, C, *spatial): images, or ramps of shapes."""
        return self.expand(self.mean_coefficients(condition) + torch.tensordot(z, self.directions, dims=1))

    def encode(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return the least-squares codes (B, d) of x around m(c); directions of no length give zero."""
        return self.codes(self.reduce(self.levels(x)) - self.mean_coefficients(condition))
