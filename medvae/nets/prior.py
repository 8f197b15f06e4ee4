"""The prior p(z | c) over flat codes (B, d): a standard normal around a mean that is linear in the condition, or a
Gaussian random field over a grid of codes (nets/field.py). Both answer the same four questions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medvae.config import FieldConfig
from medvae.nets import field


class NormalPrior(nn.Module):
    """N(mean(c), I)."""

    def __init__(self, condition_width: int, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.condition = nn.Linear(max(1, condition_width), latent_dim, bias=False)

    def mean(self, condition: Tensor) -> Tensor:
        """Return the mean (B, d) at encoded conditions (B, K)."""
        if condition.shape[1] == 0:
            return torch.zeros(len(condition), self.latent_dim, device=condition.device)
        return torch.as_tensor(self.condition(condition))

    def sample(self, condition: Tensor, noise: Tensor) -> Tensor:
        """Return codes (B, d) from standard normal noise (B, d)."""
        return self.mean(condition) + noise

    def kl(self, mean: Tensor, log_variance: Tensor, condition: Tensor) -> Tensor:
        """Return KL(N(mean, diag exp(log_variance)) || p(z | c)) in nats, (B,): Kingma & Welling 2013, app. B."""
        gap = mean - self.mean(condition)
        return 0.5 * (gap.square() + log_variance.exp() - 1 - log_variance).sum(1)

    def log_density(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return log p(z | c) in nats, (B,)."""
        return -0.5 * ((z - self.mean(condition)).square() + math.log(2 * math.pi)).sum(1)


class FieldPrior(nn.Module):
    """A stationary Gaussian random field a channel, around a mean a channel: Gangloff et al., ICIP 2023."""

    def __init__(self, condition_width: int, grid: tuple[int, ...], config: FieldConfig) -> None:
        super().__init__()
        self.grid, self.config = grid, config
        self.condition = nn.Linear(max(1, condition_width), config.channels, bias=False)
        # Two numbers, log range and log variance, looked up a scan: so they too have a gradient a patient.
        self.shape = nn.Embedding(1, 2)
        with torch.no_grad():
            self.shape.weight.copy_(torch.tensor([[math.log(config.range), math.log(config.variance)]]))
        self.shape.weight.requires_grad_(config.learned)

    def _eigenvalues(self, scans: int) -> Tensor:
        row = torch.zeros(scans if self.config.learned else 1, dtype=torch.int64, device=self.shape.weight.device)
        logs = self.shape(row)
        found = field.eigenvalues(self.grid, self.config.correlation, logs[:, 0].exp(), logs[:, 1].exp())
        return found.expand(scans, *self.grid)

    def _maps(self, z: Tensor) -> Tensor:
        return z.view(len(z), self.config.channels, *self.grid)

    def mean(self, condition: Tensor) -> Tensor:
        """Return the mean (B, d) at encoded conditions (B, K), the same in every cell."""
        shape = (len(condition), self.config.channels, *self.grid)
        if condition.shape[1] == 0:
            return torch.zeros(shape, device=condition.device).flatten(1)
        a_channel = torch.as_tensor(self.condition(condition)).view(len(condition), -1, *[1] * len(self.grid))
        return a_channel.expand(shape).flatten(1)

    def sample(self, condition: Tensor, noise: Tensor) -> Tensor:
        """Return codes (B, d) from standard normal noise (B, d)."""
        return self.mean(condition) + field.colour(self._maps(noise), self._eigenvalues(len(noise))).flatten(1)

    def kl(self, mean: Tensor, log_variance: Tensor, condition: Tensor) -> Tensor:
        """Return KL(N(mean, diag exp(log_variance)) || p(z | c)) in nats, (B,)."""
        gap = mean - self.mean(condition)
        return field.kl(self._maps(gap), self._maps(log_variance), self._eigenvalues(len(mean)))

    def log_density(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return log p(z | c) in nats, (B,)."""
        eigen = self._eigenvalues(len(z))
        quadratic = field.quadratic(self._maps(z - self.mean(condition)), eigen)
        constant = z.shape[1] * math.log(2 * math.pi)
        return -0.5 * (quadratic + field.log_determinant(eigen, self.config.channels) + constant)
