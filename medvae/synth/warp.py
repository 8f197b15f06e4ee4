"""Small random deformations of what was decoded: anatomy varies in position and shape more than a noisy covariance can
say. The sizes are public constants, so this is post-processing; image and masks move together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

# Standard deviations at warp 1, set on MNIST: docs/quality.md. Shift and bend are shares of the field of view.
ROTATION, SCALE, SHEAR, SHIFT, BEND = math.radians(3.0), 0.03, 0.02, 0.014, 0.018
# Points an axis of the grid whose random moves a smooth field interpolates.
KNOTS = 4


def warp(x: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Return images (B, C, *spatial), 2D or 3D, each moved by its own affine map and smooth field.

    What comes in from outside repeats the border.
    """
    if size == 0:
        return x
    return move(x, _grid(len(x), tuple(x.shape[2:]), size, generator))


def move(x: Tensor, grid: Tensor) -> Tensor:
    """Return images (B, C, *spatial) read at the points `grid` (B, *spatial, dims) of `paired_warps`."""
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def paired_warps(shape: tuple[int, ...], pairs: int, size: float) -> Tensor:
    """Return 2 x `pairs` fixed deformations (2 pairs, *shape, dims) for `move`, each beside its opposite.

    They are constants, the same for every scan and every cohort, and move nothing on average.
    """
    grid = _grid(pairs, shape, size, torch.Generator().manual_seed(0))
    still = functional.affine_grid(torch.eye(len(shape), len(shape) + 1)[None], [1, 1, *shape], align_corners=False)
    return torch.cat([grid, 2 * still - grid])


def _grid(count: int, shape: tuple[int, ...], size: float, generator: torch.Generator) -> Tensor:
    dims = len(shape)
    grid = functional.affine_grid(_affine(count, dims, size, generator), [count, 1, *shape], align_corners=False)
    knots = torch.randn(count, dims, *(KNOTS,) * dims, generator=generator) * 2 * BEND * size
    mode = "bicubic" if dims == 2 else "trilinear"
    field = functional.interpolate(knots, size=shape, mode=mode, align_corners=True)
    return torch.as_tensor(grid + field.movedim(1, -1))


def _affine(count: int, dims: int, size: float, generator: torch.Generator) -> Tensor:
    """Return random affine maps (B, dims, dims + 1) near the identity, in coordinates from -1 to 1.

    Off the diagonal a matrix is a rotation (antisymmetric) plus a shear (symmetric), to first order.
    """
    skew = torch.randn(count, dims, dims, generator=generator)
    skew = torch.triu(skew, 1)
    linear = (skew - skew.transpose(1, 2)) * ROTATION * size
    shear = torch.triu(torch.randn(count, dims, dims, generator=generator), 1)
    linear = linear + (shear + shear.transpose(1, 2)) * SHEAR * size
    linear = linear + torch.diag_embed(1 + torch.randn(count, dims, generator=generator) * SCALE * size)
    shift = torch.randn(count, dims, 1, generator=generator) * 2 * SHIFT * size
    return torch.cat([linear, shift], dim=2)
