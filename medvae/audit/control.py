"""The positive control: a small VAE trained without privacy on few patients, which the attack must break.

If it does not, the attack is too weak to say anything about the model under audit. The control is kept in memory
only: it remembers its patients by design, and nothing of it is ever written.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from medvae.audit.material import Scans

HIDDEN = 96
LATENT = 24
SCALE = 0.1
LEARNING_RATE = 3e-3
BATCH = 16


class ControlVAE(nn.Module):
    """A two-layer conditional VAE over flattened scans with a Gaussian likelihood: it overfits, as it should."""

    def __init__(self, elements: int, condition_width: int) -> None:
        super().__init__()
        self.latent_dim = LATENT
        self.encoder = nn.Sequential(
            nn.Linear(elements + condition_width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2 * LATENT)
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT + condition_width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, elements)
        )

    def _codes(self, x: Tensor, condition: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(torch.cat([x.flatten(1), condition], 1)).chunk(2, 1)
        log_variance = log_variance.clamp(-8, 2)
        return mean, log_variance, mean + torch.exp(0.5 * log_variance) * noise

    def _reconstruction(self, x: Tensor, z: Tensor, condition: Tensor) -> Tensor:
        out = self.decoder(torch.cat([z, condition], 1))
        constant = math.log(SCALE) + 0.5 * math.log(2 * math.pi)
        return torch.sum(0.5 * ((x.flatten(1) - out) / SCALE).square() + constant, 1)

    def elbo(self, x: Tensor, condition: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return per-sample "loss", "reconstruction" and "kl" in nats, each (B,)."""
        mean, log_variance, z = self._codes(x, condition, noise)
        reconstruction = self._reconstruction(x, z, condition)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return {"loss": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}

    def log_weight(self, x: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
        """Return log p(x, z | c) - log q(z | x, c) at one draw of z, (B,)."""
        _, log_variance, z = self._codes(x, condition, noise)
        log_prior = -0.5 * z.square().sum(1)
        log_posterior = -0.5 * (noise.square() + log_variance).sum(1)
        return log_prior - log_posterior - self._reconstruction(x, z, condition)


def overfit(members: Scans, steps: int, seed: int) -> ControlVAE:
    """Train the control on these scans by plain Adam; with 0 steps it is untrained, and must not be broken."""
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ControlVAE(members.x[0].size, members.condition.shape[1])
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        for _ in range(steps):
            rows = rng.choice(len(members), size=min(BATCH, len(members)), replace=False)
            x, condition = torch.from_numpy(members.x[rows]), torch.from_numpy(members.condition[rows])
            optimizer.zero_grad()
            loss = model.elbo(x, condition, torch.randn(len(rows), LATENT))["loss"].mean() / x[0].numel()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()
