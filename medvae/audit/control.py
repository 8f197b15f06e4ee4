"""The positive control: a small VAE trained without privacy on few patients, which the attack must break.

If it does not, the attack is too weak to say anything about the model under audit. The control is kept in memory
only: it remembers its patients by design, and nothing of it is ever written.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medvae.audit.material import Scans
from medvae.audit.stacked import Batches, Schedule, train_stacked
from medvae.types import Progress

HIDDEN = 64
LATENT = 24
SCALE = 0.1
LEARNING_RATE = 4e-3
BATCH = 16


class ControlVAE(nn.Module):
    """A two-layer conditional VAE over flattened scans with a Gaussian likelihood: it overfits, as it should."""

    def __init__(self, elements: int, condition_width: int) -> None:
        super().__init__()
        self.latent_dim = LATENT
        self.encoder = nn.Sequential(
            nn.Linear(elements + condition_width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2 * LATENT)
        )
        self.last = nn.Linear(HIDDEN, elements)
        self.decoder = nn.Sequential(nn.Linear(LATENT + condition_width, HIDDEN), nn.GELU(), self.last)

    def encode(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, each (B, d), of q(z | x, c)."""
        mean, log_variance = self.encoder(torch.cat([x.flatten(1), condition], 1)).chunk(2, 1)
        return mean, log_variance.clamp(-8, 2)

    def kl_to_prior(self, mean: Tensor, log_variance: Tensor, condition: Tensor) -> Tensor:
        """Return KL(N(mean, diag exp(log_variance)) || N(0, I)) in nats, (B,): Kingma & Welling 2013, app. B."""
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)

    def log_prior(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return log p(z) in nats, (B,), of a standard normal."""
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)

    def reconstruction(self, x: Tensor, z: Tensor, condition: Tensor) -> Tensor:
        """Return -log p(x | z, c) in nats, (B,)."""
        out = self.decoder(torch.cat([z, condition], 1))
        constant = math.log(SCALE) + 0.5 * math.log(2 * math.pi)
        return torch.sum(0.5 * ((x.flatten(1) - out) / SCALE).square() + constant, 1)

    def forward(self, x: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
        """Return the negative ELBO a channel element, (B,)."""
        mean, log_variance = self.encode(x, condition)
        z = mean + torch.exp(0.5 * log_variance) * noise
        kl = self.kl_to_prior(mean, log_variance, condition)
        return (self.reconstruction(x, z, condition) + kl) / x[0].numel()


def overfit(members: Scans, steps: int, seed: int) -> ControlVAE:
    """Train the control on these scans by plain Adam."""
    return overfit_many(members, np.ones((1, len(members.patients)), dtype=bool), steps, seed)[0]


def overfit_many(
    pool: Scans, included: npt.NDArray[np.bool_], steps: int, seed: int, progress: Progress | None = None
) -> list[ControlVAE]:
    """Train one control on the patients of each row of `included` (K, P), all of them stacked."""
    index = np.searchsorted(pool.patients, pool.patient)
    rows = [np.flatnonzero(row[index]) for row in included]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = [ControlVAE(pool.x[0].size, pool.condition.shape[1]) for _ in rows]
    with torch.no_grad():  # starting at the members' mean saves the steps that would only find it
        for model, mine in zip(models, rows, strict=True):
            model.last.bias.copy_(torch.from_numpy(pool.x[mine].mean(0).ravel()))
    rng = np.random.default_rng(seed)

    def draw(step: int) -> Batches:
        chosen = np.stack([rng.choice(mine, size=BATCH, replace=len(mine) < BATCH) for mine in rows])[:, :, None]
        latent = rng.standard_normal((*chosen.shape, LATENT)).astype(np.float32)
        weight = np.ones(chosen.shape, dtype=np.float32)
        return Batches(*(torch.from_numpy(a) for a in (pool.x[chosen], pool.condition[chosen], latent, weight)))

    schedule = Schedule(steps, lambda step: LEARNING_RATE, divisor=BATCH)
    train_stacked(models, draw, schedule, torch.Generator().manual_seed(seed), progress)
    return [model.eval() for model in models]
