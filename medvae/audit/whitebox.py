"""White-box scores of a VAE: what its weights say of a scan.

The attacker holds the weights. Scores are computed from many draws of the code: the importance-weighted likelihood
(Burda et al. 2016), the ELBO, its reconstruction term, and its latent term, how far the code strays from the prior.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from medvae.audit.material import Scans
from medvae.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]

SCORES = ("likelihood", "elbo", "reconstruction", "latent")
ELEMENTS_AT_ONCE = 4_000_000


class Scorable(Protocol):
    """What the attack needs of a model; nets.ConditionalVAE and the control model both have it."""

    latent_dim: int

    def encode(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (B, d), of q(z | x, c)."""

    def kl_to_prior(self, mean: Tensor, log_variance: Tensor, condition: Tensor) -> Tensor:
        """KL(N(mean, diag exp(log_variance)) || p(z | c)) in nats, (B,), whatever the prior is."""

    def log_prior(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return log p(z | c) in nats, (B,)."""

    def reconstruction(self, x: Tensor, z: Tensor, condition: Tensor) -> Tensor:
        """Per-sample -log p(x | z, c) in nats, (B,)."""


def scan_scores(
    model: Scorable, scans: Scans, draws: int, seed: int, progress: Progress | None = None
) -> dict[str, Floats]:
    """Return each score for each scan (N,), from `draws` codes a scan; the same draws for every scan."""
    import torch

    at_once = max(1, ELEMENTS_AT_ONCE // scans.x[0].size)
    noise = torch.randn(draws, model.latent_dim, generator=torch.Generator().manual_seed(seed))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(scans), at_once):
            x = torch.from_numpy(np.ascontiguousarray(scans.x[start : start + at_once]))
            condition = torch.from_numpy(np.ascontiguousarray(scans.condition[start : start + at_once]))
            mean, log_variance = model.encode(x, condition)
            spread, kl = torch.exp(0.5 * log_variance), model.kl_to_prior(mean, log_variance, condition).double()
            errors, ratios = [], []
            for code in noise:
                z = mean + spread * code
                errors.append(model.reconstruction(x, z, condition).double())
                posterior = -0.5 * (code.square() + log_variance + math.log(2 * math.pi)).sum(1).double()
                ratios.append(model.log_prior(z, condition).double() - posterior)
            error, ratio = torch.stack(errors), torch.stack(ratios)
            likelihood = torch.logsumexp(ratio - error, 0) - math.log(draws)
            of_scan = [likelihood, -error.mean(0) - kl, -error.mean(0), kl]
            parts.append(torch.stack(of_scan, 1).numpy())
            if progress is not None:
                progress(min(start + at_once, len(scans)), len(scans))
    return dict(zip(SCORES, np.concatenate(parts).T, strict=True))
