"""A stationary Gaussian random field as the prior of a spatial latent (Gangloff et al., ICIP 2023, "VAE-GRF").

The latent is a grid of codes. On a torus the covariance of a stationary field is circulant, so the Fourier transform
diagonalises it: its eigenvalues are the transform of the correlation function, and the KL divergence, samples and
densities cost one FFT each, in two dimensions or three. With the identity correlation all eigenvalues are one, and the
plain VAE's standard normal prior comes back.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Correlation = Literal["identity", "exponential", "matern32", "gaussian"]
# Eigenvalues are kept above this share of their mean: the Gaussian correlation's fall below float32's rounding, and
# wrapping a function around a torus may leave small negative ones.
FLOOR = 1e-3


def torus_distance(grid: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Return the distance (*grid) of each cell from the first, in cells, going the shorter way around each axis."""
    axes = [torch.arange(n, device=device) for n in grid]
    around = [torch.minimum(a, len(a) - a).float() for a in axes]
    squares = torch.stack([a.square() for a in torch.meshgrid(*around, indexing="ij")])
    return squares.sum(0).sqrt()


def correlation(distance: Tensor, length: Tensor, kind: Correlation) -> Tensor:
    """Return the correlation at `distance` (*grid) for ranges `length` (B,) in cells: shape (B, *grid)."""
    scaled = distance / length.view(-1, *[1] * distance.dim())
    if kind == "identity":
        return (distance == 0).float().expand_as(scaled)
    if kind == "exponential":
        return torch.exp(-scaled)
    if kind == "matern32":
        return (1 + math.sqrt(3) * scaled) * torch.exp(-math.sqrt(3) * scaled)
    return torch.exp(-0.5 * scaled.square())


def eigenvalues(grid: tuple[int, ...], kind: Correlation, length: Tensor, variance: Tensor) -> Tensor:
    """Return the eigenvalues (B, *grid) of the field's covariance, for `length` and `variance` (B,) each.

    Their mean is the variance of one cell, whatever the floor changed.
    """
    axes = tuple(range(1, 1 + len(grid)))
    found = torch.fft.fftn(correlation(torus_distance(grid, length.device), length, kind), dim=axes).real
    found = found.clamp(min=FLOOR)  # their mean is 1, the correlation at distance 0
    shape = (-1, *[1] * len(grid))
    return torch.as_tensor(found / found.mean(axes, keepdim=True) * variance.view(shape))


def colour(noise: Tensor, eigen: Tensor) -> Tensor:
    """Return fields (B, k, *grid) with covariance `eigen` (B, *grid) from standard normal noise (B, k, *grid)."""
    axes = tuple(range(2, noise.dim()))
    return torch.as_tensor(torch.fft.ifftn(torch.fft.fftn(noise, dim=axes) * eigen.unsqueeze(1).sqrt(), dim=axes).real)


def quadratic(gap: Tensor, eigen: Tensor) -> Tensor:
    """Return gap' K^-1 gap (B,), summed over the k channels of gap (B, k, *grid), by Parseval's theorem."""
    axes = tuple(range(2, gap.dim()))
    power = torch.fft.fftn(gap, dim=axes).abs().square() / math.prod(gap.shape[2:])
    return torch.as_tensor((power / eigen.unsqueeze(1)).flatten(1).sum(1))


def log_determinant(eigen: Tensor, channels: int) -> Tensor:
    """Return log det K (B,) over `channels` independent fields."""
    return channels * eigen.log().flatten(1).sum(1)


def kl(gap: Tensor, log_variance: Tensor, eigen: Tensor) -> Tensor:
    """Return KL(N(mean, diag exp(log_variance)) || N(prior mean, K)) in nats, (B,).

    gap: mean minus prior mean; both (B, k, *grid). A stationary K^-1 has one number on its diagonal, the mean of the
    inverse eigenvalues, which is all that the trace needs.
    """
    diagonal = (1 / eigen).flatten(1).mean(1)
    trace = diagonal * log_variance.exp().flatten(1).sum(1)
    size = gap[0].numel()
    both = log_determinant(eigen, gap.shape[1]) - log_variance.flatten(1).sum(1)
    return 0.5 * (trace + quadratic(gap, eigen) - size + both)
