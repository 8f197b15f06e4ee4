"""Convolutional encoder and decoder, 2D or 3D, of MONAI blocks. GroupNorm only: nothing mixes the scans of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from monai.networks.blocks import Convolution, ResidualUnit
from torch import Tensor, nn
from torch.nn import functional

from medvae.nets.attention import SpatialAttention


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
    """x (B, C, *spatial) to features: one strided unit a level, and attention at the last where it is asked for."""

    def __init__(
        self,
        channels: int,
        spatial_shape: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        units: int,
        groups: int,
        attention: bool = False,
    ) -> None:
        super().__init__()
        dims = len(spatial_shape)
        inside = (channels, *widths[:-1])
        self.levels = nn.ModuleList(
            _unit(dims, a, b, strides=2, units=units, groups=groups) for a, b in zip(inside, widths, strict=True)
        )
        self.attention = SpatialAttention(widths[-1], groups) if attention else None
        self.features = widths[-1] * math.prod(level_sizes(spatial_shape, len(widths))[-1])

    def maps(self, x: Tensor) -> Tensor:
        """Return the last level's feature maps (B, widths[-1], *coarsest)."""
        for level in self.levels:
            x = level(x)
        return x if self.attention is None else torch.as_tensor(self.attention(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return features of shape (B, self.features)."""
        return self.maps(x).flatten(1)


class Decoder(nn.Module):
    """z and condition (B, K) to (B, C, *spatial): linear, then nearest upsampling, unit and FiLM a level.

    z is a vector of codes (B, d) or, with `field`, a grid of them at the coarsest level, flattened.
    """

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
        attention: bool = False,
        field: bool = False,
    ) -> None:
        super().__init__()
        dims = len(spatial_shape)
        self.sizes = level_sizes(spatial_shape, len(widths))[::-1]
        cells = math.prod(self.sizes[0])
        self.field_channels = latent_dim // cells if field else 0
        self.first: nn.Module = (
            Convolution(dims, self.field_channels, widths[-1], kernel_size=1, conv_only=True)
            if field
            else nn.Linear(latent_dim, widths[-1] * cells)
        )
        self.attention = SpatialAttention(widths[-1], groups) if attention else None
        outside = (*widths[::-1][1:], widths[0])
        self.levels = nn.ModuleList(
            _unit(dims, a, b, strides=1, units=units, groups=groups) for a, b in zip(widths[::-1], outside, strict=True)
        )
        self.films = nn.ModuleList(FiLM(condition_width, b) for b in outside) if condition_width else None
        self.last = Convolution(dims, widths[0], channels, conv_only=True)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return an array of shape (B, C, *spatial), unbounded."""
        if self.field_channels:
            z = z.view(len(z), self.field_channels, *self.sizes[0])
        h = self.first(z).view(len(z), -1, *self.sizes[0])
        if self.attention is not None:
            h = self.attention(h)
        for index, level in enumerate(self.levels):
            h = level(functional.interpolate(h, size=self.sizes[index + 1], mode="nearest"))
            if self.films is not None:
                h = self.films[index](h, condition)
        return torch.as_tensor(self.last(h))

    def final_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the last layer: where they are zero, the decoder adds nothing."""
        return list(self.last.parameters())


class ClassDecoders(nn.Module):
    """One decoder a class, picked by the label: a rare class is not drowned by the common ones in shared weights.

    Every decoder runs on every scan and the label picks: a scan's gradient is zero in the others', and a patient's
    gradient over all of them is clipped together, so the sensitivity is that of one model.
    """

    def __init__(self, decoders: list[Decoder], first_column: int) -> None:
        super().__init__()
        self.decoders: Iterable[Decoder] = nn.ModuleList(decoders)  # type: ignore[assignment]
        self.first_column = first_column

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return an array of shape (B, C, *spatial), unbounded; condition (B, K) holds the label one-hot."""
        every = torch.stack([decoder(z, condition) for decoder in self.decoders], dim=1)
        label = condition[:, self.first_column : self.first_column + every.shape[1]]
        return torch.einsum("bk,bk...->b...", label, every)

    def final_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all last layers."""
        return [p for decoder in self.decoders for p in decoder.final_parameters()]
