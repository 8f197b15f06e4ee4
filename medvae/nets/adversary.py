"""The critic of a VAE-GAN (Larsen et al. 2016), trained in the same private step as the VAE.

A critic that sees private scans is as private as the generator. Here both players share one loss a scan: the critic
lowers it, and through a reversed gradient (Ganin & Lempitsky 2015) the decoder raises the part that it can. So a
patient's gradient holds both players' shares, it is clipped once over all of them, and the step stays one Gaussian
mechanism of one sensitivity: no second budget is composed. What it costs is room under the clip.

Differs from the paper: the pixelwise ELBO stays, and the critic's features do not replace it, since a patient's
gradient cannot pass through the critic without moving it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medvae.nets.blocks import Encoder


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradient, None


def reverse(x: Tensor, weight: float) -> Tensor:
    """Return x; its gradient comes back times -weight."""
    return torch.as_tensor(_Reverse.apply(x, weight))  # type: ignore[no-untyped-call]


class Critic(nn.Module):
    """Tells real scans from made ones: one logit a scan, of image and masks together."""

    def __init__(
        self, channels: int, spatial_shape: tuple[int, ...], widths: tuple[int, ...], *, units: int, groups: int
    ) -> None:
        super().__init__()
        self.features = Encoder(channels, spatial_shape, widths, units=units, groups=groups)
        self.logit = nn.Linear(self.features.features, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B,) of x (B, C, *spatial): high for real."""
        return torch.as_tensor(self.logit(self.features(x)))[:, 0]

    def loss(self, real: Tensor, made: Tensor, weight: float) -> Tensor:
        """Return the critic's cross-entropy a scan, (B,); `made` (B, C, *spatial) gets its gradient times -weight."""
        return functional.softplus(-self(real)) + functional.softplus(self(reverse(made, weight)))
