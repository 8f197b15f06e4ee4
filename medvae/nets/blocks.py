"""Convolutional encoder and decoder, 2D or 3D, of MONAI blocks. GroupNorm only: nothing mixes the scans of a batch."""

from __future__ import annotations

import math

import torch
from monai.networks.blocks import Convolution, ResidualUnit
from torch import Tensor, nn
from torch.nn import functional


def level_sizes(spatial_shape: tuple[int, ...], levels: int) -> list[tuple[int, ...]]:
    """Return the spatial size at each level, halved (rounded up) from one to the next; level 0 is the image."""
    sizes = [spatial_shape]
    for _ in range(levels):
        sizes.append(tuple(math.ceil(n / 2) for n in sizes[-1]))
    return sizes


def _norm(channels: int, groups: int) -> tuple[str, dict[str, int]]:
    return ("GROUP", {"num_groups": math.gcd(channels, groups)})


def _unit(dims: int, inside: int, outside: int, *, strides: int, units: int, groups: int) -> nn.Module:
    norm = _norm(outside, groups)
    if units == 0:
        plain: nn.Module = Convolution(dims, inside, outside, strides=strides, norm=norm, act="GELU")
        return plain
    residual: nn.Module = ResidualUnit(dims, inside, outside, strides=strides, subunits=units, norm=norm, act="GELU")
    return residual


class FiLM(nn.Module):
    """Feature-wise linear modulation (Perez et al. 2018): h (1 + gamma(c)) + beta(c), starting as the identity."""

    def __init__(self, condition_width: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(condition_width, 2 * channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """Modulate h (B, channels, *spatial) by the condition (B, K)."""
        gamma: Tensor
        gamma, beta = self.project(condition).chunk(2, dim=1)
        shape = gamma.shape + (1,) * (h.dim() - 2)
        modulated: Tensor = h * (1 + gamma.view(shape)) + beta.view(shape)
        return modulated


class Encoder(nn.Module):
    """x (B, C, *spatial) to (B, features): one strided unit a level."""

    def __init__(
        self, channels: int, spatial_shape: tuple[int, ...], widths: tuple[int, ...], *, units: int, groups: int
    ) -> None:
        super().__init__()
        dims = len(spatial_shape)
        inside = (channels, *widths[:-1])
        self.levels = nn.ModuleList(
            _unit(dims, a, b, strides=2, units=units, groups=groups) for a, b in zip(inside, widths, strict=True)
        )
        self.features = widths[-1] * math.prod(level_sizes(spatial_shape, len(widths))[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return features of shape (B, self.features)."""
        for level in self.levels:
            x = level(x)
        return x.flatten(1)


class Decoder(nn.Module):
    """z (B, d) and condition (B, K) to (B, C, *spatial): linear, then nearest upsampling, unit and FiLM a level."""

    def __init__(
        self,
        latent_dim: int,
        condition_width: int,
        channels: int,
        spatial_shape: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        units: int,
        groups: int,
    ) -> None:
        super().__init__()
        dims = len(spatial_shape)
        self.sizes = level_sizes(spatial_shape, len(widths))[::-1]
        self.first = nn.Linear(latent_dim, widths[-1] * math.prod(self.sizes[0]))
        outside = (*widths[::-1][1:], widths[0])
        self.levels = nn.ModuleList(
            _unit(dims, a, b, strides=1, units=units, groups=groups) for a, b in zip(widths[::-1], outside, strict=True)
        )
        self.films = nn.ModuleList(FiLM(condition_width, b) for b in outside) if condition_width else None
        self.last = Convolution(dims, widths[0], channels, conv_only=True)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return an array of shape (B, C, *spatial), unbounded."""
        h = self.first(z).view(len(z), -1, *self.sizes[0])
        for index, level in enumerate(self.levels):
            h = level(functional.interpolate(h, size=self.sizes[index + 1], mode="nearest"))
            if self.films is not None:
                h = self.films[index](h, condition)
        return torch.as_tensor(self.last(h))
