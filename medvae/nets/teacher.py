"""A small classifier of scans, to be trained by DP-SGD: features that see nothing private, or learned ones, and a head.

The fixed features are first-order scattering (Mallat 2012; for privacy: Tramèr & Boneh 2021, "Differentially Private
Learning Needs Better Features"): the moduli of oriented wavelets, averaged over patches. They have no parameters, so
that noise falls on the head alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from monai.networks.blocks import Convolution
from torch import Tensor, nn
from torch.nn import functional

from medvae.config import TeacherConfig
from medvae.types import Condition, ImageSpace

# Voxels an axis that the classifier looks at, patches an axis that features are averaged over, taps of a wavelet.
MOST, PATCHES, TAPS = {2: 32, 3: 20}, {2: 7, 3: 4}, {2: 7, 3: 5}
# Wavelets of two scales: standard deviation of the envelope in voxels; the frequency goes with its inverse.
SCALES = (1.0, 2.0)
FREQUENCY = 2.0


class Wavelets(nn.Module):
    """Moduli of oriented wavelets and the image itself, averaged over patches: (B, 1, *spatial) to (B, features).

    Directions are spread evenly in 2D and drawn once for all in 3D. Every scan is brought to mean 0 and variance 1 over
    its own features, by which no scan looks at another.
    """

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.dims = dims
        self.features = (channels + 1) * PATCHES[dims] ** dims
        real, imaginary = _bank(dims, channels)
        self.register_buffer("real", real, persistent=False)
        self.register_buffer("imaginary", imaginary, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, self.features)."""
        convolve: Any = functional.conv2d if self.dims == 2 else functional.conv3d
        pool: Any = functional.adaptive_avg_pool2d if self.dims == 2 else functional.adaptive_avg_pool3d
        pad = TAPS[self.dims] // 2
        parts = [convolve(x, torch.as_tensor(bank), padding=pad) for bank in (self.real, self.imaginary)]
        modulus = torch.sqrt(parts[0].square() + parts[1].square() + 1e-8)
        found = pool(torch.cat([x, modulus], dim=1), PATCHES[self.dims]).flatten(2)
        centred = found - found.mean(2, keepdim=True)
        scale = centred.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-3)
        return torch.as_tensor((centred / scale).flatten(1))


class Learned(nn.Module):
    """Two strided convolutions with group norm, averaged over patches: (B, 1, *spatial) to (B, features)."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.dims = dims
        norm = ("GROUP", {"num_groups": math.gcd(channels, 4)})
        options: dict[str, Any] = {"strides": 2, "norm": norm, "act": "GELU"}
        self.layers = nn.Sequential(
            Convolution(dims, 1, channels, **options), Convolution(dims, channels, 2 * channels, **options)
        )
        self.features = 2 * channels * PATCHES[3] ** dims

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, self.features)."""
        pool: Any = functional.adaptive_avg_pool2d if self.dims == 2 else functional.adaptive_avg_pool3d
        return torch.as_tensor(pool(self.layers(x), PATCHES[3]).flatten(1))


class Teacher(nn.Module):
    """Tells the classes of a scan from its image: one softmax a class condition."""

    def __init__(self, space: ImageSpace, config: TeacherConfig) -> None:
        super().__init__()
        self.conditions = space.conditions
        dims = space.spatial_dims
        self.shape = tuple(min(n, MOST[dims]) for n in space.spatial_shape)
        self.features = (Wavelets if config.features == "fixed" else Learned)(dims, config.channels)
        self.head = nn.Linear(self.features.features, sum(c.width for c in classes_of(space.conditions)))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def logits(self, x: Tensor) -> list[Tensor]:
        """Return logits (B, classes) a class condition, for scans x (B, C, *spatial); masks are not looked at."""
        image = x[:, :1]
        if image.shape[2:] != self.shape:
            mode = "bilinear" if len(self.shape) == 2 else "trilinear"
            image = functional.interpolate(image, size=self.shape, mode=mode, antialias=len(self.shape) == 2)
        widths = [c.width for c in classes_of(self.conditions)]
        return list(torch.split(self.head(self.features(image)), widths, dim=1))

    def forward(self, x: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
        """Return the cross-entropy of each scan in nats, summed over class conditions, (B,). `noise` is not used."""
        total = torch.zeros(len(x), device=x.device)
        for logits, truth in zip(self.logits(x), self.split(condition), strict=True):
            total = total - (truth * functional.log_softmax(logits, dim=1)).sum(1)
        return total

    def split(self, condition: Tensor) -> list[Tensor]:
        """Return the one-hot columns (B, classes) of each class condition in encoded conditions (B, K)."""
        found, start = [], 0
        for c in self.conditions:
            if c.kind == "class":
                found.append(condition[:, start : start + c.width])
            start += c.width
        return found


def classes_of(conditions: tuple[Condition, ...]) -> list[Condition]:
    """Return the conditions that are classes."""
    return [c for c in conditions if c.kind == "class"]


def _bank(dims: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return the real and imaginary parts (channels, 1, *taps) of Gabor wavelets of mean zero and norm one."""
    taps = TAPS[dims]
    grid = torch.stack(torch.meshgrid(*(torch.arange(taps) - taps // 2.0 for _ in range(dims)), indexing="ij"))
    found = []
    for index, direction in enumerate(_directions(dims, channels)):
        scale = SCALES[index % len(SCALES)]
        envelope = torch.exp(-grid.square().sum(0) / (2 * scale**2))
        phase = torch.tensordot(direction, grid, dims=1) * FREQUENCY / scale
        wave = torch.complex(phase.cos(), phase.sin()) * envelope
        wave = wave - wave.sum() / envelope.sum() * envelope
        found.append(wave / torch.linalg.vector_norm(wave))
    bank = torch.stack(found)[:, None]
    return bank.real.float().contiguous(), bank.imag.float().contiguous()


def _directions(dims: int, channels: int) -> Tensor:
    if dims == 2:
        angle = torch.arange(channels) // len(SCALES) * math.pi / math.ceil(channels / len(SCALES))
        return torch.stack([angle.cos(), angle.sin()], dim=1)
    drawn = torch.randn(channels, dims, generator=torch.Generator().manual_seed(0))
    return functional.normalize(drawn, dim=1)
