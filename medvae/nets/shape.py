"""Images of shapes as ramps: how far a voxel is from the border of the shape, in place of inside or outside.

Shapes do not add up: between two positions of a border lies a step of half height, which no sum of few patterns draws
sharply. Distances to the border do add up, nearly (Leventon et al. 2000; Tsai et al. 2003), so the closed form takes
its moments of ramps, and an image is where a ramp is above LEVEL. A border may be soft, as those of strokes or of
shapes brought to another grid are; the rest of such an image is black or white.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# A ramp at the border; and how far it reaches to either side, as a share of the mean side of the grid.
LEVEL = 0.5
REACH = 1 / 16
# Voxels within NEARLY of black or white count as so. Those beside a border are one voxel from its other side, give or
# take rounding; from OFF_BORDER on they are off it.
NEARLY, BESIDE, OFF_BORDER = 0.05, 1.01, 1.5


def reach_of(spatial_shape: tuple[int, ...]) -> int:
    """Return how many voxels a ramp reaches to either side of a border: two at least, since one is the image itself."""
    return max(2, round(REACH * sum(spatial_shape) / len(spatial_shape)))


def ramp(images: Tensor, spatial_dims: int) -> Tensor:
    """Return ramps in [0, 1] of images (..., *spatial) that are inside a shape above one half.

    LEVEL plus the distance in voxels from the nearest voxel on the other side of the border, cut at `reach_of` and
    scaled to reach 0 far outside and 1 far inside. For gradients it is the identity, so that an attack can start.
    """
    reach = reach_of(tuple(images.shape[-spatial_dims:]))
    inside = images.detach() > LEVEL
    distance = _distance_to(~inside, reach, spatial_dims) - _distance_to(inside, reach, spatial_dims)
    return images + (LEVEL + distance / (2 * reach) - images).detach()


def with_ramps(x: Tensor) -> Tensor:
    """Return scans (B, C, *spatial) with the ramp of the image, channel 0, in its place."""
    return torch.cat([ramp(x[:, :1], x.ndim - 2), x[:, 1:]], dim=1)


def grey_shares(images: Tensor) -> Tensor:
    """Return (B, 2) of images (B, *spatial): which share of all voxels is grey and off the border, and of those within
    one voxel of the border which share is grey. Of shapes the first is 0; the second says how soft their borders are.
    """
    dims = images.ndim - 1
    distance = (ramp(images, dims) - LEVEL).abs() * 2 * reach_of(tuple(images.shape[1:]))
    grey = (images > NEARLY) & (images < 1 - NEARLY)
    border = distance < BESIDE
    off, at = (v.flatten(1).sum(1) for v in (grey & (distance > OFF_BORDER), grey & border))
    return torch.stack([off / grey[0].numel(), at / border.flatten(1).sum(1).clamp(min=1)], dim=1)


def sharpened(ramps: Tensor, spatial_dims: int, width: float = 2.0) -> Tensor:
    """Return images in [0, 1] of ramps (..., *spatial): black and white, and grey along the border.

    width: of the border, in voxels; at 0 there are two values.
    """
    if width <= 0:
        return (ramps > LEVEL).to(ramps.dtype)
    slope = 2 * reach_of(tuple(ramps.shape[-spatial_dims:])) / width
    return (LEVEL + (ramps - LEVEL) * slope).clamp(0, 1)


def _distance_to(voxels: Tensor, reach: int, spatial_dims: int) -> Tensor:
    """Return the Euclidean distance (..., *spatial) to the nearest of `voxels` (boolean), exact up to `reach`.

    The lower envelope of parabolas, an axis after the other (Felzenszwalb & Huttenlocher 2012), here of so few that all
    are tried; squares of whole numbers, so that small integers hold them.
    """
    far = (reach + 1) ** 2
    small = far + reach**2 < 2**8
    squared = torch.where(voxels, 0, far).to(torch.uint8 if small else torch.int16)
    for axis in range(-spatial_dims, 0):
        length = squared.shape[axis]
        padded = functional.pad(squared, [0, 0] * (-1 - axis) + [reach, reach], value=far)
        for step in (s for s in range(-reach, reach + 1) if s):
            squared = torch.minimum(squared, padded.narrow(axis, reach + step, length) + step**2)
    return squared.float().sqrt().clamp(max=reach)
