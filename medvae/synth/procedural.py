"""Made-up images to pretrain on: dead leaves of shaded, textured ellipsoids, in 2D and 3D, with masks where wanted.

Leaves of random size, place, turn and brightness cover each other, so that edges, occlusion and scales are like those
of natural images while no scan is involved (Baradad et al. 2021, "Learning to See by Looking at Noise"; for privacy:
Tang et al. 2023, "Differentially Private Image Classification by Learning Priors from Random Processes", DP-RandP).
The only inputs are an image space and a generator: nothing here opens a file, and an import rule keeps it so.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from medvae.types import ImageSpace

LEAVES = (3, 12)  # least and most of an image
SIZE = (0.06, 0.7)  # half axes, in halves of the field of view, log-uniform
MASKED_SIZE = 0.2  # least half axis where leaves are organs to segment
THIN = 0.4  # share of leaves that are strokes: one axis long, the others short
DARK = 0.5  # share of images on a black ground
SHADING, TEXTURE, GRAIN = 0.15, 0.08, 0.02
KNOTS = (4, 12)  # points an axis of the smooth fields: shading and texture


def draw_batch(space: ImageSpace, count: int, generator: torch.Generator) -> Tensor:
    """Return images and masks (count, C, *spatial): channel 0 in [0, 1], mask channels of 0 and 1 that never overlap.

    The masks of an image are its last leaves, the ones on top, each cut to where no later one lies.
    """
    shape, dims, masks = space.spatial_shape, space.spatial_dims, len(space.mask_labels)
    grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij"))
    ground = torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) > DARK)
    image = _over(ground, dims).expand(count, *shape).clone()
    leaves = torch.randint(LEAVES[0], LEAVES[1] + 1, (count,), generator=generator)
    label = torch.zeros(count, *shape, dtype=torch.int64)
    for index in range(LEAVES[1]):
        cover = _leaf(grid, count, MASKED_SIZE if masks else SIZE[0], generator) * _over((index < leaves).float(), dims)
        value = _over(torch.rand(count, generator=generator), dims)
        texture = TEXTURE * _smooth(shape, count, KNOTS[1], generator)
        image = image + cover * (value * (1 + texture) - image)
        # The k-th leaf from the end is mask k; below them there is none.
        mask = (leaves - index).clamp(min=0)
        label = torch.where(cover > 0.5, _over(torch.where(mask <= masks, mask, 0), dims), label)
    image = image * (1 + SHADING * _smooth(shape, count, KNOTS[0], generator))
    image = image + GRAIN * torch.randn(count, *shape, generator=generator) * (image > 0.02)
    channels = [image.clamp(0, 1), *((label == k).float() for k in range(1, masks + 1))]
    return torch.stack(channels, dim=1)


def draw_conditions(space: ImageSpace, count: int, generator: torch.Generator) -> Tensor:
    """Return encoded conditions (count, K) drawn uniformly: classes in equal shares, covariates over their range."""
    parts = [torch.zeros(count, 0)]
    for c in space.conditions:
        if c.kind == "class":
            chosen = torch.randint(c.width, (count,), generator=generator)
            parts.append(functional.one_hot(chosen, c.width).float())
        else:
            parts.append(2 * torch.rand(count, 1, generator=generator) - 1)
    return torch.cat(parts, dim=1)


def _leaf(grid: Tensor, count: int, least: float, generator: torch.Generator) -> Tensor:
    """Return the soft cover (count, *spatial) of one ellipsoid an image, over coordinates grid (dims, *spatial)."""
    dims = len(grid)
    low, high = torch.tensor((least, SIZE[1])).log()
    axes = torch.exp(low + (high - low) * torch.rand(count, dims, generator=generator))
    thin = torch.rand(count, generator=generator) < THIN
    axes[:, 1:] = torch.where(thin[:, None], axes[:, 1:].clamp(max=max(least, 0.15)), axes[:, 1:])
    turn, _ = torch.linalg.qr(torch.randn(count, dims, dims, generator=generator))
    centre = 1.6 * torch.rand(count, dims, generator=generator) - 0.8
    offset = grid.flatten(1) - centre[:, :, None]
    distance = torch.linalg.vector_norm(torch.bmm(turn, offset) / axes[:, :, None], dim=1)
    depth = (1 - distance) * axes.min(1).values[:, None]
    edge = 1.5 / max(grid.shape[1:])
    return torch.sigmoid(depth / edge * 2).view(count, *grid.shape[1:])


def _smooth(shape: tuple[int, ...], count: int, knots: int, generator: torch.Generator) -> Tensor:
    """Return smooth random fields (count, *spatial): normal numbers at the knots, interpolated."""
    points = torch.randn(count, 1, *(knots,) * len(shape), generator=generator)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    return functional.interpolate(points, size=shape, mode=mode, align_corners=True)[:, 0]


def _over(values: Tensor, dims: int) -> Tensor:
    """Return values (count,) as (count, 1, ..., 1), to stand against images."""
    return values.view(-1, *[1] * dims)
