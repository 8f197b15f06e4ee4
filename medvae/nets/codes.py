"""Fitted priors over a trained VAE's codes: the second stage of Dai & Wipf (2019, "Diagnosing and enhancing VAE
models"). The aggregate of the posteriors is not the N(mean(c), I) that the VAE was trained against, and from some
codes on that gap limits what is sampled.

Codes are counted from the VAE's own prior mean and in units of a public radius, and clipped to norm 1 there.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from medvae.config import PriorConfig
from medvae.nets.mixture import MixturePart, MixtureShapes
from medvae.types import ImageSpace

# A code of the standard normal has norm sqrt(d); a fitted prior sees those up to REACH times as long as they are.
REACH = 1.5
# Largest log scale of one coupling layer: noise on its weights cannot blow a code up.
LOG_SCALE = 1.0


def code_radius(latent_dim: int) -> float:
    """Return the norm that codes are clipped to: a public constant."""
    return REACH * math.sqrt(latent_dim)


def clip_codes(codes: Tensor) -> Tensor:
    """Return codes (B, d) around the prior mean divided by the radius, cut to norm 1; not finite counts as 0."""
    finite = torch.where(torch.isfinite(codes), codes, 0.0) / code_radius(codes.shape[1])
    return torch.as_tensor(finite / torch.linalg.vector_norm(finite, dim=1, keepdim=True).clamp(min=1.0))


class CodeMixture(nn.Module):
    """For each class a Gaussian, or a mixture of some, over clipped codes."""

    def __init__(self, space: ImageSpace, latent_dim: int, components: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        # Codes stand where a mixture has coefficients: one channel, one axis.
        self.mixture = MixturePart(replace(space, mask_labels=()), MixtureShapes(components, (latent_dim,)))

    def sample(self, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Return codes (B, d) around the prior mean for encoded conditions (B, K)."""
        return self.mixture.draw(condition, generator).flatten(1) * code_radius(self.latent_dim)


class _Coupling(nn.Module):
    """One affine coupling (Dinh et al. 2017): half of the code is scaled and shifted by what the other half says."""

    def __init__(self, latent_dim: int, condition_width: int, hidden: int, odd: bool) -> None:
        super().__init__()
        kept = torch.arange(latent_dim) % 2 == int(odd)
        self.register_buffer("kept", kept.float(), persistent=False)
        self.inside = nn.Linear(latent_dim + condition_width, hidden)
        self.outside = nn.Linear(hidden, 2 * latent_dim)
        nn.init.zeros_(self.outside.weight)
        nn.init.zeros_(self.outside.bias)

    def _maps(self, z: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.as_tensor(self.kept)
        hidden = nn.functional.gelu(self.inside(torch.cat([z * kept, condition], dim=1)))
        log_scale, shift = self.outside(hidden).chunk(2, dim=1)
        return LOG_SCALE * torch.tanh(log_scale) * (1 - kept), shift * (1 - kept)

    def inverse(self, z: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return what z came from, and the log determinant (B,) of that map."""
        log_scale, shift = self._maps(z, condition)
        return (z - shift) * torch.exp(-log_scale), -log_scale.sum(1)

    def forward(self, u: Tensor, condition: Tensor) -> Tensor:
        """Return z of u, each (B, d)."""
        log_scale, shift = self._maps(u, condition)
        return torch.as_tensor(u * torch.exp(log_scale) + shift)


class CodeFlow(nn.Module):
    """A small normalising flow over codes, given the condition; untrained it is the standard normal.

    Its parameters are frozen in a VAE: DP-SGD of the VAE must neither move nor noise them.
    """

    def __init__(self, latent_dim: int, condition_width: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.couplings = nn.ModuleList(
            _Coupling(latent_dim, condition_width, hidden, bool(i % 2)) for i in range(layers)
        )

    def log_density(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return log p(z | c) in nats, (B,)."""
        total = torch.zeros(len(z), device=z.device)
        for coupling in reversed(self.couplings):
            z, log_determinant = coupling.inverse(z, condition)  # type: ignore[operator]
            total = total + log_determinant
        return total - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)

    def sample(self, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Return codes (B, d) around the prior mean for encoded conditions (B, K)."""
        z = torch.randn(len(condition), self.latent_dim, generator=generator)
        for coupling in self.couplings:
            z = coupling(z, condition)
        return clip_codes(z) * code_radius(self.latent_dim)

    def forward(self, x: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each clipped code x (B, 1, d): -log p(z | c) a dimension, (B,). `noise` is not used."""
        z = x.flatten(1) * code_radius(self.latent_dim)
        return -self.log_density(z, condition) / self.latent_dim


def make_code_prior(space: ImageSpace, latent_dim: int, config: PriorConfig) -> CodeMixture | CodeFlow | None:
    """Return an empty prior of the kind that the config names, or None."""
    if config.kind == "none":
        return None
    if config.kind == "flow":
        return CodeFlow(latent_dim, space.condition_width, config.layers, config.hidden)
    return CodeMixture(space, latent_dim, 1 if config.kind == "gaussian" else config.components)
